"""Benchmark: how long the profiles of many depths and seeds take, here and by six other ways of computing them.

Claim, on the medium workload (width 128, batch 64, depths 2 to 65, 16 seeds), for the full profile against peers that compute
||dJ/dW_l|| alone: warm at least 10x a PyTorch loop, 3x torch.func, 3x one jit(grad) a depth (4x cold), 4x a scan a depth and a
masked scan, with no more memory than the latter, and no slower than nested depths in NumPy; 10,000 layers compile within 1.5x of
the time of 10. The table says of each line whether it held.

Every measurement is a fresh process (`one_process.py`), repeats are interleaved, medians are shown, and all peers must agree on the
readings or nothing is shown at all. Ten minutes on two cores, `--quick` (small sizes, figures that mean nothing) one.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from peers import PEERS
from table import report, save
from workloads import SIZES, SIZES_QUICK, Size, nested_flops

HERE = Path(__file__).parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
COMPILE_SIZE, COMPILE_DEPTHS = Size(64, 32, [], 1), (10, 100, 1000, 10_000)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and where the results go."""

    workloads: tuple[Literal["small", "medium", "wide"], ...] = ()
    """Which workloads. Default: all, or with --quick the first two."""
    only: tuple[Literal[tuple(PEERS)], ...] = tuple(PEERS)  # pyright: ignore[reportInvalidTypeForm]
    """Which peers; this library is always among them."""
    repeats: int = 3
    """Processes per peer and workload."""
    devices: int = CORES
    """Virtual CPU devices that every JAX program shards its seeds over."""
    quick: bool = False
    """One repeat of small sizes. Nothing is written unless --out says where."""
    out: Path | None = None
    """The JSON file; the table goes beside it as Markdown. Default: results/depth_sweep.json beside this script."""


TINY = Config(workloads=("small",), only=("numpy", "masked"), quick=True)


def run(config: Config) -> dict[str, Any]:
    """All measurements, as what the JSON file holds."""
    sizes, repeats = (SIZES_QUICK, 1) if config.quick else (SIZES, config.repeats)
    workloads = config.workloads or tuple(sizes)[: 2 if config.quick else None]
    names, skipped = _available(("vgrad", *(n for n in config.only if n != "vgrad")))
    depths = COMPILE_DEPTHS[::2] if config.quick else COMPILE_DEPTHS
    runs, reference = {w: {n: [] for n in names} for w in workloads}, {}
    compiles = {depth: [] for depth in depths}
    with tempfile.TemporaryDirectory() as folder:
        for name in workloads:
            _process({"task": "draw", "size": sizes[name], "weights": f"{folder}/{name}.npz"}, config)
        for repeat in range(repeats):
            for workload in workloads:
                for name in names:
                    _progress(f"repeat {repeat + 1}/{repeats}, {workload}, {name}")
                    job = {"size": sizes[workload], "weights": f"{folder}/{workload}.npz", "readings": f"{folder}/out.npy"}
                    runs[workload][name].append(_measure(job, PEERS[name], config))
                    readings = np.load(job["readings"])
                    _check_agreement(workload, name, readings, reference.setdefault(workload, readings))
            for depth in depths:
                _progress(f"repeat {repeat + 1}/{repeats}, compile depth {depth}")
                compiles[depth].append(_process({"task": "compile", "size": COMPILE_SIZE, "depth": depth}, config))
    _progress("")
    return {
        "quick": config.quick, "device": runs[workloads[0]]["vgrad"][0]["device"], "processor": _processor(), "cores": CORES,
        "jax_devices": config.devices, "repeats": repeats, "python": platform.python_version(), "versions": _versions(),
        "sizes": {w: sizes[w]._asdict() | {"gflop": nested_flops(sizes[w]) / 1e9} for w in workloads},
        "skipped": skipped, "runs": runs, "compile": compiles,
    }  # fmt: skip


def check(result: dict[str, Any]) -> None:
    """Raises unless every figure is there and positive; that the peers agree has been checked while they ran."""
    for workload, by_name in result["runs"].items():
        for name, each in by_name.items():
            if not all(r[q] > 0 for r in each for q in ("cold", "wall", "warm", "peak_mb", "product_gflops")):
                raise ValueError(f"{name} on {workload} has a figure that is not positive: {each}.")


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    out = config.out or (None if config.quick else HERE / "results" / "depth_sweep.json")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):  # found out before the minutes are spent
            raise SystemExit(f"{out.parent} cannot be written: choose another file with --out.")
    result = run(config)
    check(result)
    text = report(result)
    print(text)
    if out:
        save(result, text, out)


def _available(names):
    """The peers whose libraries are installed, and of the others why not."""
    missing = {n: "torch is not installed" for n in names if n.startswith("torch") and importlib.util.find_spec("torch") is None}
    for name, why in missing.items():
        print(f"skipped {name}: {why}", file=sys.stderr)
    return [n for n in names if n not in missing], missing


def _measure(job, peer, config):
    seeds = max(1, job["size"].seeds // peer.share)
    job = job | {"task": "peer", "peer": peer.function, "seeds": seeds, "warm_seconds": 0.1 if config.quick else 1.0}
    figures = _process(job, config, peer.env)
    scale = job["size"].seeds / seeds
    figures["wall"] += (scale - 1) * figures["cold"]
    return figures | {q: scale * figures[q] for q in ("cold", "warm", "warm_cpu")}


def _process(job, config, env=None):
    # No compilation cache, and full float32 products on every backend.
    env = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_NUM_CPU_DEVICES": str(config.devices), "BENCH_CORES": str(CORES),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    } | (env or {})  # fmt: skip
    command = [sys.executable, str(HERE / "one_process.py"), json.dumps(job | {"started": time.time()})]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process for {job} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _check_agreement(workload, name, found, wanted):
    """ln ||dW_l|| to 1e-3, where squares are far from underflow in float32; NaN in the same places."""
    wanted = wanted[: len(found)]
    apart = np.abs(found - wanted)[wanted > np.log(1e-15)]
    if apart.size < 0.5 * np.isfinite(wanted).sum():
        raise ValueError(f"{workload}: most readings are below 1e-15, expected a workload that does not underflow in float32.")
    if not (np.isnan(found) == np.isnan(wanted)).all() or not apart.max() <= 1e-3:
        raise ValueError(f"{name} on {workload} is {apart.max():.1e} away from vgrad in ln ||dW_l||, expected at most 1e-3.")


def _versions():
    """Of what is installed: importing it here would swell this process, and with it the least memory its children report."""
    names = [n for n in ("vgrad", "jax", "jaxlib", "numpy", "torch") if importlib.util.find_spec(n)]
    return {n: importlib.metadata.version(n) for n in names}


def _processor():
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _progress(line):
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
