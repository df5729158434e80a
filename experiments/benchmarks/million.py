"""Benchmark: a million networks, 16,384 seeds x 64 depths (1..64 blocks) of width 128 on a batch of 64, all fields of the profile.

Claim: within 1.25 times the bound of the matrix products on CPU, and 2.5 times (40% of it) on an accelerator, where the million
takes under 10 s. The bound is the arithmetic of the nested algorithm over the rate of a large product on the same devices at the
same time and precision (full float32). Profiles are reduced on the fly by `vgrad.sweep_statistics`; drawing the networks is part of
the time. On CPU a fraction is run and extrapolated, and the fraction is printed; the table says whether each claim held.

Then weak scaling: the same number of seeds per device on 1, 2, 4, 8 virtual devices and per process on 1 and 2 processes. They
share the machine's cores, so beyond one per core the networks per second can at best stay. Four minutes on two cores.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import tyro
from table import align, save
from workloads import SIGMA_B, SIGMA_W, Size, nested_flops

HERE = Path(__file__).parent
PORTIONS = 16
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and where the results go."""

    seeds: int = 16_384
    """Seeds of the whole; times 64 depths."""
    fraction: float | None = None
    """Share of the seeds that is run. Default: 1/16 on CPU, all on an accelerator."""
    chunk: int | None = None
    """Seeds between two reductions. Default: 64 on CPU, 512 on an accelerator."""
    scaling: bool = True
    """Whether weak scaling is measured too; on CPU only."""
    quick: bool = False
    """Small networks: every code path in a minute, no figure that means anything. Nothing is written."""
    out: Path = HERE / "results" / "million.json"
    """The JSON file; the table goes beside it as Markdown."""


TINY = Config(seeds=64, fraction=0.25, chunk=8, scaling=False, quick=True)


