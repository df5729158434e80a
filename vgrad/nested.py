"""Predictions for many depths in one pass, as `vgrad.profile` measures them: for a curve over depth.

Networks of depths d_1 < d_2 < ... share the law of their layers, so the covariances go up once,

    K_1 = sigma_w^2 x x^T / in_dim + sigma_b^2,    K_{l+1} = sigma_w^2 E phi(u_a) phi(u_b) + sigma_b^2,

and those of the cotangents come down with one lane per depth, which enters at its own readout, whose outputs have the covariance
K_d. Layer by layer the same as `vgrad.prediction`, without its fluctuations between networks; a tenth of the work.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp

from vgrad import activations, kernels, readout
from vgrad.base import Array
from vgrad.moments import AnyPhi

__all__ = ["ZERO_MEAN", "NestedPrediction", "predict_depths"]

# Initializers whose mean-field law is that of Gaussian weights with the std sigma_w / sqrt(fan_in).
ZERO_MEAN = ("normal", "uniform", "truncated_normal", "orthogonal", "lecun", "xavier_fan_in")


class NestedPrediction(NamedTuple):
    """ln(E ||.||^2) / 2 of Frobenius norms over the batch, as the fields of `Profile`. Shape [P, D, L], NaN past a last layer."""

    log_delta: Array
    log_grad_w: Array
    log_grad_b: Array
    log_h: Array


def predict_depths(
    phi: AnyPhi, batch: tuple[Any, Any], *, width: int, depths: Sequence[int], out_dim: int, sigma_w, sigma_b=0.0, loss: str
) -> NestedPrediction:
    """What theory says of networks with weights of mean zero, at several sigma_w and depths, in one compiled program.

    Args:
      phi: activation.  batch: (x, t), as for `predict`.
      width: units per hidden layer.  depths: increasing integers from 2.  out_dim: outputs.
      sigma_w: weight stds times sqrt(fan_in). Shape [P].  sigma_b: of the biases. Shape [].
      loss: "cross_entropy" or "squared_error".
    Returns:
      `NestedPrediction`, in the limit of infinite width: see `prediction.predict`, which has the typical network too.
    Raises:
      ValueError: depths that do not increase from at least 2, an unknown loss.
    """
    depths = tuple(int(d) for d in depths)
    if not depths or depths[0] < 2 or list(depths) != sorted(set(depths)):
        raise ValueError(f"depths are {depths}, expected increasing ones of at least 2.")
    dtype = jnp.result_type(float)
    x, t = (jnp.asarray(a) for a in batch)
    t = t.astype(dtype) if readout.loss_name(loss) == "squared_error" else t
    sigmas = jnp.atleast_1d(jnp.asarray(sigma_w, dtype)), jnp.asarray(sigma_b, dtype)
    return _compiled(activations.facts(phi), readout.loss_name(loss), width, depths, out_dim, x.astype(dtype), t, *sigmas)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _compiled(act, loss, width, depths, out_dim, x, t, sigma_w, sigma_b):
    powers = kernels.powers(act, x.dtype)
    one = partial(_one, act, loss, width, np.asarray(depths), out_dim, powers, x, t, kernels.log(sigma_b))
    return lax.map(one, sigma_w)


def _one(act, loss, width, depths, out_dim, powers, x, t, log_bias, sigma):
    num, zero = x.shape[0], jnp.zeros(x.shape[0], x.dtype)
    gain = jnp.stack([0 * sigma, sigma])
    norm = jnp.linalg.norm(x, axis=1)
    gram, gain = jnp.dot(x, x.T, precision="highest"), jnp.stack([jnp.zeros_like(sigma), sigma])
    first = kernels.layer(kernels.log(norm), sigma**2 * kernels.over(gram, norm) / x.shape[1], zero, log_bias)

    def up(z, _):
        seen = kernels.see(act, z, powers, has_mean=False)
        return kernels.up(seen, width, gain, log_bias, None), (z, seen)

    top, (below, hs) = lax.scan(up, first, None, length=int(depths[-1]) - 1)
    zs = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), below, top)  # of layer l, and of the readout at depth l

    def enter(d):
        z = jax.tree.map(lambda a: a[d - 1], zs)
        found = readout.cotangent(loss, z.scale, z.cov, z.mean, t, out_dim)
        return found.log_norm, found.gram

    tops = lax.map(enter, jnp.asarray(depths))
    lanes = jax.tree.map(jnp.zeros_like, tops)

    def down(lanes, layer):
        """From layer l + 1 to layer l; a network of depth l + 1 has its readout there and enters first."""
        index, seen = layer
        own = index == jnp.asarray(depths) - 1
        norms, grams = (jnp.where(own.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(tops, lanes, strict=True))
        pass_on = lambda n, g: kernels.down((n, g, jnp.zeros_like(g)), seen, width, gain, zero)[:2]  # noqa: E731
        lanes = jax.vmap(pass_on)(norms, grams)
        return lanes, lanes

    layers = jnp.arange(1, int(depths[-1])), hs
    norms, grams = lax.scan(down, lanes, layers, reverse=True)[1]  # [L-1, D, B], [L-1, D, B, B]
    last = jnp.arange(1, int(depths[-1]) + 1)[:, None] == jnp.asarray(depths)[None]  # [L, D]
    pad = lambda a: jnp.concatenate([a, jnp.zeros_like(a[:1])])  # noqa: E731
    norms = jnp.where(last[:, :, None], tops[0][None], pad(norms))
    grams = jnp.where(last[:, :, None, None], tops[1][None], pad(grams))
    h = jnp.concatenate([kernels.log(norm)[None], hs.log_h + 0.5 * math.log(width)])
    h_gram = jnp.concatenate([kernels.over(gram, norm)[None], hs.h])
    inner = jax.vmap(jax.vmap(kernels.inner))
    own_h = jnp.concatenate([h[1:], jnp.zeros_like(h[:1])])
    log_h = jnp.where(last[:, :, None], 0.5 * math.log(out_dim) + zs.scale[:, None], own_h[:, None])
    fields = (
        0.5 * logsumexp(2 * norms, axis=2),
        inner(norms + h[:, None], grams * h_gram[:, None]),
        inner(norms, grams),
        0.5 * logsumexp(2 * jnp.broadcast_to(log_h, (*last.shape, num)), axis=2),
    )
    exists = jnp.arange(1, int(depths[-1]) + 1)[:, None] <= jnp.asarray(depths)[None]
    return NestedPrediction(*(jnp.where(exists, v, jnp.nan).T for v in fields))
