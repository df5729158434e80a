"""What a sweep costs, before it is run: arithmetic, memory, and what the device can do.

With all depths of a draw in one pass (`vgrad.profile`), width N, batch B, n hidden layers at the greatest depth and s(d) = d - 2
hidden layers at depth d, the matrix products of one case take

    flops = 2 B N^2 (n + sum_d s(d)) + 2 B N min(B, N) (n + sum_d s(d)) + ends,

forward once, backward a lane per depth, and the norms of dJ/dW_l from Gram matrices or from the gradient itself, whichever is
smaller. The time this takes at the rate of one large product is the bound to compare with; memory is planned from the same shapes.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from vgrad.network import AT_ONCE

__all__ = ["Shape", "at_once", "batch_size", "device_bytes", "flops", "memory", "peak", "result_bytes"]


class Shape(NamedTuple):
    """What the cost of one case, a draw at all depths, depends on."""

    depths: Sequence[int]
    width: int
    batch: int
    in_dim: int
    out_dim: int


def flops(shape: Shape) -> float:
    """Multiplications and additions in the matrix products of one case."""
    depths, n, b, i, o = shape
    hidden, lanes = max(depths) - 2, len(depths)
    layers = hidden + sum(d - 2 for d in depths)  # forward once, backward a lane per depth
    inner = 2 * b * n * n * layers + _norms(b, n, n, hidden, layers - hidden)
    ends = 2 * b * n * (i + o * 2 * lanes) + _norms(b, i, n, 1, lanes) + _norms(b, n, o, lanes, lanes)
    return float(inner + ends)


def _norms(b, fan_in, fan_out, maps, lanes):
    """||h^T c|| of so many affine maps and lanes: through [B, B] Gram matrices where those are smaller."""
    return 2 * b * b * (fan_in * maps + fan_out * lanes) if b < min(fan_in, fan_out) else 2 * b * fan_in * fan_out * lanes


def memory(shape: Shape, bytes_per_number: int = 4) -> float:
    """Bytes on the device while one case is measured: weights, what the layers keep for the way back, lanes, and readings."""
    depths, n, b, i, o = shape
    hidden, lanes = max(depths) - 2, len(depths)
    weights = hidden * n * n + n * (i + 2 * o)
    if hidden * n * (n + 1) <= AT_ONCE:  # with the pairs of numbers that they are cut from
        weights *= 2
    kept = hidden * b * (4 * n + min(b, n))
    moving = 8 * lanes * b * max(n, o) + b * i
    readings = 20 * lanes * max(depths)
    return float(bytes_per_number * (weights + kept + moving + readings))


def result_bytes(shape: Shape) -> float:
    """Bytes on the host for the result of one case on its way into a chunk: readings, float64 readings, and the profile twice."""
    return _cells(shape) * (10 * 4 + 10 * 8 + 2 * 6 * 8.0)


def device_bytes(device=None) -> float:
    """Memory of a device. On CPU its share of what the machine, or the control group it is confined to, has."""
    device = device or jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return _host_bytes() / jax.local_device_count()


def _host_bytes():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
            total = min(total, int(Path(limit).read_text()))
    return float(total)


def batch_size(shape: Shape, device=None) -> int | None:
    """How many cases go through a device at once, in half of its memory. None on CPU: one by one, which is fastest there."""
    device = device or jax.local_devices()[0]
    return None if device.platform == "cpu" else max(1, int(0.5 * device_bytes(device) / memory(shape)))


def at_once(shape: Shape, device=None) -> int:
    """Cases per chunk: some seconds of work, so that little is lost with a chunk, and results within a quarter of the memory."""
    device, num_devices = device or jax.local_devices()[0], jax.local_device_count()
    work = (1e11 if device.platform == "cpu" else 5e13) * num_devices / flops(shape)
    on_host, on_devices = _host_bytes() / result_bytes(shape), num_devices * device_bytes(device) / (10 * 4 * _cells(shape))
    return max(1, int(min(work, on_host / 4, on_devices / 4) / num_devices)) * num_devices


def _cells(shape):
    return len(shape.depths) * max(shape.depths)


def peak(mesh=None, size: int | None = None) -> float:
    """Measured flops per second of a large float32 product at full precision, on all devices of a mesh at the same time.

    Takes about a second. The best of a few, since whatever else the machine does can only slow it down.
    """
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
    size = size or (1024 if devices[0].platform == "cpu" else 8192)
    spec = NamedSharding(mesh or jax.sharding.Mesh(np.array(devices), ("devices",)), Spec(mesh.axis_names if mesh else "devices"))
    ones = jax.jit(lambda: jnp.ones((len(devices), size, size), jnp.float32), out_shardings=spec)()
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"), in_shardings=spec, out_shardings=spec)
    jax.block_until_ready(product(ones))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(product(ones))
        best = min(best, time.perf_counter() - start)
    return len(devices) * 2.0 * size**3 / best
