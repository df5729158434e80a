"""Sweeps: the profile of every network on a grid of points x seeds x depths, as one compiled program.

A **family** is a function from one grid point, a mapping of traced scalars, to a `Network`. What cannot be traced (phi, the width,
the initializer) is a plain Python loop around `sweep`, one compilation each. The seed s of every point starts from the same key,

    key_s = fold_in(key, s),

so points are compared on common random numbers, and adding points, seeds or depths leaves earlier results as they were.

    swept = vgrad.sweep(
        lambda point: vgrad.mlp(64, "tanh", 10, 3, sigma_w=point["sigma_w"]),
        {"sigma_w": [0.5, 1.0, 2.0]}, key=key, num_seeds=8, depths=range(2, 33), batch=(x, t), loss=loss)
    swept.log_delta   # [P, S, D, L] = [3, 8, 31, 32]
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from vgrad.base import Array, Network, Profile
from vgrad.profile import Readings, check_depths, check_loss, read, to_profile

__all__ = ["Family", "by_seed", "check_count", "grid_points", "measurement", "sweep"]

Family = Callable[[Mapping[str, Any]], Network]


def sweep(
    family: Family,
    grid: Mapping[str, Sequence] | Sequence[Mapping[str, Any]],
    *,
    key: Array,
    num_seeds: int,
    depths: Sequence[int],
    batch: tuple[Any, Any],
    loss: Callable,
    first_seed: int = 0,
    nested: bool = True,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Profile:
    """Profiles of all networks of a family on a grid, over seeds and depths.

    Args:
      family: from one grid point, a mapping of names to traced scalars, to a `Network`. Kept by the compilation cache: the same
        function swept again with the same shapes is not compiled again.
      grid: a mapping of names to values, for their Cartesian product with the last name running fastest; or a sequence of mappings,
        one per point.
      key: the root of all draws.
      num_seeds: seeds first_seed .. first_seed + num_seeds - 1 are measured: a long study is swept in parts.
      depths: increasing integers >= 2.
      batch: (x, t), with x of shape [B, in_dim]; shared by all networks.
      loss: (y, t) -> scalar.
      nested: the networks of one seed share their first layers over depth, and one pass measures them all; their profiles are then
        correlated over depth. False: independent networks, from fold_in(key_s, depth), at a pass each.
      batch_size: networks draws that go through the device at once; results do not depend on it. None: one on CPU, where that is
        fastest, and as many as fit 1 GiB elsewhere.
      mesh: shards points and seeds over its devices, which do not talk to each other. None: the default device.
    Returns:
      `Profile` of NumPy float64 arrays [P, S, D, L], L = max(depths). The readings are float32 numbers times powers of two, unless
        the caller enabled float64, but logarithms and their differences are taken in float64.
    Raises:
      ValueError: an empty grid, points that differ in their names, num_seeds or batch_size below 1, and whatever `profile` and the
        family raise for bad depths, x, labels, names and numbers.
    """
    check_count("num_seeds", num_seeds)
    options: dict[str, Any] = dict(key=key, batch=batch, loss=loss, nested=nested, batch_size=batch_size, mesh=mesh)
    measure, shape = measurement(family, grid, depths=depths, **options)
    readings = jax.device_get(measure(first_seed + np.arange(num_seeds)))
    return to_profile(jax.tree.map(lambda a: by_seed(np.asarray(a, np.float64), num_seeds, shape), readings), check_depths(depths))


def measurement(
    family: Family, grid, *, key: Array, depths, batch, loss: Callable, nested=True, batch_size: int | None = None, mesh=None
) -> tuple[Callable[..., Readings], tuple[int, int, int]]:
    """Checks the arguments, which are those of `sweep`.

    Returns:
      A function from seeds [S] to `Readings` of device arrays, which `by_seed` brings into the order [P, S, D, L]; and (P, D, L).
        With `room`, a number of seeds, at least so many are measured, some of them twice: calls of up to that size are one program.
    """
    points, depths = grid_points(grid), check_depths(depths)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    batch = jax.tree.map(jnp.asarray, tuple(batch))
    _check_points(family, points, batch, loss, key)
    stacked = {name: jnp.asarray([p[name] for p in points], jnp.result_type(float)) for name in points[0]}
    num_points = len(points)

    def measure(seeds, room=0):
        # One case per point and seed, and per depth where those are independent.
        which = (np.arange(num_points), seeds) if nested else (np.arange(num_points), seeds, np.asarray(depths))
        cases = [c.ravel() for c in np.meshgrid(*which, indexing="ij")]
        # Uneven counts wrap around, and what was computed twice is dropped.
        num, devices = cases[0].size // len(seeds) * max(len(seeds), room), 1 if mesh is None else mesh.size
        cases = [jnp.asarray(np.resize(c, math.ceil(num / devices) * devices), jnp.int32) for c in cases]
        return _compiled(family, loss, depths, batch_size, mesh, key, stacked, cases, batch)

    return measure, (num_points, len(depths), depths[-1])


def by_seed(a, num_seeds: int, shape: tuple[int, int, int]):
    """What `measurement` measured of so many seeds, as [P, S, D, L] and without what was measured twice."""
    num_points, num_depths, num_layers = shape
    networks = a.reshape(-1, num_layers)[: num_points * num_seeds * num_depths]
    return networks.reshape(num_points, num_seeds, num_depths, num_layers)


def grid_points(grid: Mapping[str, Sequence] | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points of a grid in the order of the axis P. Raises as `sweep` says."""
    if isinstance(grid, Mapping):
        axes = [np.atleast_1d(np.asarray(v)) for v in grid.values()]
        points = [dict(zip(grid, p, strict=True)) for p in itertools.product(*axes)] if axes else []
    else:
        points = [dict(p) for p in grid]
    if not points or not points[0]:
        raise ValueError(f"the grid is empty: {grid!r}; expected names with values, such as {{'sigma_w': [0.5, 1.0, 2.0]}}.")
    for p in points:
        if p.keys() != points[0].keys():
            raise ValueError(f"grid points with names {sorted(p)} and {sorted(points[0])}, expected the same ones everywhere.")
    return points


