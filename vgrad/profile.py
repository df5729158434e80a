"""Measuring a network: the log norms of every delta_l, dJ/dW_l, dJ/db_l and h_l, for many depths in one backward pass.

The networks of one draw at depths d_1 < d_2 < ... share their first layers, so one forward pass serves all of them. The backward
pass carries one cotangent **lane** per depth,

    c_{l-1}[d] = block_l^T c_l[d],      lane d enters at its own last hidden layer,

and because all lanes meet the same weights at layer l, they make one large matrix product. After every layer each lane is divided
by a power of two that an integer exponent keeps (see `vgrad.scaled`): exact, at any depth.

Lanes are laid out as [B, G, N]: c @ W^T is then a plain two-dimensional product of [B G, N] with [N, N]. They go down in small
**groups** of neighbouring depths: one compiled loop serves all groups, few lanes run idle, and a group stays in the cache.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vgrad.base import Array, Block, Network, Params, Profile
from vgrad.layers import affine_of, with_probe
from vgrad.network import check_depth, check_input
from vgrad.scaled import LogNorm, Scaled, exponent, headroom, lift, log, log_ratio, norm, pow2, reach, scale, tidy

__all__ = ["Readings", "check_depths", "check_loss", "profile", "read", "to_profile"]


class Readings(NamedTuple):
    """The norms behind a `Profile`, each a `LogNorm` of arrays [D, L]. `to_profile` takes their logarithms.

    Attributes:
      delta, grad_w, grad_b: norms of dJ/dz_l, dJ/dW_l, dJ/db_l.
      delta_in: norm of W_l^T delta_l, the cotangent of what layer l took in.
      h: norm of h_l, the input of layer l + 1; at the last layer of z_L.
    """

    delta: LogNorm
    grad_w: LogNorm
    grad_b: LogNorm
    delta_in: LogNorm
    h: LogNorm


def profile(
    net: Network, params: Params, batch: tuple[Array, Any], *, loss: Callable, depths: Sequence[int] | None = None
) -> Profile:
    """The gradient's profile over the layers of one draw of a network, at one or many depths, in one pass.

    Args:
      net: the network.
      params: its parameters, from `net.init(key, depth)`; depth bounds `depths`.
      batch: (x, t). x has shape [B, in_dim]; t is whatever `loss` takes.
      loss: (y, t) -> scalar, y being the [B, out_dim] outputs of the network. Any differentiable function.
      depths: which depths to measure, increasing integers from 2 to the depth of `params`. The network of depth d is the embedding,
        the first d - 2 hidden layers and the readout: exactly `net.init(key, d)`. None: the depth of `params` alone.
    Returns:
      `Profile` of arrays [D, L] with L = max(depths), in the float dtype of the parameters. Where the loss or the activation leaves
      the float range on its own (phi' < 1e-38), the reading has what is left: -inf if that is nothing.
    Raises:
      ValueError: depths that are empty, unsorted, repeated, below 2 or above that of `params`; x of the wrong shape; a loss that
        is not scalar; a block not made of `vgrad.layers`.  TypeError: depths that are not integers.
    """
    own = jax.tree.leaves(params.hidden)[0].shape[0] + 2
    depths = check_depths([own] if depths is None else depths, own)
    check_loss(net, params, batch, loss)
    return _compiled(net, params, batch, loss, depths)


# Compiled as a whole and once per (net, loss, depths), because primitive by primitive the same pass takes seconds.
@partial(jax.jit, static_argnums=(0, 3, 4))
def _compiled(net, params, batch, loss, depths):
    depths = np.asarray(depths)
    return to_profile(read(net, params, batch, loss=loss, depths=depths), depths)


def check_loss(net: Network, params: Params, batch, loss: Callable) -> None:
    """Raises unless `loss` makes a scalar of the outputs and the targets; a loss that looks at its targets may raise too."""
    x, t = batch
    check_input(params, x)
    y = jax.eval_shape(net.forward, params, x)
    J = jax.eval_shape(lambda y: loss(y, t), y)
    if jax.tree.structure(J) != jax.tree.structure(0) or J.shape != ():
        raise ValueError(f"loss returned {jax.tree.map(jnp.shape, J)}, expected a scalar: take the mean over the batch.")


def check_depths(depths: Sequence[int], own: int | None = None) -> tuple[int, ...]:
    """The depths as a tuple of ints. Raises as `profile` says."""
    depths = tuple(depths)
    if not depths:
        raise ValueError("depths is empty, expected at least one depth >= 2.")
    for d in depths:
        check_depth(d)
    depths = tuple(int(d) for d in depths)
    if any(a >= b for a, b in itertools.pairwise(depths)):
        raise ValueError(f"depths are {depths}, expected increasing ones without repeats: sorted(set(depths)).")
    if own is not None and depths[-1] > own:
        raise ValueError(f"depths go up to {depths[-1]}, but the parameters have depth {own}: draw net.init(key, {depths[-1]}).")
    return depths


def read(net: Network, params: Params, batch: tuple[Array, Any], *, loss: Callable, depths) -> Readings:
    """`profile` before its logarithms: `LogNorm`s [D, L], unmasked past a network's last layer.

    `depths` may also be a *traced* array of one depth; then L is the depth of `params`, and every layer is walked.
    """
    x, t = batch
    check_input(params, x)
    static = isinstance(depths, np.ndarray)
    num_hidden = (int(depths[-1]) - 2) if static else jax.tree.leaves(params.hidden)[0].shape[0]
    hidden = jax.tree.map(lambda p: p[:num_hidden], params.hidden)
    entries = jnp.asarray(depths, jnp.int32) - 2  # of each network, how many hidden layers lie below its readout

    z, embed_vjp = _linearise(net.embed, params.embed, lift(x))
    above, kept, vjp_of = _forward(net.block, hidden, z)
    states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), z, above)  # z_1 .. z_{L-1}

    def group(entries):
        """The norms [G, L, 5, 2] of a few networks, and of their z_L [G, 2]."""
        readout = lambda z: _readout(net, params.readout, z, lambda y: loss(net.output(y), t))  # noqa: E731
        lanes, top, z_top = jax.vmap(readout, out_axes=(_LANE, 0, 0))(jax.tree.map(lambda s: s[entries], states))
        lanes, below = _backward(lanes, entries, hidden, kept, vjp_of)
        _, first = jax.vmap(embed_vjp, in_axes=1)(lanes.c)
        # One row per layer; in row d of the network of depth d stands its readout.
        rows = jnp.concatenate([_carry(first, lanes.e)[None], below, jnp.zeros_like(first)[None]]).swapaxes(0, 1)
        is_top = jnp.arange(num_hidden + 2, dtype=jnp.int32)[None] == entries[:, None] + 1
        return jnp.where(is_top[:, :, None, None], top[:, None], rows), z_top

    num, size = entries.shape[0], _group_size(depths - 2, z.m.size) if static else 1
    # Groups are cut from the deepest down; what is missing from the last is made up by copies of the shallowest.
    norms, z_top = lax.map(group, jnp.pad(entries, (-num % size, 0), mode="edge").reshape(-1, size))
    norms, z_top = (a.reshape(-1, *a.shape[2:])[-num:] for a in (norms, z_top))
    is_top = jnp.arange(num_hidden + 2, dtype=jnp.int32)[None] == entries[:, None] + 1
    delta, grad_w, grad_b, delta_in, h_in = (tidy(LogNorm(norms[:, :, i, 0], norms[:, :, i, 1])) for i in range(5))
    # h_l is the input of layer l + 1; at the last layer stands z_L.
    h = LogNorm(*(jnp.where(is_top, z_top[:, i, None], jnp.roll(h_in[i], -1, axis=-1)) for i in range(2)))
    return Readings(delta, grad_w, grad_b, delta_in, h)


def to_profile(readings: Readings, depths) -> Profile:
    """Logarithms of the readings [..., D, L], masked past each network's last layer. In NumPy's precision if given NumPy arrays."""
    xp: Any = np if isinstance(readings.h.sumsq, np.ndarray) else jnp
    layer, depths = np.arange(1, readings.h.sumsq.shape[-1] + 1), np.asarray(depths)[:, None]

    def mask(v, top):
        """NaN above layer depth - top."""
        return xp.where(xp.broadcast_to(layer <= depths - top, v.shape), v, xp.asarray(np.nan, v.dtype))

    above = lambda n: LogNorm(*(xp.roll(a, -1, axis=-1) for a in n))  # noqa: E731
    return Profile(
        log_delta=mask(log(readings.delta), 0),
        log_grad_w=mask(log(readings.grad_w), 0),
        log_grad_b=mask(log(readings.grad_b), 0),
        log_h=mask(log(readings.h), 0),
        log_gain_w=mask(log_ratio(above(readings.delta_in), above(readings.delta)), 1),
        log_gain_phi=mask(log_ratio(readings.delta, above(readings.delta_in)), 1),
    )


class _Lanes(NamedTuple):
    """Cotangents c * 2^e, one lane per depth: c [B, D, N] with entries of order 1, e [D]."""

    c: Any
    e: Any


_LANE = _Lanes(1, 0)  # where vmap finds the lanes


def _rescaled(c, e):
    """One lane with its entries brought to order 1. Exact."""
    by = exponent(c)
    return _Lanes(pow2(c, -by), e + by)


def _carry(norms, e):
    """Norms [D, 5, 2] that were read on lanes of exponent e: all but the last belong to the cotangent."""
    return norms + e[:, None, None].astype(norms.dtype) * jnp.asarray([[[0, 1]] * 4 + [[0, 0]]], norms.dtype)


def _linearise(block: Block, params, h: Scaled):
    """block(h), and the function from its cotangent to that of h and the norms [5, 2] seen on the way."""

    def apply(m, probe):
        out = block.apply(with_probe(params, probe), Scaled(m, h.k))
        if not isinstance(out, Scaled):
            raise TypeError(f"apply returned {type(out).__name__} where it was given a Scaled.")
        return out.m, out.k

    affine_of(params)
    try:
        m, vjp, k = jax.vjp(apply, h.m, jnp.zeros((5, 2), h.m.dtype), has_aux=True)
    except TypeError as error:
        error.add_note(
            "vgrad: build the block from the operations of vgrad.layers, or wrap what is not one of them in layers.plain."
        )
        raise
    return Scaled(m, k), vjp


def _forward(block, hidden, h):
    """States after each hidden layer, what their linearisations keep, and a function that puts one together again."""
    form = {}

    def step(h, p):
        h, vjp = _linearise(block, p, h)
        leaves, form["tree"] = jax.tree.flatten(vjp)
        own = jax.tree.leaves(p)
        # A residual that is one of the layer's own parameters is there already: a second copy of all weights would cost more than
        # the pass itself.
        form["own"] = [next((i for i, q in enumerate(own) if q is leaf), None) for leaf in leaves]
        return h, (h, [leaf for leaf, i in zip(leaves, form["own"], strict=True) if i is None])

    _, (states, kept) = lax.scan(step, h, hidden)

    def vjp_of(p, kept):
        own, kept = jax.tree.leaves(p), iter(kept)
        return jax.tree.unflatten(form["tree"], [next(kept) if i is None else own[i] for i in form["own"]])

    return states, kept, vjp_of


def _readout(net, params, h, loss):
    """The lane that a network sends down from its readout, with the norms [5, 2] of the readout and the LogNorm [2] of z_L."""
    y, vjp = _linearise(net.readout, params, h)
    lane = _loss_cotangent(loss, y)
    c, norms = vjp(lane.c)
    return _rescaled(c, lane.e), _carry(norms[None], lane.e[None])[0], jnp.stack(norm(y))


def _loss_cotangent(loss, y: Scaled):
    """dJ/dy at any magnitude of y: beyond the headroom, a power law fitted between two points within it.

    Of degree 1 for the squared error of an exploding output, 0 for the cross-entropy, and exact to rounding for both.
    """
    edge, step = jnp.sign(y.k) * headroom(y.m.dtype), 6
    g, nearer = (jax.grad(loss)(pow2(y.m, edge - jnp.sign(y.k) * inside)) for inside in (0, step))
    degree = jnp.round(log_ratio(_norm(g), _norm(nearer)) / (step * jnp.log(2.0).astype(g.dtype)))
    degree = jnp.where(jnp.isfinite(degree), degree, 0).astype(jnp.int32) * jnp.sign(y.k)
    return _rescaled(g, degree * (y.k - edge))


def _norm(x):
    return norm(Scaled(x, jnp.zeros((), jnp.int32)))


def _group_size(entries: np.ndarray, lane: int) -> int:
    """How many lanes, of so many entries each, go down together.

    A group walks from its deepest entry, so a larger one has more idle lanes and a smaller one more steps. On CPU it should also
    stay in the cache: there a step costs what it costs to touch 2^12 entries, and 2^15 of them are as many as stay; an accelerator
    is idle below millions.
    """
    step, most = (2**12, 2**15) if jax.default_backend() == "cpu" else (2**20, 2**24)
    cost = lambda size: (step + size * lane) * sum(entries[::-1][::size] + 1)  # noqa: E731
    return min(range(1, max(1, min(len(entries), most // lane)) + 1), key=cost)


def _backward(lanes: _Lanes, entries, hidden, kept, vjp_of):
    """Takes lanes down to z_1. Returns them there, and the norms [num_hidden, G, 5, 2] read on the way; zero above the deepest."""
    num_hidden, top = jax.tree.leaves(hidden)[0].shape[0], jnp.max(entries)
    read = jnp.zeros((num_hidden, entries.shape[0], 5, 2), lanes.c.dtype)
    if not num_hidden:  # nothing to index, not even in a loop of no steps
        return lanes, read

    def admit(c, e, l):
        """The lanes below layer l, with the network in its place whose readout stands there."""
        enters = entries == l
        return _Lanes(jnp.where(enters[None, :, None], lanes.c, c), jnp.where(enters, lanes.e, e))

    def step(i, state):
        (c, e), read = state
        l = top - 1 - i
        vjp = vjp_of(*jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, l, keepdims=False), (hidden, kept)))
        c, norms = jax.vmap(vjp, in_axes=1, out_axes=(1, 0))(c)
        # Read off c itself, after the activation: two phi' of 1e-30 in a row are a reading still.
        by = jnp.clip(exponent(c, (0, 2), keepdims=True), -reach(c.dtype), reach(c.dtype))
        read = lax.dynamic_update_index_in_dim(read, _carry(norms, e), l, 0)
        return admit(scale(c, -by), e + by[0, :, 0], l), read

    return lax.fori_loop(0, top, step, (admit(jnp.zeros_like(lanes.c), jnp.zeros_like(lanes.e), top), read))
