"""The command line: `vgrad study` measures, `vgrad plot` draws again what was measured.

Options and their help come from the types and docstrings of the functions and of `vgrad.study.Config`.

A study keeps its finished chunks in a folder beside its results until the data set is written. Stopped in any way, the same command
with --resume goes on where it was: exit code 130 after Ctrl-C, 143 after SIGTERM, 2 after an error such as a full disk.
"""

import contextlib
import hashlib
import os
import platform
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from vgrad import chunkstore, progress, store
from vgrad import study as studies

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
        _keep_compiled()
    _one_device_per_core()
    member, members = _roll_call(coordinator, num_processes, process_id) if distributed else (0, 1)
    mesh = _all_devices()
    folder, again = config.out / "study.chunks", "the same command with --resume goes on"
    with chunkstore.Store(folder, member=member, num_members=members) as kept, _stop_on_signals() as caught, _plain_warnings():

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


def _roll_call(coordinator, num_processes, process_id):
    """Which process this is, of how many. All meet once and part again.

    Whoever stays joined to jax's coordinator is aborted when another process dies, and at once when the coordinator does or is the
    first to finish. Chunks need nothing of each other, so nobody stays.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        raise ValueError(
            f"--distributed does not know where to meet ({error}): give --coordinator host:port, --num-processes and --process-id."
        ) from error
    member = jax.process_index(), jax.process_count()
    jax.distributed.shutdown()
    return member


def _one_device_per_core():
    """On CPU as many virtual devices as cores, which beats one device with a thread per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # those we are allowed
    with contextlib.suppress(RuntimeError):  # jax is already running, in the caller's configuration
        jax.config.update("jax_num_cpu_devices", cores or 1)


def _all_devices():
    """A mesh over all devices of this process."""
    devices = np.array(jax.local_devices())
    return jax.sharding.Mesh(devices, ("cases",)) if devices.size > 1 else None


def _keep_compiled():
    """jax's cache of compiled programs, in a folder per kind of processor: such a program may crash on another."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        processor = platform.processor() or platform.machine()
        with contextlib.suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            processor += "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "vgrad" / hashlib.sha256(processor.encode()).hexdigest()[:12]))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextlib.contextmanager
def _stop_on_signals():
    """Ctrl-C or SIGTERM stops after the chunk in flight; a second Ctrl-C at once. Yields the list of signals so far."""
    caught: list[int] = []

    def on_signal(number, _):
        if number == signal.SIGINT and caught:
            raise KeyboardInterrupt
        caught.append(number)
        print("\nStopping when the chunk in flight is finished; Ctrl-C drops it.", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _plain_warnings():
    """A warning of the study's is a line."""
    with warnings.catch_warnings():
        shown = warnings.showwarning
        warnings.showwarning = lambda message, kind, *rest, **more: (
            print(f"vgrad: {message}", file=sys.stderr) if kind is UserWarning else shown(message, kind, *rest, **more)
        )
        yield


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
