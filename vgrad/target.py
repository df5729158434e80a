"""A model in a file, named as `path/to/file.py:make`, and whether its diagnosis passes a check.

    def make():
        return loss_fn, params, (x, t)      # what vgrad.diagnose(loss_fn, params, x, t) takes

The rules of a check, delta_ref being that of the deepest site:

    vanishing    a site's delta is exactly zero, or below 1e-3 delta_ref, or the trend over the depth is a factor below 1/10
    exploding    a site's delta is above 1e3 delta_ref, or the trend is a factor above 10
    dead         a tenth of the units of some site, or more, have an activation that is flat for every sample
    non-finite   the loss, a parameter or a reading is NaN or inf
"""

import difflib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vgrad.diagnosis import Diagnosis

__all__ = ["Problem", "load", "problems"]

Problem = Literal["vanishing", "exploding", "dead", "non-finite"]
_FAR, _TREND, _DEAD = math.log(1e3), math.log(10), 0.1


def load(target: str) -> tuple[Callable, Any, tuple]:
    """(loss_fn, params, args) as the function in the file returns them.

    The file's folder is put in front of `sys.path`, as when it is run as a script.

    Raises:
      ValueError: a target that is not `file.py:function`, no such function, or a return value of another form.
      TypeError: what is named there, or the loss, is not a function.  FileNotFoundError.
      Whatever the file or its function raises, as it is.
    """
    path, colon, name = target.rpartition(":")
    file = Path(path)
    if not colon or not name.isidentifier() or file.suffix != ".py":
        raise ValueError(f"the target is {target!r}, expected path/to/file.py:function.")
    if not file.is_file():
        raise FileNotFoundError(f"no file {path}: expected path/to/file.py:function, the path seen from {Path.cwd()}.")
    make = getattr(module := _imported(file), name, None)
    if make is None:
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
        near = difflib.get_close_matches(name, own, 1)
        there = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(own) or 'none'}."
        raise ValueError(f"{path} has no function {name!r}: {there}")
    if not callable(make):
        raise TypeError(f"{target} is a {type(make).__name__}, expected a function that returns (loss_fn, params, args).")
    made = make()
    if not isinstance(made, tuple | list) or len(made) != 3:
        what = f"{len(made)} values" if isinstance(made, tuple | list) else f"a {type(made).__name__}"
        raise ValueError(f"{target} returned {what}, expected (loss_fn, params, args), args being a tuple: (x, t), say.")
    loss_fn, params, args = made
    if not callable(loss_fn):
        raise TypeError(f"{target} returned a {type(loss_fn).__name__} for a loss, expected a function (params, *args) -> scalar.")
    if not isinstance(args, tuple | list):
        raise ValueError(f"{target} returned a {type(args).__name__} for args, expected a tuple: (x,) for a single one.")
    return loss_fn, params, tuple(args)


def _imported(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.resolve()))
    sys.modules[file.stem] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def problems(report: Diagnosis) -> dict[Problem, str]:
    """What is amiss by the rules above, with a sentence for each; empty if nothing is."""
    found: dict[Problem, str] = {}
    ran = np.array([status != "not run" for status in report.status])
    broken = [s for s, status in zip(report.site, report.status, strict=True) if status == "non-finite"]
    if broken or report.non_finite or not np.isfinite(report.loss).all():
        found["non-finite"] = f"first at {[*report.non_finite, *broken, 'the loss'][0]}"
    delta = np.where(ran & ~np.isnan(report.log_delta), report.log_delta, np.nan)
    if not np.isnan(delta).all():
        reference = delta[max(np.flatnonzero(~np.isnan(delta)), key=lambda i: report.depth[i])]
        zero = np.isneginf(delta)
        relative = np.where(zero, -np.inf, delta - (reference if np.isfinite(reference) else 0.0))
        low, high = int(np.nanargmin(relative)), int(np.nanargmax(relative))
        if zero.any():
            found["vanishing"] = f"delta is exactly zero at {zero.sum()} of {ran.sum()} sites"
        elif relative[low] < -_FAR:
            found["vanishing"] = f"ln ||delta|| at {report.site[low]} is {-relative[low]:.1f} below that of the deepest site"
        if relative[high] > _FAR:
            found["exploding"] = f"ln ||delta|| at {report.site[high]} is {relative[high]:.1f} above that of the deepest site"
        rate, error = report.rate
        trend = rate * np.ptp(report.depth)
        if abs(rate) > 2 * error and abs(trend) > _TREND:
            words = f"{rate:+.3f} ± {error:.3f} nats per layer toward the input, {trend:+.1f} in all"
            found.setdefault("vanishing" if trend < 0 else "exploding", words)
    share = np.where(ran, report.dead_fraction, np.nan)
    if (share >= _DEAD).any():
        found["dead"] = f"{np.nanmax(share):.0%} of the units at {report.site[int(np.nanargmax(share))]}"
    return found
