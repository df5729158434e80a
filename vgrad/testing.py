"""Assertions for a test-suite of your own: the gradient of this model flows, its units live, its signal keeps its size.

    def test_gradients_flow_at_initialization():
        vgrad.testing.assert_gradients_flow(loss_fn, params, x, t, max_log_ratio=5.0)

An assertion measures with `vgrad.diagnose` and compares the readings of all sites with each other,

    max_s ln ||delta_s|| - min_s ln ||delta_s|| <= max_log_ratio,

so the scale of the loss does not matter. What fails is shown as rows of the diagnosis, with its verdict below. An assertion that
finds nothing to look at fails too. Each call traces and compiles: in a property test, draw few examples or small models.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgrad.diagnose import diagnose
from vgrad.diagnosis import Diagnosis

__all__ = ["assert_gradients_flow", "assert_no_dead_units", "assert_signal_preserved"]


def assert_gradients_flow(
    loss_fn: Callable,
    params: Any,
    *args,
    max_log_ratio: float = math.log(1e3),
    ignore: str = "",
    has_aux: bool = False,
    batches: Sequence[tuple] | None = None,
) -> None:
    """Every site gets a gradient, and none of them one that is out of proportion.

    Args:
      loss_fn, params, *args, has_aux, batches: as for `vgrad.diagnose`.
      max_log_ratio: the most that ln ||delta|| may differ between any two sites, in nats. Default: a factor 1000.
      ignore: regular expression; sites and parameters whose name it finds are left out, such as "frozen|^embed".
    Raises:
      AssertionError: a parameter that the loss does not use; a site whose delta is exactly zero, NaN or inf; a larger ratio.
      ValueError, TypeError: whatever `vgrad.diagnose` raises; a bad `max_log_ratio` or `ignore`.
    """
    __tracebackhide__ = True
    _check_ratio(max_log_ratio)
    report, keep = _measured(ignore, loss_fn, params, *args, has_aux=has_aux, batches=batches)
    unused = [name for name in report.unused if not (ignore and re.search(ignore, name))]
    if unused:
        _fail(report, keep, f"the loss does not use {', '.join(unused)}: no gradient can reach it")
    broken = keep & ~np.isfinite(report.log_delta)
    if broken.any():
        _fail(report, broken, f"the gradient is zero, NaN or inf at {_of(broken, keep)} sites")
    _check_spread(report, keep, report.log_delta, max_log_ratio, "ln ||delta||")


def assert_no_dead_units(
    loss_fn: Callable,
    params: Any,
    *args,
    max_fraction: float = 0.0,
    ignore: str = "",
    has_aux: bool = False,
    batches: Sequence[tuple] | None = None,
) -> None:
    """No unit is dead: the slope of its activation is not zero for every sample.

    A unit may be alive for samples that are not in the batch, so give a batch of some hundreds.

    Args:
      loss_fn, params, *args, has_aux, batches: as for `vgrad.diagnose`.
      max_fraction: share of dead units that a site may have, 0 <= max_fraction < 1; a mean over batches.
      ignore: regular expression; sites whose name it finds are left out.
    Raises:
      AssertionError: a site with more dead units; no site whose activation is known.
      ValueError, TypeError: whatever `vgrad.diagnose` raises; a bad `max_fraction` or `ignore`.
    """
    __tracebackhide__ = True
    if not 0 <= max_fraction < 1:
        raise ValueError(f"max_fraction is {max_fraction!r}, expected 0 <= max_fraction < 1: the share of units that may be dead.")
    report, keep = _measured(ignore, loss_fn, params, *args, has_aux=has_aux, batches=batches)
    known = keep & ~np.isnan(report.dead_fraction)
    if not known.any():
        _fail(report, keep, "no site has an activation behind it that was recognised and can die: nothing was checked")
    dead = known & (report.dead_fraction > max_fraction)
    if dead.any():
        _fail(report, dead, f"more than {max_fraction:.0%} of the units are dead at {_of(dead, known)} sites")


def assert_signal_preserved(
    apply_fn: Callable, params: Any, x: Any, *args, max_log_ratio: float = math.log(10), ignore: str = ""
) -> None:
    """The forward signal keeps its size: the root mean square of z is about the same at every site.

    Args:
      apply_fn: (params, x, *args) -> outputs, any pytree with an array of floats in it.
      params, x, *args: what it takes.
      max_log_ratio: the most that ln rms z may differ between any two sites, in nats. Default: a factor 10.
      ignore: regular expression; sites whose name it finds are left out, such as a readout that starts at zero.
    Raises:
      AssertionError: a site whose z is all zero, NaN or inf; a larger ratio.
      ValueError, TypeError: whatever `vgrad.diagnose` raises; outputs without floats; a bad `max_log_ratio` or `ignore`.
    """
    __tracebackhide__ = True
    _check_ratio(max_log_ratio)

    def total(params, *inputs):
        outputs = [y for y in jax.tree.leaves(apply_fn(params, *inputs)) if jnp.issubdtype(jnp.result_type(y), jnp.floating)]
        if not outputs:
            raise ValueError("apply_fn returned no array of floats, expected outputs that depend on the parameters.")
        return sum(jnp.sum(y).astype(jnp.result_type(float)) for y in outputs)

    report, keep = _measured(ignore, total, params, x, *args)
    broken = keep & ~np.isfinite(report.log_rms_z)
    if broken.any():
        _fail(report, broken, f"the signal is zero, NaN or inf at {_of(broken, keep)} sites", verdict=False)
    _check_spread(report, keep, report.log_rms_z, max_log_ratio, "ln rms z", verdict=False)


def _measured(ignore, loss_fn, params, *args, **options) -> tuple[Diagnosis, np.ndarray]:
    """The diagnosis, and which of its rows count."""
    try:
        left_out = re.compile(ignore) if ignore else None
    except re.error as error:
        raise ValueError(f"ignore is {ignore!r}, expected a regular expression: {error}.") from error
    report = diagnose(loss_fn, params, *args, **options)
    keep = np.array([status != "not run" and not (left_out and left_out.search(name))
                     for name, status in zip(report.site, report.status, strict=True)])  # fmt: skip
    if not keep.any():
        _fail(report, keep | True, f"ignore={ignore!r} leaves out every site: nothing was checked")
    return report, keep


def _check_ratio(max_log_ratio):
    if not max_log_ratio >= 0:
        raise ValueError(f"max_log_ratio is {max_log_ratio!r}, expected a number >= 0, in nats: math.log(100) allows a factor 100.")


def _check_spread(report, keep, values, most, what, verdict=True):
    """Fails with the rows that are out of proportion, seen from the site nearest the median."""
    __tracebackhide__ = True
    spread = float(np.ptp(values[keep]))
    if spread > most:
        low, high = (pick(np.where(keep, values, np.nan)) for pick in (np.nanargmin, np.nanargmax))
        far = keep & (np.abs(values - np.median(values[keep])) > most / 2)
        far[[low, high]] = True
        _fail(report, far, f"{what} differs by {spread:.2f} between {report.site[low]} and {report.site[high]}, "
                           f"max_log_ratio is {most:.2f}", verdict=verdict)  # fmt: skip


def _of(some, all_of):
    return f"{np.sum(some)} of {np.sum(all_of)}"


def _fail(report: Diagnosis, rows, what: str, verdict=True):
    """Raises with the named rows of the report."""
    __tracebackhide__ = True
    pick = lambda v: v[rows] if isinstance(v, np.ndarray) else tuple(u for u, r in zip(v, rows, strict=True) if r)  # noqa: E731
    per_site = report._fields[: report._fields.index("unused")]
    part = report._replace(**{name: pick(getattr(report, name)) for name in per_site})
    raise AssertionError("\n".join([what + ".", "", part.table(), *(["", report.verdict()] if verdict else [])]))
