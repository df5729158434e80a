"""Benchmark: what no arrangement of the medium workload's products can beat on this machine.

The other benchmarks hold this library against the rate of one *large* product. The products it is made of are smaller, and whoever
computes the same thing pays for them: here each is run alone, in a compiled loop over matrices that do not stay in the innermost
cache, on all devices at once, and counted as often as one draw of 64 depths needs it,

    c W^T and c c^T, once for each group of lanes and layer;   h W and h h^T, once a layer and readout;   W ~ N(0, 1).

Their sum is a floor: nothing elementwise, no norm, no rescaling, no loss. Half a minute on two cores.
"""

import dataclasses
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from jax.sharding import PartitionSpec
from table import align, save
from workloads import SIZES, SIZES_QUICK, nested_flops

from vgrad import cost
from vgrad.draws import standard_normal
from vgrad.lanes import group_size

COPIES = 16  # of every operand, so that it comes from where a layer's weights come from


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and where the results go."""

    calls: int = 2000
    """Products in a row."""
    quick: bool = False
    """A small workload and few calls: no figure that means anything. Nothing is written."""
    out: Path = Path(__file__).parent / "results" / "floor.json"
    """The JSON file; the table goes beside it as Markdown."""


def seconds(mesh, calls, function, *shapes):
    """Seconds of one call on each device, all of them busy: the least of five runs."""
    operands = [jax.random.normal(jax.random.key(i), (COPIES, *s)) for i, s in enumerate(shapes)]

    def loop(operands):
        def body(i, total):
            at = [lax.dynamic_index_in_dim(a, i % COPIES, keepdims=False) for a in operands]
            return total + function(i, *at)

        return lax.fori_loop(0, calls, body, jnp.zeros(()))[None]

    run = jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec("d"), check_vma=False))
    run(operands).block_until_ready()
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        run(operands).block_until_ready()
        taken.append(time.perf_counter() - start)
    return min(taken) / calls


def run(config: Config) -> dict[str, Any]:
    """All measurements, as what the JSON file holds."""
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    size = (SIZES_QUICK if config.quick else SIZES)["medium"]
    calls, n, b = (20 if config.quick else config.calls), size.width, size.batch
    depths = np.asarray(size.depths)
    lanes = group_size(depths - 2, b * n)
    dot = partial(jnp.matmul, precision="highest")
    corner = lambda a: a[0, 0]  # noqa: E731  a product is whole all the same: the compiler does not cut it, as it does elsewhere
    # Every lane goes from its network's readout to the first layer, which asks for no W^T c; none is idle.
    walked, layers = float(np.sum(depths)) / lanes, int(depths[-1]) - 1 + len(depths)
    each = {
        "c W^T, a group of lanes": (walked - len(depths) / lanes, lambda i, c, w: corner(dot(c, w.T)), (lanes * b, n), (n, n)),
        "c c^T, a group of lanes": (walked, lambda i, c: corner(dot(c, c.mT)[0]), (lanes, b, n)),
        "h W, a layer": (layers, lambda i, h, w: corner(dot(h, w)), (b, n), (n, n)),
        "h h^T, a layer": (layers, lambda i, h: corner(dot(h, h.T)), (b, n)),
        "W drawn": (int(depths[-1]), lambda i: jnp.sum(standard_normal(jax.random.key(i), (n, n)))),
    }
    rows = {name: (count, seconds(mesh, calls, f, *shapes)) for name, (count, f, *shapes) in each.items()}
    rate = cost.peak(mesh, 256 if config.quick else None) / mesh.size
    by_jax = seconds(mesh, calls, lambda i: jnp.sum(jax.random.normal(jax.random.key(i), (n, n))))
    return {"rows": rows, "drawn_by_jax": by_jax, "lanes": lanes, "flop": nested_flops(size) / size.seeds, "flops": rate,
            "seeds": size.seeds, "devices": mesh.size, "device": jax.devices()[0].device_kind, "jax": jax.__version__}  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """The table as Markdown, from the contents of the JSON file alone."""
    rows = [("what", "times", "microseconds", "milliseconds a draw")]
    for name, (count, s) in result["rows"].items():
        rows.append((name, f"{count:.0f}", f"{1e6 * s:.1f}", f"{1e3 * count * s:.2f}"))
    total = sum(count * s for count, s in result["rows"].values())
    count, each = result["rows"]["W drawn"]
    drawn, by_jax = count * each, result["drawn_by_jax"]
    bound, draws = result["flop"] / result["flops"], result["seeds"] / result["devices"]
    return "\n".join([
        "# What no arrangement of these products can beat", "",
        f"{result['devices']} x {result['device']}, jax {result['jax']}; one draw of the medium workload, {result['lanes']} lanes "
        "a group, on one device while all are busy.", "",
        *align(rows), "",
        f"Together {1e3 * total:.1f} ms a draw, {1e3 * (total - drawn):.1f} without drawing. At the rate of a large product, "
        f"{result['flops'] / 1e9:.0f} GFLOP/s a device, the same operations would take {1e3 * bound:.1f} ms: the floor is "
        f"{total / bound:.2f} times that bound, {(total - drawn) / bound:.2f} without drawing. The {result['seeds']} seeds of the "
        f"workload, drawn before, take {draws * (total - drawn):.2f} s at least, and {draws * bound:.2f} s at that rate. "
        f"`jax.random.normal` would take {1e6 * by_jax:.1f} microseconds for a W, {by_jax / each:.1f} times as long.",
    ]) + "\n"  # fmt: skip


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    result = run(config)
    print(text := report(result))
    if not config.quick:
        save(result, text, config.out)


if __name__ == "__main__":
    main()
