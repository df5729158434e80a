"""The command line: `vgrad study` measures, `vgrad plot` draws again what was measured, `vgrad diagnose` looks at a model of yours.

Options and their help come from the types and docstrings of the functions and of `vgrad.study.Config`.
"""

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from vgrad import store
from vgrad import study as studies
from vgrad import target as targets
from vgrad.diagnose import diagnose

__all__ = ["main"]

app = tyro.extras.SubcommandApp()


@app.command(name="study")
def _study(config: Annotated[studies.Config, tyro.conf.arg(name="")]) -> None:
    """Measure the decay of gradients over depth: a table, a labelled data set and figures."""
    from tqdm import tqdm

    from vgrad import plots

    store.check_writable(config.out)
    mesh = _all_devices()
    networks = len(config.phi) * len(config.init) * config.num_seeds * len(config.depths)
    with tqdm(total=networks, unit=" networks", smoothing=0, disable=None) as bar:

        def on_progress(done, what):
            bar.update(done)
            bar.set_description(what or bar.desc.rstrip(": "))

        dataset = studies.run(config, on_progress=on_progress, mesh=mesh)
    complete = bool(dataset.attrs["complete"])
    path = store.save(dataset, config.out / ("study.nc" if complete else "study-partial.nc"))
    if not complete:
        print(f"\nInterrupted. What was measured is in {path}; `vgrad plot {path}` draws it.")
        sys.exit(130)
    print(studies.table(dataset))
    print(f"\n{networks} networks, {dataset.attrs['data']}, {dataset.attrs['device']}")
    for written in (path, *plots.save_all(dataset, config.out)):
        print(written)


@app.command(name="plot")
def _plot(results: tyro.conf.Positional[Path], out: Path | None = None) -> None:
    """Draw the figures of a study again, and print its table.

    Args:
        results: A file written by `vgrad study`.
        out: Folder for the figures. Default: beside the results.
    """
    from vgrad import plots

    folder = out or results.parent
    dataset = store.load(results)
    store.check_writable(folder)
    print(studies.table(dataset))
    for written in plots.save_all(dataset, folder):
        print(written)


@app.command(name="diagnose")
def _diagnose(
    target: tyro.conf.Positional[str], figure: Path | None = None, fail_on: tuple[targets.Problem, ...] = ()
) -> None:
    """Say where the gradient of a model dies, and why: a table and a verdict.

    Args:
      target: path/to/file.py:make, a function without arguments that returns (loss_fn, params, args).
      figure: Where to draw the readings, a .png, .pdf or .svg file.
      fail_on: What makes the command end with exit code 1, for continuous integration. A mistake ends it with 2.
    """
    if figure is not None:
        store.check_writable(figure.parent)
    try:
        loss_fn, params, args = targets.load(target)
        report = diagnose(loss_fn, params, *args)
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if Path(frame.f_code.co_filename).parent != Path(__file__).parent:  # not raised here: a mistake in the model
            traceback.print_exception(error)
            sys.exit(2)
        raise
    print(report)
    if figure is not None:
        from vgrad import plots

        plots.diagnosis(report).savefig(figure, dpi=130)
        print(f"\n{figure}")
    failed = {name: why for name, why in targets.problems(report).items() if name in fail_on}
    for name, why in failed.items():
        print(f"vgrad: {name}: {why}", file=sys.stderr)
    if failed:
        sys.exit(1)


def _all_devices():
    """A mesh over all devices. On CPU one virtual device per core, which beats one device with a thread per core."""
    with contextlib.suppress(RuntimeError):  # jax is already running, in the caller's configuration
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    devices = np.array(jax.devices())
    return jax.sharding.Mesh(devices, ("cases",)) if devices.size > 1 else None


def main(args: list[str] | None = None) -> None:
    """Entry point of `vgrad` and of `python -m vgrad`. A mistake of the user's is a message and exit code 2, not a traceback."""
    try:
        app.cli(prog="vgrad", args=args, description="Does the gradient survive the depth of a network?")
    except (ValueError, TypeError, OSError) as error:
        print(f"vgrad: {error}", file=sys.stderr)
        sys.exit(2)
