"""One chunk of a study, measured wherever it is sent.

A `Task` holds all that the numbers depend on, as plain values that travel to any process; `measure(task, chunk)` gives the arrays
of a chunk and changes nothing. All chunks have one shape, and activation and initializer are chosen by number inside the program,

    phi(z) = switch(point.phi)(z),      W = sigma_w * switch(point.weights)(key),

so that a process compiles once, whatever chunks it is given. Where the device has no room for a chunk, half as many cases are
tried at a time: the chunk is the same, only slower.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as Spec

from vgrad import initializers, losses
from vgrad.activations import get
from vgrad.base import Network, Profile
from vgrad.chunks import Chunk, Plan, chunks_of, make_plan
from vgrad.network import mlp
from vgrad.sweep import sweep

__all__ = ["PLAIN", "Task", "fields_of", "measure"]

PLAIN = "plain_float32_grad_w1"


class Task(NamedTuple):
    """What a study measures, and in which portions.

    Attributes:
      phis, draws: names of the activations and the initializers.
      points: one per point of the study: index into `phis`, index into `draws`, sigma_w.
      width, sigma_b: of the networks, with `out_dim` outputs.
      depths: increasing.
      key: root of the draws, an integer.
      x, t: the batch, NumPy arrays [B, in_dim] and [B] labels or [B, out_dim] targets.
      plan: how it is cut.
      batch_size: cases that go through the device at once, as for `vgrad.sweep`.
      x64: whether the numbers are float64.
    """

    phis: tuple[str, ...]
    draws: tuple[str, ...]
    points: tuple[tuple[int, int, float], ...]
    width: int
    sigma_b: float
    out_dim: int
    depths: tuple[int, ...]
    key: int
    x: np.ndarray
    t: np.ndarray
    plan: Plan
    batch_size: int | None
    x64: bool

    @property
    def loss(self):
        """Cross-entropy for labels, the squared error for targets."""
        return losses.cross_entropy if self.t.ndim == 1 else losses.squared_error


def fields_of(task: Task) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """What `measure` gives: for each field the shape of one case, and the dtype."""
    shape = (len(task.depths), task.depths[-1])
    return {name: (shape, np.dtype(np.float64)) for name in Profile._fields} | {PLAIN: ((), np.dtype(np.float32))}


def measure(task: Task, chunk: Chunk, *, mesh=None, most: int | None = None) -> tuple[dict[str, np.ndarray], int]:
    """The profiles of a chunk's cases, and what plain float32 says of them.

    Args:
      task, chunk: what to measure.
      mesh: devices to spread the cases over.
      most: cases to try at a time; None: the whole chunk.
    Returns:
      The fields of `fields_of`, each [points, seeds, ...] of the chunk; and how many cases at a time the device had room for.
    Raises:
      jax.errors.JaxRuntimeError: the device has no room for a single case.
    """
    most = most or task.plan.points_at_once * task.plan.seeds_at_once
    with jax.enable_x64(task.x64):  # a thread's and a process's own setting does not travel by itself
        while True:
            try:
                return _measured(task, chunk, mesh, most), most
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                if most == 1 or not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
                    raise
            most = max(1, min(most, task.batch_size or most) // 2)


def _measured(task, chunk, mesh, most):
    """All cases of a chunk, in portions of at most `most`, each of one shape: what is beyond the study's end is dropped."""
    family = _family(task.phis, task.draws, task.width, task.sigma_b, task.x.shape[1], task.out_dim)
    points: list[dict[str, Any]] = [{"phi": p[0], "weights": p[1], "sigma_w": p[2]} for p in task.points]
    portions = make_plan(task.plan.points_at_once, task.plan.seeds_at_once, most)
    num = [last - first for first, last in chunk]
    arrays = {name: np.empty((*num, *shape), dtype) for name, (shape, dtype) in fields_of(task).items()}
    fits = task.batch_size and min(most, task.batch_size)
    options: dict[str, Any] = dict(key=jax.random.key(task.key), batch=(task.x, task.t), loss=task.loss, mesh=mesh)
    for (p, _), (s, _) in chunks_of(portions):
        if p >= num[0] or s >= num[1]:
            continue
        grid = [points[min(chunk.points[0] + p + i, len(points) - 1)] for i in range(portions.points_at_once)]
        seeds = dict(first_seed=chunk.seeds[0] + s, num_seeds=portions.seeds_at_once)
        swept = sweep(family, grid, depths=task.depths, batch_size=fits, **seeds, **options)
        plain = _plain_float32(family, grid, depth=task.depths[-1], **seeds, **options)
        for name, values in (swept._asdict() | {PLAIN: plain}).items():
            into = arrays[name][p : p + portions.points_at_once, s : s + portions.seeds_at_once]
            into[...] = values[: into.shape[0], : into.shape[1]]
    return arrays


@functools.lru_cache(maxsize=8)  # jax's cache of compiled programs goes by the function: the same one for every chunk
def _family(phis, draws, width, sigma_b, in_dim, out_dim):
    """Networks whose activation and initializer are chosen by number, so that the whole study is one compiled program."""
    phis, draws = [get(phi) for phi in phis], [initializers.get(name) for name in draws]

    def choose(options, which, *args):
        return jax.lax.switch(jnp.asarray(which).astype(jnp.int32), options, *args)

    def network(point) -> Network:
        return mlp(
            width,
            lambda z: choose(phis, point["phi"], z),
            in_dim,
            out_dim,
            sigma_w=point["sigma_w"],
            sigma_b=sigma_b,
            weights=lambda key, shape, dtype: choose([lambda k, d=d: d(k, shape, dtype) for d in draws], point["weights"], key),
        )

    return network


def _plain_float32(family, grid, *, depth, first_seed, num_seeds, key, batch, loss, mesh):
    """||dJ/dW_1|| [points, seeds] of the very draws of the sweep, the way everybody computes it."""
    points = {name: np.asarray([p[name] for p in grid], np.float32) for name in grid[0]}
    shape, size = (len(grid), num_seeds), mesh.size if mesh else 1
    cases = np.indices(shape, np.int32).reshape(2, -1) + np.array([[0], [first_seed]], np.int32)
    padded = np.resize(cases.T, (math.ceil(cases.shape[1] / size) * size, 2))  # wraps around, as the sweep does
    return np.asarray(_plain_compiled(family, loss, depth, mesh, key, points, padded, batch))[: cases.shape[1]].reshape(shape)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _plain_compiled(family, loss, depth, mesh, key, points, cases, batch):
    def one(case):
        net = family({name: values[case[0]] for name, values in points.items()})
        params = net.init(jax.random.fold_in(key, case[1]), depth)
        return jnp.linalg.norm(jax.grad(lambda p: loss(net.forward(p, batch[0]), batch[1]))(params).embed.w)

    def all_of(cases):
        return jax.lax.map(one, cases)

    if mesh is None:
        return all_of(cases)
    rows = Spec(mesh.axis_names)
    return jax.shard_map(all_of, mesh=mesh, in_specs=(rows,), out_specs=rows, check_vma=False)(cases)
