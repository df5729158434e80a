"""Benchmark: what `vgrad.diagnose` costs beside the gradient of the same loss: compilation, run, memory.

Claim: about one gradient, and a compilation that grows in proportion to the sites, however a model is written. The gradient is
`jax.jit(jax.grad(loss_fn))` of the same function on the same arguments. Compilation is from the function to the executable, of
each once in this process; runs take turns, and the least of each is compared; memory is what the compiler says the program needs
beside its arguments and results. Three minutes on two cores, of which the compiler takes nearly all.
"""

import dataclasses
import importlib.metadata
import os
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from table import align, save

import vgrad
from vgrad.diagnose import instrumented
from vgrad.probes import zero_token

HEADS = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and where the results go."""

    rounds: int = 20
    quick: bool = False
    """Small models and three rounds: no figure that means anything. Nothing is written."""
    out: Path = Path(__file__).parent / "results" / "diagnose_cost.json"
    """The JSON file; the table goes beside it as Markdown."""


def mlp(depth, width, batch):
    """A relu network, written out: (loss_fn, params, args)."""
    keys = jax.random.split(jax.random.key(0), depth)
    params = [{"w": (2 / width) ** 0.5 * jax.random.normal(k, (width, width)), "b": jnp.zeros(width)} for k in keys]

    def loss_fn(params, x):
        for p in params:
            x = jax.nn.relu(x @ p["w"] + p["b"])
        return jnp.mean(jnp.square(x))

    return loss_fn, params, (jax.random.normal(jax.random.key(1), (batch, width)),)


def transformer(depth, width, batch, length, *, scanned=False):
    """A pre-LN transformer's blocks, written out or as one scan: (loss_fn, params, args)."""
    shapes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}

    def draw(key):
        keys = jax.random.split(key, len(shapes))
        return {name: jax.random.normal(k, s) / s[0] ** 0.5 for k, (name, s) in zip(keys, shapes.items(), strict=True)}

    def normalised(x):
        return (x - jnp.mean(x, -1, keepdims=True)) * lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5)

    def block(x, p):
        h = normalised(x)
        q, k, v = ((h @ p[name]).reshape(*x.shape[:2], HEADS, -1) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / (width // HEADS) ** 0.5)
        x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ p["o"]
        return x + jax.nn.gelu(normalised(x) @ p["up"]) @ p["down"]

    def loss_fn(params, x):
        if scanned:
            x, _ = lax.scan(lambda x, p: (block(x, p), None), x, params)
        else:
            for p in params:
                x = block(x, p)
        return jnp.mean(jnp.square(x))

    keys = jax.random.split(jax.random.key(0), depth)
    params = jax.vmap(draw)(keys) if scanned else [draw(k) for k in keys]
    return loss_fn, params, (jax.random.normal(jax.random.key(1), (batch, length, width)),)


MODELS = {
    "relu network, 12 layers of 512, 256 rows": partial(mlp, 12, 512, 256),
    "relu network, 96 layers of 128, 256 rows": partial(mlp, 96, 128, 256),
    "transformer, 6 blocks of 256, 8 x 64 tokens": partial(transformer, 6, 256, 8, 64),
    "transformer, 12 blocks of 256, 8 x 64 tokens": partial(transformer, 12, 256, 8, 64),
    "transformer, 24 blocks of 256, 8 x 64 tokens": partial(transformer, 24, 256, 8, 64),
    "the same 24 blocks, scanned": partial(transformer, 24, 256, 8, 64, scanned=True),
}
MODELS_QUICK = {"relu network": partial(mlp, 3, 16, 8), "scanned": partial(transformer, 2, 16, 2, 4, scanned=True)}


def run(config: Config) -> dict[str, Any]:
    """All measurements, as what the JSON file holds."""
    jax.jit(jnp.tanh)(1.0).block_until_ready()  # the compiler's own start is not counted
    rows = {}
    for name, make in (MODELS_QUICK if config.quick else MODELS).items():
        loss_fn, params, args = make()
        start = time.perf_counter()
        program, arrays = instrumented(loss_fn, params, args)
        operands = zero_token(), program.consts, program.leaves, arrays
        ours = program.measure.lower(*operands).compile()
        between = time.perf_counter()
        gradient = jax.jit(jax.grad(loss_fn)).lower(params, *args).compile()
        compiled = between - start, time.perf_counter() - between
        times: tuple[list, list] = [], []
        for i in range(-1, 3 if config.quick else config.rounds):
            for call, taken in zip((partial(ours, *operands), partial(gradient, params, *args)), times, strict=True):
                now = time.perf_counter()
                jax.block_until_ready(call())
                if i >= 0:
                    taken.append(time.perf_counter() - now)
        memory = [c.memory_analysis() for c in (ours, gradient)]
        rows[name] = {
            "sites": len(vgrad.diagnose(loss_fn, params, *args).site),
            "compile": compiled,
            "run": [min(t) for t in times],
            "temporary_mb": [m.temp_size_in_bytes / 2**20 if m is not None else None for m in memory],
        }
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {"rows": rows, "versions": versions, "device": jax.devices()[0].device_kind, "processor": platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """The table as Markdown, from the contents of the JSON file alone."""
    rows = [("model", "sites", "compile, s", "gradient", "run, ms", "gradient", "times", "temporary, MiB", "gradient")]
    for name, r in result["rows"].items():
        (ours, theirs), (c_ours, c_theirs) = r["run"], r["compile"]
        memory = ("", "") if None in r["temporary_mb"] else tuple(f"{m:.0f}" for m in r["temporary_mb"])
        times = f"{ours / theirs:.2f}"
        run = f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", times
        rows.append((name, str(r["sites"]), f"{c_ours:.1f}", f"{c_theirs:.1f}", *run, *memory))
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return "\n".join([
        "# What a diagnosis costs beside the gradient", "",
        f"{result['processor']}, {result['cores']} cores, JAX on {result['device']}; {versions}. Each figure of the diagnosis "
        "is followed by that of the gradient. Sites count every turn of a loop.", "",
        *align(rows), "",
        "Where a diagnosis is quicker than the gradient, its probes keep the compiler from fusing the sums of a residual "
        "stream into all that read them, over and over, which it does with the plain gradient of a model that is written out.",
    ]) + "\n"  # fmt: skip


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    result = run(config)
    print(text := report(result))
    if not config.quick:
        save(result, text, config.out)


if __name__ == "__main__":
    main()
