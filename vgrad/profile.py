"""Measuring a network: the log norms of every delta_l, dJ/dW_l, dJ/db_l and h_l, for many depths in one backward pass.

    z_1 .. z_{L-1} -> for each depth d its readout and dJ/dz_d -> all of them down to z_1 together,

reading norms at every layer on the way. How they go down together is the subject of `vgrad.lanes`, how numbers of any magnitude
are carried that of `vgrad.scaled`; here it is put together, from the arguments checked to the logarithms taken.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vgrad.base import Array, Network, Params, Profile
from vgrad.lanes import carry, descend, group_size, grouped, linearise, readout, segment_length, stack
from vgrad.network import check_depth, check_input
from vgrad.scaled import LogNorm, lift, log, log_ratio, tidy

__all__ = ["Readings", "check_depths", "check_loss", "profile", "read", "to_profile"]


class Readings(NamedTuple):
    """The norms behind a `Profile`, each a `LogNorm` of arrays [D, L]. `to_profile` takes their logarithms.

    Attributes:
      delta, grad_w, grad_b: norms of dJ/dz_l, dJ/dW_l, dJ/db_l.
      delta_in: norm of dJ by what W_l multiplies, through W_l alone; 0 at l = 1, which multiplies data.
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
      the float range on its own (phi' < 1e-38), the reading has what is left: -inf if that is nothing. It is read off a backward
      pass, and has no derivative itself.
    Raises:
      ValueError: depths that are empty, unsorted, repeated, below 2 or above that of `params`; x of the wrong shape; a loss that
        is not scalar; a block not made of `vgrad.layers`.  TypeError: depths that are not integers.
    """
    own = jax.tree.leaves(params.hidden)[0].shape[0] + 2
    depths = check_depths([own] if depths is None else depths, own)
    check_loss(net, params, batch, loss)
    return _compiled(_what_is_measured(net), params, batch, loss, depths)


def _what_is_measured(net: Any) -> Network:
    """The network without its draws: those of other weights share its program."""
    embed, block, readout = (b._replace(init=None) for b in (net.embed, net.block, net.readout))
    return net._replace(init=None, forward=None, embed=embed, block=block, readout=readout)


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


def read(
    net: Network, params: Params, batch: tuple[Array, Any], *, loss: Callable, depths, segment: int | None = None
) -> Readings:
    """`profile` before its logarithms: `LogNorm`s [D, L], unmasked past a network's last layer.

    `depths` may also be a *traced* array of one depth; then L is the depth of `params`, and every layer is walked upwards.
    `segment` is how many layers keep what the backward pass needs of them at a time, see `vgrad.lanes`; None: by memory.
    """
    x, t = batch
    check_input(params, x)
    static = isinstance(depths, np.ndarray)
    num_hidden = (int(depths[-1]) - 2) if static else jax.tree.leaves(params.hidden)[0].shape[0]
    hidden = jax.tree.map(lambda p: p[:num_hidden], params.hidden)
    entries = depths - 2  # of each network, how many hidden layers lie below its readout

    z, embed_vjp = linearise(net.embed, params.embed, lift(x), data=True)
    length = segment_length(net.block, hidden, z) if segment is None else segment
    below = stack(net.block, hidden, z, entries, length)

    def group(some):
        """The norms [G, L, 5, 2] of a few networks, z_L aside."""
        tops, entries, is_top = some
        lanes, top, z_top = jax.vmap(lambda z: readout(net, params.readout, z, lambda y: loss(y, t)))(tops)
        lanes, norms = descend(lanes, entries, below)
        (first,) = jax.vmap(embed_vjp)(lanes.c)
        # One row per layer; in row d of the network of depth d stands its readout.
        norms = jnp.concatenate([jax.vmap(carry)(first, lanes)[None], norms, jnp.zeros_like(first)[None]]).swapaxes(0, 1)
        norms = jnp.where(is_top[:, :, None, None], top[:, None], norms)
        # h_l is the input of layer l + 1; at the last layer stands z_L.
        h = jnp.where(is_top[:, :, None], z_top[:, None], jnp.roll(norms[:, :, 4], -1, axis=1))
        return jnp.concatenate([norms[:, :, :4], h[:, :, None]], axis=2)

    is_top = np.arange(num_hidden + 2)[None] == entries[:, None] + 1
    num, size = len(entries), group_size(entries, z.m.size) if static else 1
    each = jax.tree.map(lambda a: a[:num], below.tops), jnp.asarray(entries, jnp.int32), jnp.asarray(is_top)
    norms = lax.map(group, jax.tree.map(lambda a: grouped(a, size), each))
    norms = norms.reshape(-1, *norms.shape[2:])[-num:]  # [D, L, 5, 2]
    return Readings(*map(LogNorm, *tidy(LogNorm(*jnp.moveaxis(norms, (3, 2), (0, 1))))))


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