def check_count(name: str, n) -> None:
    """Raises ValueError for anything but an integer of at least 1."""
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"{name} is {n!r}, expected an integer of at least 1.")


def _check_points(family, points, batch, loss, key):
    """Builds the network of every point on its concrete numbers, so that a bad one is an error before anything is traced."""
    net: Any = None
    for p in points:
        net = family(p)
    if not isinstance(net, Network):
        raise TypeError(f"family returned {type(net).__name__}, expected a vgrad.Network: vgrad.mlp(...) or vgrad.stack(...).")
    check_loss(net, jax.eval_shape(lambda k: net.init(k, 2), key), batch, loss)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _compiled(family, loss, depths, batch_size, mesh, key, points, cases, batch):
    """`Readings` of arrays [C, D, L], one row per case."""
    depths = np.asarray(depths)
    one = partial(_case, family, loss, depths, key, points, batch)
    if batch_size is None:
        batch_size = 1 if jax.default_backend() == "cpu" else _fits(one, cases, 2**30)

    def all_of(cases):
        num = cases[0].shape[0]
        return lax.map(lambda c: one(*c), cases, batch_size=None if batch_size == 1 else min(batch_size, num))

    if mesh is None:
        return all_of(cases)
    rows = Spec(mesh.axis_names)
    return jax.shard_map(all_of, mesh=mesh, in_specs=(rows,), out_specs=rows, check_vma=False)(cases)


def _case(family, loss, depths, key, points, batch, point, seed, depth=None) -> Readings:
    net = family({name: values[point] for name, values in points.items()})
    key = jax.random.fold_in(key, seed)
    if depth is None:
        return read(net, net.init(key, int(depths[-1])), batch, loss=loss, depths=depths)
    params = net.init(jax.random.fold_in(key, depth), int(depths[-1]))
    return jax.tree.map(lambda a: a[0], read(net, params, batch, loss=loss, depths=depth[None]))


def _fits(one, cases, num_bytes):
    """How many cases go into that much memory, by the size of what one of them computes on the way."""
    jaxpr = jax.make_jaxpr(one)(*(c[0] for c in cases))
    largest = sorted((math.prod(v.aval.shape) * 4 for e in jaxpr.eqns for v in e.outvars), reverse=True)
    return max(1, num_bytes // max(1, sum(largest[:20])))
