"""What a loss sends down: the second moments of delta_L = dJ/dz_L over the random readout of a wide network.

Given the layers below, the outputs y of a batch are Gaussian, independent over the C units, with the covariance K of the samples
and a mean M that all units share. So for the squared error, delta_L = (y - t) / B,

    B^2 E delta_a . delta_b = C K_ab + sum_i (M_a - t_ai) (M_b - t_bi),

and for the cross-entropy, delta_L = (softmax(y) - onehot(t)) / B, whose units are exchangeable and whose sum over units is zero,

    B^2 E delta_a . delta_b = V_ab + [t_a = t_b] - 1 / C,    V_ab = E sum_i (p_ai - 1/C) (p_bi - 1/C).

V is a mean over fixed draws that are whitened: their covariance over samples is exactly the identity, so that V is exact for small
logits, where p is linear in y, and off by about 3 percent of itself at worst otherwise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp

from vgrad import losses
from vgrad.base import Array

__all__ = ["LOSSES", "Cotangent", "check_targets", "cotangent", "loss_name", "root_of"]

LOSSES = ("cross_entropy", "squared_error")
_MOST = 12 * float(np.log(10)) / 2  # ln of a std of 1e6: the softmax is a step by then


class Cotangent(NamedTuple):
    """The moments of delta_L.

    Attributes:
      log_norm: ln(E |delta_a|^2) / 2 of each sample. Shape [B].
      gram: E delta_a . delta_b over the two norms. Shape [B, B].
      coherent: E (sum_i delta_ai) (sum_i delta_bi) over the same. Shape [B, B].
      log_sq: ln |delta_a|^2 of each draw. Shape [num, B].
      sums: sum_i delta_ai of each draw over e^log_norm. Shape [num, B].
      pull: E (y_a . delta_a) (y_b . delta_b) over the norms of delta and the stds of y, y without its mean. Shape [B, B].
      cosine: E of the squared cosine between delta_a and delta_b. Shape [B, B].
      alignment: E (y . delta)^2 / |delta|^2 over K, mean over the batch, as `finite_width.backward` wants it. Shape [].
    """

    log_norm: Array
    gram: Array
    coherent: Array
    log_sq: Array
    sums: Array
    pull: Array
    cosine: Array
    alignment: Array


def loss_name(loss: str | Callable) -> str:
    """The name of a loss given by name or as the function of `vgrad.losses`; ValueError for another."""
    name = next((n for n in LOSSES if loss in (n, getattr(losses, n))), None)
    if name is None:
        raise ValueError(f"loss is {loss!r}, expected one of {', '.join(LOSSES)}: theory needs its cotangent's law.")
    return name


def check_targets(name: str, t, num: int, out_dim: int) -> None:
    """Raises unless t are targets that the loss takes for outputs of shape [num, out_dim]."""
    loss, y = getattr(losses, name), jax.ShapeDtypeStruct((num, out_dim), jnp.result_type(float))
    jax.eval_shape(lambda y: loss(y, t), y)


def cotangent(name: str, log_scale: Array, cov: Array, mean: Array, t: Any, out_dim: int) -> Cotangent:
    """The `Cotangent` of a loss.

    Args:
      name: of the loss.
      log_scale: ln of a scale for the outputs of each sample. Shape [B].
      cov, mean: of the outputs in that scale, shapes [B, B] and [B]; a unit's second moment is of order 1.
      t: labels [B], or targets [B, out_dim].
      out_dim: C, static.
    """
    num = cov.shape[0]
    draws = _draws(num, out_dim, cov.dtype, centred=name == "cross_entropy" and out_dim > 1)  # [M, C, B]
    y = jnp.einsum("mcb,ab->mca", draws, root_of(cov), precision="highest")
    if name == "cross_entropy":
        size = jnp.exp(jnp.minimum(log_scale, _MOST))
        p = jax.nn.softmax(y * size[None, None], axis=1)
        centred = (p - 1 / out_dim).reshape(-1, num)
        same = (t[:, None] == t[None]).astype(p.dtype) - 1 / out_dim
        gram = jnp.dot(centred.T, centred, precision="highest") / p.shape[0] + same
        coherent, unit = jnp.zeros_like(gram), jnp.zeros(num, cov.dtype)
        own = jax.nn.one_hot(t, out_dim, axis=0, dtype=p.dtype)[None]
        delta = p - own
        # Where the softmax saturates, 1 - p of the label is the sum of the others, and no difference.
        others = jax.nn.log_softmax(y * size[None, None], axis=1) + jnp.where(own > 0, -jnp.inf, 0.0)
        log_sq = jnp.logaddexp(logsumexp(2 * others, axis=1), 2 * logsumexp(others, axis=1))
    else:
        largest = jnp.sqrt(jnp.max(jnp.square(t), axis=1, initial=0.0))
        unit = jnp.maximum(log_scale, _log(largest))
        shrunk, target = jnp.exp(log_scale - unit), t * jnp.exp(-unit)[:, None]
        miss = (mean * shrunk)[:, None] - target
        spread = out_dim * cov * shrunk[:, None] * shrunk[None]
        gram = spread + jnp.dot(miss, miss.T, precision="highest")
        total = jnp.sum(miss, axis=1)
        coherent = spread + total[:, None] * total[None]
        delta = y * shrunk[None, None] + miss.T[None]
        log_sq = _log(jnp.sum(jnp.square(delta), axis=1)) + 2 * unit[None]
    norm = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1.0), 0.0)
    scale = inverse[:, None] * inverse[None]
    square = jnp.sum(jnp.square(delta), axis=1)  # [M, B]
    variance = jnp.maximum(jnp.diagonal(cov), jnp.finfo(cov.dtype).tiny)
    along = jnp.sum(y * delta, axis=1) * lax.rsqrt(variance)[None]
    pulls = along * inverse[None]
    direction = delta * lax.rsqrt(jnp.where(square > 0, square, jnp.inf))[:, None]
    cosines = jnp.einsum("mca,mcb->mab", direction, direction, precision="highest")
    log_batch = float(np.log(num))
    return Cotangent(
        log_norm=_log(norm) + unit - log_batch,
        gram=gram * scale,
        coherent=coherent * scale,
        log_sq=log_sq - 2 * log_batch,
        sums=jnp.sum(delta, axis=1) * inverse[None],
        pull=jnp.dot(pulls.T, pulls, precision="highest") / pulls.shape[0],
        cosine=jnp.mean(jnp.square(cosines), axis=0),
        alignment=jnp.mean(jnp.square(along) / jnp.where(square > 0, square, 1.0)),
    )


def root_of(cov: Array) -> Array:
    """A with A A^T = cov, for a matrix that may be singular. Shape [B, B]."""
    values, vectors = jnp.linalg.eigh(cov)
    return vectors * jnp.sqrt(jnp.maximum(values, 0))[None]


def _log(x):
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), -jnp.inf)


def _draws(num, out_dim, dtype, centred):
    """Fixed Gaussians [M, C, B], whitened over samples; of mean zero over the units where only differences matter."""
    count = int(np.clip(2**20 // (num * out_dim), -(-2 * num // out_dim), 4096))
    xi = jax.random.normal(jax.random.key(0), (count, out_dim, num), dtype)
    degrees = out_dim
    if centred:
        xi, degrees = xi - jnp.mean(xi, axis=1, keepdims=True), out_dim - 1
    flat = xi.reshape(-1, num)
    factor = jnp.linalg.cholesky(jnp.dot(flat.T, flat, precision="highest") / (count * degrees))
    return lax.linalg.triangular_solve(factor, flat, transpose_a=True, lower=True).reshape(xi.shape)
