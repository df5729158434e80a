"""The command line: `vgrad study` measures, `vgrad plot` draws again what was measured, `vgrad predict` and `vgrad phase` compute.

Options and their help come from the types and docstrings of the functions and of `vgrad.study.Config`.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from vgrad import data as datasets
from vgrad import prediction, store
from vgrad import study as studies

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


@app.command(name="predict")
def _predict(
    phi: str = "tanh",
    depth: int = 50,
    sigma_w: float = 1.0,
    sigma_b: float = 0.0,
    width: int = 128,
    batch: int = 64,
    data: Path | None = None,
) -> None:
    """Predict the profile of a network without drawing one, say in words what will happen, and how to initialize instead.

    Args:
        phi: Activation, by name.
        depth: Number of weight matrices.
        sigma_w: Standard deviation of the weights, times sqrt(fan_in).
        sigma_b: Standard deviation of the biases.
        width: Units per hidden layer.
        batch: Samples in the batch.
        data: Your own data, as for `vgrad study`. Default: handwritten digits.
    """
    from vgrad import verdicts

    source = datasets.load(data)
    x, t = source.batch(batch, 0)
    loss = "cross_entropy" if t.ndim == 1 else "squared_error"
    with jax.enable_x64(True):  # critical points and depth scales near them want more than six digits
        predicted = prediction.predict(
            phi, (x, t), width=width, depth=depth, out_dim=source.out_dim, loss=loss, sigma_w=sigma_w, sigma_b=sigma_b
        )
        outlook = verdicts.outlook(phi, sigma_w, sigma_b)
    print(f"By theory, for {batch} samples of {source.name}; q: variance of the preactivations, c: correlation of two inputs.\n")
    print(verdicts.profile_table(predicted), verdicts.summary(outlook, predicted), verdicts.advice(outlook), sep="\n\n")


@app.command(name="phase")
def _phase(
    phi: str = "tanh",
    sigma_w: tuple[float, float] = (0.3, 3.0),
    sigma_b: tuple[float, float] = (0.0, 1.5),
    points: int = 96,
    out: Path = Path("results"),
) -> None:
    """Draw the phase diagram of an activation: where gradients vanish, hold and explode, and how deep one can train.

    Args:
        phi: Activation, by name.
        sigma_w: Range of the standard deviation of the weights, times sqrt(fan_in).
        sigma_b: Range of that of the biases.
        points: Points on each axis.
        out: Folder for the figure.
    """
    from vgrad import theory_plots

    store.check_writable(out)
    with jax.enable_x64(True):
        diagram = theory_plots.diagram(phi, sigma_w, sigma_b, points)
        path = out / f"phase_{phi}.png"
        theory_plots.phase_diagram(diagram).savefig(path, dpi=130)
    print(path)


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
