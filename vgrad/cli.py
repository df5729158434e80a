"""The command line: `vgrad study` measures and `vgrad plot` draws it again, `vgrad predict` and `vgrad phase` ask theory, and
`vgrad diagnose` looks at a model of yours.

Options and their help come from the types and docstrings of the functions and of `vgrad.study.Config`.

A study keeps its finished chunks in a folder beside its results until the data set is written. Stopped in any way, the same command
with --resume goes on where it was: exit code 130 after Ctrl-C, 143 after SIGTERM, 2 after an error such as a full disk.
"""

import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated

import jax
import tyro

from vgrad import chunkstore, prediction, progress, session, store
from vgrad import data as datasets
from vgrad import study as studies
from vgrad import target as targets
from vgrad.diagnose import diagnose

__all__ = ["main"]

app = tyro.extras.SubcommandApp()


@app.command(name="study")
def _study(
    config: Annotated[studies.Config, tyro.conf.arg(name="")],
    resume: bool = False,
    quiet: bool = False,
    cache: bool = True,
    distributed: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Measure the decay of gradients over depth: a table, a labelled data set and figures.

    Args:
        resume: Go on with a study that was stopped. What is finished is not measured again.
        quiet: No progress bar.
        cache: Keep compiled programs for the next run, in the user's cache folder or JAX_COMPILATION_CACHE_DIR.
        distributed: One process of several, which share the chunks and the folder --out. Where to meet is found out on Slurm,
            Open MPI, Kubernetes and TPUs, and given by the next three options elsewhere.
        coordinator: host:port of process 0.
        num_processes: How many there are.
        process_id: Which of them this is, from 0.
    """
    from vgrad import plots

    store.check_writable(config.out)
    if cache:
        session.keep_compiled()
    session.one_device_per_core()
    member, members = session.roll_call(coordinator, num_processes, process_id) if distributed else (0, 1)
    mesh = session.all_devices()
    folder, again = config.out / "study.chunks", "the same command with --resume goes on"
    kept = chunkstore.Store(folder, member=member, num_members=members)
    with kept, session.stop_on_signals() as caught, session.plain_warnings():

        def stopping():
            if signal.SIGTERM in caught:  # there may be little time: nothing is gathered
                print(f"\nTerminated. What is finished is in {folder}; {again}.", flush=True)
                sys.exit(128 + signal.SIGTERM)
            return bool(caught)

        with progress.bar(mesh, quiet=quiet or member > 0) as on_progress:
            dataset = studies.run(
                config,
                on_progress=on_progress,
                mesh=mesh,
                store=kept,
                resume=resume or distributed,
                stopping=stopping,
            )
        if dataset is None and caught:
            print(f"\nInterrupted. What is finished is in {folder}; {again}.")
            sys.exit(128 + signal.SIGINT)
        if dataset is None:
            print(f"\nProcess {member} of {members} has done its share. The last one writes the results; should one fail, {again}.")
            return
        complete = bool(dataset.attrs["complete"])
        path = store.save(dataset, config.out / ("study.nc" if complete else "study-partial.nc"))
        if not complete:
            print(f"\nInterrupted. What was measured is in {path}; `vgrad plot {path}` draws it; {again}.")
            sys.exit(128 + signal.SIGINT)
        (config.out / "study-partial.nc").unlink(missing_ok=True)
        kept.remove()
    print(studies.table(dataset))
    networks = dataset.plain_float32_grad_w1.size * dataset.sizes["depth"]
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


def main(args: list[str] | None = None) -> None:
    """Entry point of `vgrad` and of `python -m vgrad`. A mistake of the user's is a message and exit code 2, not a traceback."""
    try:
        app.cli(prog="vgrad", args=args, description="Does the gradient survive the depth of a network?")
    except KeyboardInterrupt:
        print("\nvgrad: stopped. Nothing finished is lost: the same command with --resume goes on.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, TypeError, OSError) as error:
        print(f"vgrad: {error}", file=sys.stderr)
        sys.exit(2)
