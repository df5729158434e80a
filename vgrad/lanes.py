"""Lanes: cotangents of many networks that go down through the same layers together, and how one layer is taken.

The networks of one draw at depths d_1 < d_2 < ... share their first layers, so one forward pass serves all of them. The backward
pass carries one cotangent **lane** per depth,

    c_{l-1}[d] = block_l^T c_l[d],      lane d enters at its own last hidden layer,

and because all lanes meet the same weights at layer l, they make one large matrix product. Lanes that become large or small are
divided by a power of two that an integer exponent keeps (see `vgrad.scaled`): exact, at any depth.

Lanes are laid out as [G, B, N]: c @ W^T is then a plain two-dimensional product of [G B, N] with [N, N]. They go down in small
**groups** of neighbouring depths: the same compiled loops serve all groups, few lanes run idle, and a group stays in the cache.

What the backward pass needs of a layer is kept from the forward pass as long as that is little. Of a very deep network only every
K-th state is kept, and each **segment** of K layers is walked forward once more just before it is walked back.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vgrad.base import Block, Network
from vgrad.layers import affine_of, with_probe
from vgrad.scaled import Scaled, bare, change_if, headroom, log_ratio, norm, pow2, scale, sumsq, unit

__all__ = ["Lanes", "Stack", "carry", "descend", "group_size", "grouped", "linearise", "readout", "segment_length", "stack"]


_ROOM = 16  # lanes are left as they are while their squares sum up to 2^±16: far from where those leave the float range


class Lanes(NamedTuple):
    """Cotangents c * 2^e, one lane per network.

    Attributes:
      c: ordinary numbers. Shape [G, B, N].
      e: exponents, int32. Shape [G].
    """

    c: Any
    e: Any


class Stack(NamedTuple):
    """The hidden layers of one draw after the forward pass; functions of it, so not for the outside of a `jit`.

    Attributes:
      hidden: their parameters, stacked.
      tops: state z below the readout of each network, a `Scaled` with a leading axis D + 1, the last of which is void.
      segment: s -> what the linearisations of layers s K .. (s + 1) K - 1 keep, stacked on an axis of K.
      vjp_of: (parameters, kept) of one layer -> c -> (norms [5, 2], cotangent of its input).
      length: K.
    """

    hidden: Any
    tops: Scaled
    segment: Callable
    vjp_of: Callable
    length: int


def linearise(block: Block, params, h: Scaled, *, data: bool = False):
    """block(h), and the function from its cotangent to the norms [5, 2] seen on the way and, unless h is data, that of h."""

    def apply(probe, m=h.m):
        out = block.apply(with_probe(params, probe), Scaled(m, h.k))
        if not isinstance(out, Scaled):
            raise TypeError(f"apply returned {type(out).__name__} where it was given a Scaled.")
        return out.m, out.k

    affine_of(params)
    try:
        m, vjp, k = jax.vjp(apply, jnp.zeros((5, 2), h.m.dtype), *([] if data else [h.m]), has_aux=True)
    except TypeError as error:
        error.add_note(
            "vgrad: build the block from the operations of vgrad.layers, or wrap what is not one of them in layers.plain."
        )
        raise
    return Scaled(m, k), vjp


def stack(block: Block, hidden, z: Scaled, entries, length: int) -> Stack:
    """Walks z_1 up through the hidden layers.

    Args:
      hidden: parameters of L - 2 layers, stacked.
      entries: of each network, how many hidden layers lie below its readout. Shape [D], a NumPy array or one traced number.
      length: K; L - 2 keeps what all layers need, less walks every layer once more.
    """
    num, form = jax.tree.leaves(hidden)[0].shape[0], {}
    length = max(1, min(length, num))

    def one(z, p):
        z, vjp = linearise(block, p, z)
        leaves, form["tree"] = jax.tree.flatten(vjp)
        own = jax.tree.leaves(p)
        # A residual that is one of the layer's own parameters is there already: a second copy of all weights would cost more than
        # the pass itself.
        form["own"] = [next((i for i, q in enumerate(own) if q is leaf), None) for leaf in leaves]
        return z, [leaf for leaf, i in zip(leaves, form["own"], strict=True) if i is None]

    def vjp_of(p, kept):
        own, kept = jax.tree.leaves(p), iter(kept)
        return jax.tree.unflatten(form["tree"], [next(kept) if i is None else own[i] for i in form["own"]])

    # Networks leave at their entries; all other layers write to one slot more, which nobody reads.
    num_segments = -(-num // length)
    below = np.arange(num_segments * length + 1)
    if isinstance(entries, np.ndarray):
        slot = np.full(below.size, entries.size)
        slot[entries] = np.arange(entries.size)
    else:
        slot = below != entries
    slot = jnp.asarray(slot, jnp.int32)
    put = lambda slots, z, i: jax.tree.map(lambda a, v: lax.dynamic_update_index_in_dim(a, v, i, 0), slots, z)  # noqa: E731
    slots = put(jax.tree.map(lambda a: jnp.zeros((entries.shape[0] + 1, *a.shape), a.dtype), z), z, slot[0])

    def up(state, at):
        (z, slots), (p, i) = state, at
        z, kept = one(z, p)
        return (z, put(slots, z, i)), kept

    if num_segments < 2:
        (_, slots), kept = lax.scan(up, (z, slots), (hidden, slot[1:]))
        segment = lambda s: kept  # noqa: E731
    else:
        layers_of = lambda s: jnp.minimum(s * length + jnp.arange(length, dtype=jnp.int32), num - 1)  # noqa: E731

        def walk(state, at):
            s, i = at
            return lax.scan(lambda state, l: (up(state, (_at(hidden, l[0]), l[1]))[0], None), state, (layers_of(s), i))[0], state[0]

        # Where the last segment is not full it repeats the last layer, to no effect.
        which = jnp.arange(num_segments, dtype=jnp.int32)
        (_, slots), starts = lax.scan(walk, (z, slots), (which, slot[1:].reshape(num_segments, length)))
        segment = lambda s: lax.scan(lambda z, l: one(z, _at(hidden, l)), _at(starts, s), layers_of(s))[1]  # noqa: E731
    return Stack(hidden, slots, segment, vjp_of, length)


def segment_length(block: Block, hidden, z: Scaled) -> int:
    """K: all layers if what they need is less than half a GiB, else the square root of their number, which needs the least."""
    num = jax.tree.leaves(hidden)[0].shape[0]
    whole = sum(p.size for p in jax.tree.leaves(hidden)) + 64 * num * z.m.size  # more than any layer keeps, and soon said
    if whole * z.m.dtype.itemsize <= 2**29:
        return max(num, 1)
    layer = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), hidden)
    kept = jax.tree.leaves(jax.eval_shape(lambda z, p: linearise(block, p, z)[1], z, layer))
    weights = sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(layer))  # these are there in any case
    size = sum(a.size * a.dtype.itemsize for a in kept) - weights
    return num if num * size <= 2**29 else math.isqrt(num - 1) + 1


def grouped(a, size: int):
    """What belongs to each network, in the order of their depths, [D, ...], by the groups that go down together. [., size, ...].

    Cut from the deepest down; what is missing from the last group is made up by copies of the shallowest network.
    """
    xp: Any = np if isinstance(a, np.ndarray) else jnp
    missing = -len(a) % size
    return (xp.concatenate([a[:1]] * missing + [a]) if missing else a).reshape(-1, size, *a.shape[1:])


def group_size(entries: np.ndarray, lane: int) -> int:
    """How many lanes, of so many entries each, go down together.

    A larger group has more idle lanes, see `descend`, and a smaller one more steps. On CPU it should also stay in the cache: there
    a step costs what it costs to touch 2^12 entries, and 2^15 of them are as many as stay; an accelerator is idle below millions.
    Two may go together in any case: of wide layers it is the weights, which they share, that come from far.
    """
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and np.sum(entries + 1) <= 2**5:  # so few steps are not worth the larger program
        return 1
    step, most = (2**12, 2**15) if on_cpu else (2**20, 2**24)

    def cost(size):
        own = grouped(entries, size)
        meet, deepest = own[:, size // 2 - 1], own[:, -1]
        return np.sum((step + size * lane) * (meet + 1) + (step + (size - size // 2) * lane) * (deepest - meet))

    return min(range(1, min(len(entries), max(2, most // lane)) + 1), key=cost)


def readout(net: Network, params, z: Scaled, loss: Callable):
    """The lane that a network sends down from its readout, with the norms [5, 2] of the readout and the LogNorm [2] of z_L."""
    y, vjp = linearise(net.readout, params, z)
    lane = _loss_cotangent(lambda y: loss(net.output(y)), y)
    norms, c = vjp(lane.c)
    return _rescaled(c, lane.e), carry(norms, lane), jnp.stack(norm(y))


def descend(lanes: Lanes, entries, stack: Stack):
    """Takes lanes, which enter at `entries` [G], increasing, down to z_1.

    Returns:
      `Lanes` at z_1, and the norms [num_hidden, G, 5, 2] read on the way; zero above the deepest.
    """
    num_hidden, size = jax.tree.leaves(stack.hidden)[0].shape[0], entries.shape[0]
    read = jnp.zeros((num_hidden, size, 5, 2), lanes.c.dtype)
    if not num_hidden:  # nothing to index, not even in a loop of no steps
        return lanes, read
    bottom = jnp.zeros((), jnp.int32)
    if size < 2:
        return _walk(lanes, entries, stack, (lanes, read), entries[-1], bottom)
    # The deeper half goes ahead to where the others enter: few lanes run idle.
    half = size // 2
    ahead = jax.tree.map(lambda a: a[half:], lanes)
    ahead, above = _walk(ahead, entries[half:], stack, (ahead, read[:, half:]), entries[-1], entries[half - 1])
    state = jax.tree.map(lambda a, b: jnp.concatenate([a[:half], b]), lanes, ahead), read.at[:, half:].set(above)
    return _walk(lanes, entries, stack, state, entries[half - 1], bottom)


def _walk(lanes: Lanes, entries, stack: Stack, state, top, bottom):
    """State (lanes on their way, norms) from below layer `top` to below layer `bottom`; other lanes enter from `lanes`.

    One that has not entered yet goes along, and is replaced when it enters.
    """

    def unsettled(l, c):
        """Whether anything is to be done below layer l: to most layers nothing is."""
        sizes = jax.vmap(sumsq)(c)
        return jnp.any((sizes < 2.0**-_ROOM) | (sizes > 2.0**_ROOM)) | jnp.any(entries == l)  # NaN has no exponent, and is left

    def settle(l, state):
        """The lanes below layer l with entries of order 1, and in its place the network whose readout stands there."""
        c, e = state
        # Read off c itself, after the activation: two phi' of 1e-30 in a row are a reading still.
        by = unit(c, (1, 2))
        c, e, enters = scale(c, -by[:, None, None]), e + by, entries == l
        return Lanes(jnp.where(enters[:, None, None], lanes.c, c), jnp.where(enters, lanes.e, e))

    def layer(l, first, kept, state):
        (above, e), read = state
        norms, c = jax.vmap(stack.vjp_of(_at(stack.hidden, l), _at(kept, l - first)))(above)
        # A lane with NaN has none but NaN below, in any case. Said by its norm, so that the norms come before the new c, which can
        # then take the old one's memory: else c is copied at every layer.
        c = jnp.where(jnp.isnan(norms[:, :1, :1]), jnp.nan, c)
        read = lax.dynamic_update_index_in_dim(read, jax.vmap(carry)(norms, Lanes(above, e)), l, 0)
        return change_if(unsettled(l, c), partial(settle, l), Lanes(c, e)), read

    def segment(s, state):
        first, kept = s * stack.length, stack.segment(s)
        last = jnp.minimum(first + stack.length, top) - 1
        return lax.fori_loop(0, last + 1 - jnp.maximum(first, bottom), lambda i, state: layer(last - i, first, kept, state), state)

    if jax.tree.leaves(stack.hidden)[0].shape[0] <= stack.length:
        return segment(jnp.zeros((), jnp.int32), state)
    highest, lowest = (top + stack.length - 1) // stack.length, bottom // stack.length
    return lax.fori_loop(0, highest - lowest, lambda i, state: segment(highest - 1 - i, state), state)


def carry(norms, lane: Lanes):
    """The norms [5, 2] of a layer, from those that its probe read on one lane: the cotangent of the layer's output, in units of c.

    All but the last scale with the lane. The probe's delta is that of the affine map's own output: what the layer goes on to
    do to it, a factor or a normalisation, is part of the step down, so the delta of the layer is read off the lane.
    """
    e = lane.e.astype(norms.dtype)
    delta = jnp.stack([sumsq(lane.c), e])[None]
    return jnp.concatenate([delta, norms[1:] + e * jnp.asarray([[0, 1]] * 3 + [[0, 0]], norms.dtype)])


def _at(tree, l):
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, l, keepdims=False), tree)


def _rescaled(c, e):
    """One lane with its entries brought to order 1. Exact."""
    by = unit(c)
    return Lanes(scale(c, -by), e + by)


def _loss_cotangent(loss, y: Scaled):
    """dJ/dy at any magnitude of y: beyond the headroom, a power law fitted between two points within it.

    Of degree 1 for the squared error of an exploding output, 0 for the cross-entropy, and exact to rounding for both.
    """
    side, step = jnp.sign(y.k), 6
    edge = side * headroom(y.m.dtype)

    def at(state):
        """dJ/dy so many steps within the edge, and at the point before; one loop, so that the loss is compiled once."""
        steps, g, _ = state
        return steps - 1, jax.grad(loss)(pow2(y.m, edge - side * steps * step)), g

    zero = jnp.zeros_like(y.m)
    _, g, within = lax.while_loop(lambda state: state[0] >= 0, at, (jnp.abs(side), zero, zero))
    degree = jnp.round(log_ratio(norm(bare(g)), norm(bare(within))) / (step * jnp.log(2.0).astype(g.dtype)))
    degree = jnp.where(jnp.isfinite(degree), degree, 0).astype(jnp.int32)
    return _rescaled(g, degree * side * (y.k - edge))
