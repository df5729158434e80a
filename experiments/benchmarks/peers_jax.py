"""This library, and three peers in JAX. All walk the seeds in the same way, so that only the algorithm differs.

Of vmap and `lax.map` over seeds, on one device and sharded over one virtual CPU device a core, `lax.map` and sharded was the
fastest for every program here on the medium workload; on an accelerator all seeds go at once.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from workloads import SIGMA_B, SIGMA_W, Size, Weights, layers_of

import vgrad
from vgrad.profile import read, to_profile

ON_CPU = jax.default_backend() == "cpu"


def full_profile(size: Size, weights: Weights):
    """All six fields of `vgrad.Profile`, of networks already drawn."""
    net = vgrad.mlp(size.width, "tanh", size.width, size.width)
    batch = jnp.asarray(weights.x), jnp.asarray(weights.t)
    depths = np.asarray(size.depths)
    over_seeds, place = _seeds(len(weights.w))
    part = lambda l: vgrad.Affine(place(weights.w[:, l]), place(weights.b[:, l]))  # noqa: E731
    params = vgrad.Params(part(0), part(slice(1, -1)), part(-1))
    f = over_seeds(lambda p: to_profile(read(net, p, batch, loss=vgrad.losses.squared_error, depths=depths), depths))
    return lambda: jax.device_get(f(params)).log_grad_w


def sweep(size: Size, weights: Weights):
    """The same through `vgrad.sweep`, which draws the networks itself, in the measured time."""
    family = lambda point: vgrad.mlp(  # noqa: E731
        size.width, "tanh", size.width, size.width, sigma_w=point["sigma_w"], sigma_b=SIGMA_B
    )
    measure = partial(
        vgrad.sweep, family, {"sigma_w": [SIGMA_W]}, key=jax.random.key(0), num_seeds=size.seeds, depths=size.depths,
        batch=(weights.x, weights.t), loss=vgrad.losses.squared_error, mesh=_mesh(size.seeds),
    )  # fmt: skip
    return lambda: measure().log_grad_w[0]


def unrolled(size: Size, weights: Weights):
    """One jit(grad) a depth over a list of layers, norms inside, so that no gradient leaves the program."""
    x, t = jnp.asarray(weights.x), jnp.asarray(weights.t)

    def loss(w, b):
        z = x @ w[0] + b[0]
        for w_l, b_l in zip(w[1:], b[1:], strict=True):
            z = jnp.tanh(z) @ w_l + b_l
        return 0.5 * jnp.sum(jnp.square(z - t)) / size.batch

    over_seeds, place = _seeds(len(weights.w))
    w, b = ([place(a[:, l]) for l in range(a.shape[1])] for a in (weights.w, weights.b))
    f = over_seeds(lambda p: jnp.stack([_log_norm(g) for g in jax.grad(loss)(*p)]))
    return lambda: _gather(size, [f(([w[l] for l in of], [b[l] for l in of])) for of in map(layers_of, size.depths)])


def scan(size: Size, weights: Weights):
    """One jit(grad) a depth of a `lax.scan` over its layers."""
    x, t = jnp.asarray(weights.x), jnp.asarray(weights.t)

    def loss(first, hidden, last):
        z, _ = lax.scan(lambda z, p: (jnp.tanh(z) @ p[0] + p[1], None), x @ first[0] + first[1], hidden)
        return 0.5 * jnp.sum(jnp.square(jnp.tanh(z) @ last[0] + last[1] - t)) / size.batch

    def log_norms(depth, p):
        first, hidden, last = (jax.tree.map(lambda a: a[l], p) for l in (0, slice(1, depth - 1), -1))
        first, hidden, last = jax.grad(loss, (0, 1, 2))(first, hidden, last)
        return jnp.concatenate([_log_norm(first[0])[None], _log_norm(hidden[0]), _log_norm(last[0])[None]])

    over_seeds, place = _seeds(len(weights.w))
    params = place(weights.w), place(weights.b)
    fs = [over_seeds(partial(log_norms, d)) for d in size.depths]
    return lambda: _gather(size, [f(params) for f in fs])


def masked(size: Size, weights: Weights):
    """One program for all depths: a scan over all layers, of which those a network lacks hand z on unchanged."""
    x, t, depths = jnp.asarray(weights.x), jnp.asarray(weights.t), jnp.asarray(size.depths)
    num_hidden = size.depths[-1] - 2

    def loss(w, b, depth):
        def step(z, p):
            l, w_l, b_l = p
            return jnp.where(l < depth, jnp.tanh(z) @ w_l + b_l, z), None

        z, _ = lax.scan(step, x @ w[0] + b[0], (2 + jnp.arange(num_hidden), w[1:-1], b[1:-1]))
        return 0.5 * jnp.sum(jnp.square(jnp.tanh(z) @ w[-1] + b[-1] - t)) / size.batch

    over_seeds, place = _seeds(len(weights.w))
    f = over_seeds(lambda p: lax.map(lambda d: _log_norm(jax.grad(loss)(*p, d)), depths))
    params = place(weights.w), place(weights.b)

    def measure():
        rows = np.asarray(f(params))
        return _gather(size, [rows[:, i, layers_of(d)] for i, d in enumerate(size.depths)])

    return measure


_compiled: list = []


def program_mb() -> float | None:
    """MiB a device needs for the largest of the programs that were run: arguments, results and what is between."""
    each = [m for m in (c.memory_analysis() for c in _compiled) if m is not None]
    bytes_of = lambda m: m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes  # noqa: E731
    return max(map(bytes_of, each)) / 2**20 if each else None


def _mesh(num_seeds):
    num = math.gcd(num_seeds, len(jax.devices()))
    return jax.make_mesh((num,), ("S",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:num])


def _seeds(num_seeds):
    """A transformation from a function of one seed's pytree to that of all of them, and how to put those on the devices."""
    mesh, rows = _mesh(num_seeds), PartitionSpec("S")

    def over_seeds(one):
        run = partial(lax.map, one) if ON_CPU else jax.vmap(one)
        program, compiled = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)), {}

        def call(params):
            depth = jax.tree.structure(params)
            if depth not in compiled:
                compiled[depth] = program.lower(params).compile()
                _compiled.append(compiled[depth])
            return compiled[depth](params)

        return call

    return over_seeds, lambda a: jax.device_put(a, NamedSharding(mesh, rows))


def _log_norm(g):
    return jnp.log(jnp.sqrt(jnp.sum(jnp.square(g), axis=(-2, -1))))


def _gather(size, by_depth):
    """[S, d] for each depth d -> [S, D, L], NaN past the last layer."""
    out = np.full((by_depth[0].shape[0], len(size.depths), size.depths[-1]), np.nan, np.float32)
    for i, (depth, norms) in enumerate(zip(size.depths, by_depth, strict=True)):
        out[:, i, :depth] = norms
    return out


def product(a: np.ndarray, b: np.ndarray):
    """A function that multiplies them once and waits for the result."""
    left, right, multiply = jnp.asarray(a), jnp.asarray(b), jax.jit(jnp.matmul)
    return lambda: multiply(left, right).block_until_ready()


def device() -> str:
    return jax.devices()[0].device_kind