def measure(size: Size, seeds: int, chunk: int) -> dict[str, Any]:
    """Cold and warm seconds in this process, on all of its devices, and the rate of their matrix products."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import vgrad

    mesh = jax.make_mesh((jax.device_count(),), ("cases",), axis_types=(jax.sharding.AxisType.Auto,))
    family = lambda point: vgrad.mlp(  # noqa: E731
        size.width, "tanh", size.width, size.width, sigma_w=point["sigma_w"], sigma_b=SIGMA_B
    )
    batch = np.random.default_rng(0).standard_normal((2, size.batch, size.width), dtype=np.float32)

    def run(num_seeds, first=0):
        start = time.perf_counter()
        statistics = vgrad.sweep_statistics(
            family, {"sigma_w": [SIGMA_W]}, key=jax.random.key(0), num_seeds=num_seeds, first_seed=first, depths=size.depths,
            batch=tuple(batch), loss=vgrad.losses.squared_error, chunk=chunk, mesh=mesh,
        )  # fmt: skip
        return time.perf_counter() - start, statistics

    place = lambda a, *axes: jax.device_put(a, jax.NamedSharding(mesh, jax.P(*axes)))  # noqa: E731
    a, b = place(np.ones((mesh.size, 4096, 1024), np.float32), "cases"), place(np.ones((1024, 1024), np.float32))
    product = jax.jit(jax.shard_map(
        lambda a, b: jnp.einsum("smk,kn->smn", a, b, precision="highest"), mesh=mesh,
        in_specs=(jax.P("cases"), jax.P()), out_specs=jax.P("cases"), check_vma=False,
    ))  # fmt: skip

    def products():
        """GFLOP/s of a large product, the median of a few."""
        times = []
        for _ in range(12):
            start = time.perf_counter()
            product(a, b).block_until_ready()
            times.append(time.perf_counter() - start)
        return 2e-9 * mesh.size * 4096 * 1024 * 1024 / float(np.median(times))

    cold, _ = run(chunk)
    products()
    num_chunks = max(1, round(seeds / chunk))
    portions, first, before = [], chunk, products()
    # In portions, with products between them: a shared machine is seldom as fast as it was a moment ago.
    for chunks in np.array_split(np.arange(num_chunks), min(PORTIONS, num_chunks)):
        taken, statistics = run(chunks.size * chunk, first)
        after = products()
        portions.append((chunks.size * chunk, taken, (before + after) / 2))
        first, before = first + chunks.size * chunk, after
    sizes, taken, rates = zip(*portions, strict=True)
    at_first = statistics.mean_log.log_grad_w
    return {
        "cold": cold, "warm": sum(taken), "seeds": sum(sizes), "portions": portions, "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind, "backend": jax.default_backend(), "jax": jax.__version__,
        "product_gflops": float(np.average(rates, weights=taken)),
        "ln_grad_w1": [float(at_first.value[0, -1, 0]), float(at_first.stderr[0, -1, 0])],
    }  # fmt: skip


def run(config: Config) -> dict[str, Any]:
    """All measurements, each in a process of its own."""
    size = Size(128, 64, list(range(2, 66)), config.seeds)
    size = size._replace(width=16, batch=8, depths=[2, 3, 5]) if config.quick else size
    job = {"size": size, "fraction": config.fraction, "chunk": config.chunk}
    whole = _processes(job, CORES, 1)
    result = {"config": dataclasses.asdict(config) | {"out": None}, "size": size._asdict(), "whole": whole[0], "cores": CORES}
    if config.scaling and whole[0]["backend"] == "cpu":
        portion = 1 / 16 if config.quick else 16 / config.seeds  # of the seeds, for each device
        result["devices"] = {n: _processes(job | {"fraction": n * portion, "chunk": 8 * n}, n, 1) for n in (1, 2, 4, 8)}
        result["processes"] = {n: _processes(job | {"fraction": portion, "chunk": 8}, 1, n) for n in (1, 2)}
    return result | {"processor": platform.processor() or platform.machine()}


def check(result: dict[str, Any]) -> None:
    """Raises unless the figures are there and make sense."""
    whole = result["whole"]
    if not whole["warm"] > 0 or not whole["product_gflops"] > 0 or not whole["ln_grad_w1"][1] > 0:
        raise ValueError(f"a figure is not positive: {whole}.")


def report(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    whole, size = result["whole"], Size(**result["size"])
    per_seed = whole["warm"] / whole["seeds"]
    seconds, bound = per_seed * size.seeds, nested_flops(size) / whole["product_gflops"] / 1e9
    ratios = sorted(taken / n * size.seeds * gflops * 1e9 / nested_flops(size) for n, taken, gflops in whole["portions"])
    cpu, networks = whole["backend"] == "cpu", size.seeds * len(size.depths)
    most = 1.25 if cpu else 2.5
    measured = [("times the bound of the products", f"<= {most}", seconds / bound, seconds / bound <= most)]
    measured += [] if cpu else [("seconds for the million", "<= 10", seconds, seconds <= 10)]
    lines = [
        f"# {networks:,} networks", "",
        f"{whole['devices']} x {whole['device']} ({whole['backend']}, {result['processor']}, {result['cores']} cores), "
        f"jax {whole['jax']}. Run: {whole['seeds']} of {size.seeds:,} seeds, {whole['seeds'] / size.seeds:.2%}, in "
        f"{whole['warm']:.1f} s; **the whole: {seconds:.0f} s{'' if whole['seeds'] == size.seeds else ', extrapolated'}**. "
        f"Bound of the products: {bound:.0f} s ({nested_flops(size) / 1e12:.0f} TFLOP at {whole['product_gflops']:.0f} GFLOP/s, "
        f"measured before, between and after {len(ratios)} portions of the run: {ratios[0]:.2f} to {ratios[-1]:.2f} times the "
        f"bound each). First call, with compilation: {whole['cold']:.1f} s. "
        f"{networks / seconds:,.0f} networks a second.", "",
        *align([("claim", "wanted", "measured", ""), *((a, b, f"{c:.2f}", "ok" if d else "short") for a, b, c, d in measured)]),
    ]  # fmt: skip
    rows = [("weak scaling", "networks a second", "per device or process")]
    for kind in ("devices", "processes"):
        for n, each in result.get(kind, {}).items():
            rate = sum(r["seeds"] / r["warm"] for r in each) * len(size.depths)
            rows.append((f"{n} {kind if int(n) > 1 else kind.removesuffix('es' if kind == 'processes' else 's')}", f"{rate:,.0f}",
                         f"{rate / int(n):,.0f}"))  # fmt: skip
    return "\n".join([*lines, "", *(align(rows) if len(rows) > 1 else []), "",
                      f"All devices and processes share {result['cores']} cores."]) + "\n"  # fmt: skip


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    result = run(config)
    check(result)
    text = report(result)
    print(text)
    if not config.quick:
        save(result, text, config.out)


def _processes(job, devices, num):
    """The results of `num` processes at once, each with so many virtual CPU devices."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, str(HERE / "million.py"), "--job", json.dumps(job)]
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(num)]
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError(f"a process for {job} failed; its message is above.")
    return [json.loads(out) for out in outputs]


def _child(job):
    import jax

    warnings.filterwarnings("ignore", "log_mean_sq is carried")  # what is measured is the time
    cpu, size = jax.default_backend() == "cpu", Size(*job["size"])
    fraction = job["fraction"] or (1 / 16 if cpu else 1)
    chunk = job["chunk"] or (64 if cpu else 512)
    print(json.dumps(measure(size, round(size.seeds * fraction), chunk)))


if __name__ == "__main__":
    if "--job" in sys.argv:
        _child(json.loads(sys.argv[-1]))
    else:
        main()
