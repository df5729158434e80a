"""Benchmark: what `vgrad.monitor` adds to a training step of a relu network of 12 layers of width 512 under Adam.

Target: under 2%. A reading is one pass over memory per array, and the products of a step take 6 B flop a parameter, B being its
rows; so A arrays take about (4 A / bandwidth) / (6 B / speed) of a step, less the more rows there are. A transformer's rows are its
tokens, thousands a step. The table says from how many rows on the target is met, reading every step and every tenth.

All variants take turns in blocks of ten steps in one process, starting from another one each round. Processor time counts, because
other users of the machine disturb it less than the clock on the wall, and of it the least over the rounds, of the block that they
disturbed least; a second plain variant shows what is left of the noise, and a bare sum over each gradient what any reading must
cost. Six minutes on two quiet cores, `--quick` (figures that mean nothing) half a minute.
"""

import dataclasses
import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from table import align, save

import vgrad

TARGET, BLOCK = 0.02, 10


def bare_sum():
    """Keeps one plain sum over each gradient and nothing else: what no reading of every step can do without."""
    sums = lambda tree: jax.tree.map(lambda g: jnp.sum(jnp.abs(g)), tree)  # noqa: E731
    return optax.GradientTransformation(sums, lambda updates, state, params=None: (updates, sums(updates)))


VARIANTS = {
    "plain, again": lambda: optax.adam(1e-3),
    "a bare sum over each gradient": lambda: optax.chain(bare_sum(), optax.adam(1e-3)),
    "monitor()": lambda: optax.chain(vgrad.monitor(), optax.adam(1e-3)),
    "monitor(every=10)": lambda: optax.chain(vgrad.monitor(every=10), optax.adam(1e-3)),
    'monitor(), monitor("update")': lambda: optax.chain(vgrad.monitor(), optax.adam(1e-3), vgrad.monitor("update")),
    'monitor(every=10), monitor("update", every=10)': lambda: optax.chain(
        vgrad.monitor(every=10), optax.adam(1e-3), vgrad.monitor("update", every=10)
    ),
}
TARGETED = {"monitor()", "monitor(every=10)"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and where the results go."""

    width: int = 512
    depth: int = 12
    batches: tuple[int, ...] = (256, 1024, 4096)
    rounds: int = 12
    quick: bool = False
    """Small sizes and three rounds. Nothing is written unless --out says where."""
    out: Path | None = None
    """The JSON file; the table goes beside it as Markdown. Default: results/monitor_overhead.json beside this script."""


def trainer(make, config, batch):
    """A function that trains on for a block of steps; compiled, with its buffers donated from step to step."""
    keys = jax.random.split(jax.random.key(0), config.depth)
    shape = (config.width, config.width)
    params: Any = [{"w": (2 / shape[0]) ** 0.5 * jax.random.normal(k, shape), "b": jnp.zeros(shape[1])} for k in keys]
    x, t = jax.random.normal(jax.random.key(1), (2, batch, config.width))
    optimizer = make()

    def loss(params):
        h = x
        for layer in params[:-1]:
            h = jax.nn.relu(h @ layer["w"] + layer["b"])
        return vgrad.losses.squared_error(h @ params[-1]["w"] + params[-1]["b"], t)

    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    compiled, state = jax.jit(step, donate_argnums=(0, 1)), optimizer.init(params)

    def block():
        nonlocal params, state
        for _ in range(BLOCK):
            params, state = compiled(params, state)
        jax.block_until_ready((params, state))

    block()
    return block


def timed(block):
    wall, cpu = time.perf_counter(), time.process_time()
    block()
    return (time.perf_counter() - wall) / BLOCK, (time.process_time() - cpu) / BLOCK


def run(config: Config) -> dict[str, Any]:
    """All measurements, as what the JSON file holds: seconds per step [rounds, 2] (wall, processor) by batch and variant."""
    if config.quick:
        config = dataclasses.replace(config, width=128, batches=(64,), rounds=3)
    seconds: dict[str, dict[str, Any]] = {}
    for batch in config.batches:
        blocks = {"plain": trainer(lambda: optax.adam(1e-3), config, batch)}
        blocks |= {name: trainer(make, config, batch) for name, make in VARIANTS.items()}
        taken: dict[str, list] = {name: [] for name in blocks}
        for i in range(config.rounds):
            names = list(blocks)
            for name in names[i % len(names) :] + names[: i % len(names)]:
                taken[name].append(timed(blocks[name]))
        seconds[str(batch)] = taken
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    return {"width": config.width, "depth": config.depth, "quick": config.quick, "seconds": seconds, "versions": versions,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "device": jax.devices()[0].device_kind, "processor": platform.machine()}  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """The table as Markdown, from the contents of the JSON file alone."""
    rows = [("rows", "variant", "step, ms", "overhead, processor", "overhead, wall", "median of rounds", "target < 2%")]
    rounds = 0
    for batch, by_name in result["seconds"].items():
        taken = {name: np.array(v) for name, v in by_name.items()}
        for name, each in taken.items():
            wall, cpu = 100 * (each.min(axis=0) / taken["plain"].min(axis=0) - 1)
            median, rounds = 100 * np.median(each[:, 1] / taken["plain"][:, 1] - 1), len(each)
            verdict = "" if name not in TARGETED or result["quick"] else "ok" if cpu < 100 * TARGET else "short"
            cells = (f"{cpu:+.1f}%", f"{wall:+.1f}%", f"{median:+.1f}%") if name != "plain" else ("", "", "")
            rows.append((batch, name, f"{1e3 * each[:, 1].min():.2f}", *cells, verdict))
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    warning = ["**A quick run of small sizes: no figure below means anything.**", ""] if result["quick"] else []
    return "\n".join([
        "# What a monitor adds to a training step", "",
        f"A relu network of {result['depth']} layers of width {result['width']} under Adam; {result['processor']}, "
        f"{result['cores']} cores, JAX on {result['device']}; {versions}. Step: processor time over all cores, the least of "
        f"{rounds} rounds of blocks of {BLOCK} steps that take turns; the median is that of the ratio within a round.", "",
        *warning, *align(rows), "",
        "A reading passes over memory once for each array, gradients and parameters, however many rows a step has; the bare "
        "sum is one pass over the gradients alone. The update monitor costs more: for it the updates are written to memory, "
        "which without it they are not, Adam and the addition being one loop.",
    ]) + "\n"  # fmt: skip


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    result = run(config)
    print(text := report(result))
    out = config.out or (None if config.quick else Path(__file__).parent / "results" / "monitor_overhead.json")
    if out is not None:
        save(result, text, out)


if __name__ == "__main__":
    main()
