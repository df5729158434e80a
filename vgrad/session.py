"""What a long run needs around it: devices, a cache of compiled programs, signals, and the other processes of a distributed run.

Only the command line calls these: they configure jax and the process.
"""

import contextlib
import hashlib
import os
import platform
import signal
import sys
import warnings
from pathlib import Path

import jax
import numpy as np

__all__ = ["all_devices", "keep_compiled", "one_device_per_core", "plain_warnings", "roll_call", "stop_on_signals"]


def roll_call(coordinator, num_processes, process_id):
    """Which process this is, of how many. All meet once and part again.

    Whoever stays joined to jax's coordinator is aborted when another process dies, and at once when the coordinator does or is the
    first to finish. Chunks need nothing of each other, so nobody stays.
    """
    # Of Open MPI jax looks for a variable that is gone since version 5, and asks mpi4py only if it is told to.
    open_mpi_5 = "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ
    method = "mpi4py" if open_mpi_5 and coordinator is None else None
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, cluster_detection_method=method)
    except ValueError as error:
        raise ValueError(
            f"--distributed does not know where to meet ({error}): give --coordinator host:port, --num-processes and --process-id"
            + (", or install mpi4py." if method else ".")
        ) from error
    member = jax.process_index(), jax.process_count()
    jax.distributed.shutdown()
    return member


def one_device_per_core():
    """On CPU as many virtual devices as cores, which beats one device with a thread per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # those we are allowed
    with contextlib.suppress(RuntimeError):  # jax is already running, in the caller's configuration
        jax.config.update("jax_num_cpu_devices", cores or 1)


def all_devices():
    """A mesh over all devices of this process."""
    devices = np.array(jax.local_devices())
    return jax.sharding.Mesh(devices, ("cases",)) if devices.size > 1 else None


def keep_compiled():
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
def stop_on_signals():
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
def plain_warnings():
    """A warning of the study's is a line."""
    with warnings.catch_warnings():
        shown = warnings.showwarning
        warnings.showwarning = lambda message, kind, *rest, **more: (
            print(f"vgrad: {message}", file=sys.stderr) if kind is UserWarning else shown(message, kind, *rest, **more)
        )
        yield
