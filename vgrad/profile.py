"""Measuring a network: the log norms of every delta_l, dJ/dW_l, dJ/db_l and h_l, for many depths in one backward pass.

The networks of one draw at depths d_1 < d_2 < ... share their first layers, so one forward pass serves all of them. The backward
pass carries one cotangent **lane** per depth,

    c_{l-1}[d] = block_l^T c_l[d],      lane d enters at its own last hidden layer,

and because all lanes meet the same weights at layer l, they make one large matrix product. After every layer each lane is divided
by a power of two that an integer exponent keeps (see `vgrad.scaled`): exact, at any depth.

Lanes are laid out as [B, D, N]: c @ W^T is then a plain two-dimensional product of [B D, N] with [N, N]. A few static **segments**
of growing lane count avoid most of the work on lanes that have not entered yet.
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
    lanes, top, z_top = jax.vmap(
        lambda z: _readout(net, params.readout, z, lambda y: loss(net.output(y), t)), out_axes=(_LANE, 0, 0)
    )(jax.tree.map(lambda s: s[entries], states))
    lanes, below = _backward(lanes, entries, hidden, kept, vjp_of, _segments(depths - 2) if static else [(0, num_hidden, 1)])
    _, first = jax.vmap(embed_vjp, in_axes=1)(lanes.c)

    # One row per layer, [D, L, 5, 2]; in row d of the network of depth d stands its readout.
    rows = jnp.concatenate([_carry(first, lanes.e)[None], below, jnp.zeros_like(first)[None]]).swapaxes(0, 1)
    is_top = jnp.arange(num_hidden + 2, dtype=jnp.int32)[None] == entries[:, None] + 1
    norms = jnp.where(is_top[:, :, None, None], top[:, None], rows)
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


def _segments(entries: np.ndarray) -> list[tuple[int, int, int]]:
    """Cuts the hidden layers into runs (lo, hi, lanes), top first, so that as few lanes as possible run idle.

    Each run is compiled apart, so there is one more only where it saves a twentieth of the work, and at most one per eight layers.
    """
    cuts = [0, *(int(e) for e in entries if e > 0)]
    n, most = len(cuts) - 1, max(1, min(8, cuts[-1] // 8))
    if not n:
        return []
    cost = lambda i, j: (cuts[j] - cuts[i]) * (n - i)  # noqa: E731  # layers times lanes of a run from cut i to cut j
    best = [(0, [])] + [(cost(0, j), [0]) for j in range(1, n + 1)]  # for cuts[0..j]: least cost, and where its runs start
    for _ in range(min(most, n) - 1):
        more = [min([best[j], *((best[i][0] + cost(i, j), [*best[i][1], i]) for i in range(1, j))]) for j in range(n + 1)]
        if more[n][0] > 0.95 * best[n][0]:
            break
        best = more
    starts = best[n][1]
    return [(cuts[i], cuts[j], n - i) for i, j in zip(starts, [*starts[1:], n], strict=True)][::-1]


def _backward(lanes: _Lanes, entries, hidden, kept, vjp_of, segments):
    """Takes the lanes down to z_1. Returns them there, and the norms [num_hidden, D, 5, 2] read on the way, by layer upwards."""
    # Deepest first, so that the lanes of a segment are the first few and new ones are appended.
    waiting, entry = _Lanes(lanes.c[:, ::-1], lanes.e[::-1]), entries[::-1]
    num, batch, width = entry.shape[0], *lanes.c.shape[::2]
    c, e, read = lanes.c[:, :0], lanes.e[:0], [jnp.zeros((0, num, 5, 2), lanes.c.dtype)]
    for lo, hi, active in segments:
        c = jnp.concatenate([c, jnp.zeros((batch, active - c.shape[1], width), c.dtype)], axis=1)
        e = jnp.concatenate([e, jnp.zeros(active - e.shape[0], e.dtype)])

        def admit(c, e, l, active=active):
            """The lanes below layer l, with the one network in its place whose readout stands there."""
            enters = entry[:active] == l
            i = jnp.argmax(enters)
            return _Lanes(jnp.where(enters[None, :, None], waiting.c[:, i, None], c), jnp.where(enters, waiting.e[i], e))

        def step(lanes, l, admit=admit):
            c, e = lanes
            vjp = vjp_of(*jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, l, keepdims=False), (hidden, kept)))
            c, norms = jax.vmap(vjp, in_axes=1, out_axes=(1, 0))(c)
            # Read off c itself, after the activation: two phi' of 1e-30 in a row are a reading still.
            by = jnp.clip(exponent(c, (0, 2), keepdims=True), -reach(c.dtype), reach(c.dtype))
            return admit(scale(c, -by), e + by[0, :, 0], l), _carry(norms, e)

        (c, e), norms = lax.scan(step, admit(c, e, hi), jnp.arange(lo, hi, dtype=jnp.int32), reverse=True)
        read.append(jnp.pad(norms, ((0, 0), (0, num - active), (0, 0), (0, 0))))
    idle = jnp.zeros((batch, num - c.shape[1], width), c.dtype)
    at_z1 = entry == 0  # a network of depth 2 has no hidden layer to walk
    c = jnp.where(at_z1[None, :, None], waiting.c, jnp.concatenate([c, idle], axis=1))
    e = jnp.where(at_z1, waiting.e, jnp.concatenate([e, jnp.zeros(num - e.shape[0], e.dtype)]))
    return _Lanes(c[:, ::-1], e[::-1]), jnp.concatenate(read[::-1])[:, ::-1]
