"""The whole profile of a network at finite depth, from theory: no network is drawn.

A batch of inputs makes, at every layer of a wide network, Gaussian preactivations of which the covariance over samples is known,

    K_1 = sigma_w^2 x x^T / in_dim + sigma_b^2,    K_{l+1} = sigma_w^2 E phi(u_a) phi(u_b) + sigma_b^2,    u ~ N(0, K_l),

and back through the same layers goes the covariance G_l = E delta_a . delta_b of the cotangents,

    G_l = sigma_w^2 E phi'(u_a) phi'(u_b) G_{l+1},    E ||dW_l||^2 = sum_ab E (h_a . h_b) G_l,    E ||db_l||^2 = sum_ab G_l,

elementwise in the samples a, b. Widths cancel in G: W_{l+1} has variance sigma_w^2 / N and sums over N units below it. Everything
is carried in logarithms, so a depth of 10,000 is a reading, and so is a growth of e^1000.

**Weights with a mean**, alpha / sqrt(n) beside a spread sigma / sqrt(n), add a rank-one part: a mean M_{l+1} = alpha sqrt(n) E phi
that all units of a layer share, random to O(1) from network to network, and on the way back the sum P of delta over the units,

    G_l = E phi' phi' (alpha^2 P_{l+1} + sigma^2 G_{l+1}),    P_l = G_l + alpha^2 (n - 1) E phi'_a E phi'_b P_{l+1}.

M is drawn a few times, from fixed draws, since its first values decide what follows: tanh saturates or does not.

Poole et al., 2016 (arXiv:1606.05340); Schoenholz et al., 2017 (arXiv:1611.01232).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp

from vgrad import activations, finite_width, kernels, readout, scatter
from vgrad.base import Array
from vgrad.initializers import check_sigma
from vgrad.moments import AnyPhi, Real

__all__ = ["Prediction", "predict"]


class Prediction(NamedTuple):
    """What theory says of every layer; arrays of shape [L], natural logarithms of Frobenius norms over the batch as in `Profile`.

    Attributes:
      q: second moment of a unit's preactivation, mean over the batch. inf or 0 beyond the float range; `log_h` is not.
      c: correlation of the preactivations of two samples, mean over the distinct pairs. NaN for a batch of one.
      log_delta, log_grad_w, log_grad_b, log_h: ln(E ||.||^2) / 2 in the limit of infinite width, what `fit.log_mean_sq` measures.
      mean_log_delta: E ln ||delta_l||, the typical network (`fit.mean_log`), to first order in 1 / width.
      std_log_delta: spread of ln ||delta_l|| over seeds, to the same order. NaN where the gradient is exactly zero, -inf in logs.
    """

    q: Array
    c: Array
    log_delta: Array
    log_grad_w: Array
    log_grad_b: Array
    log_h: Array
    mean_log_delta: Array
    std_log_delta: Array


def predict(
    phi: AnyPhi,
    batch: tuple[Any, Any],
    *,
    width: int,
    depth: int,
    out_dim: int,
    sigma_w: Real = 1.0,
    sigma_b: Real = 0.0,
    weights: str = "normal",
    loss: str | Callable = "cross_entropy",
) -> Prediction:
    """The mean profile, and the typical one, of `vgrad.mlp(width, phi, in_dim, out_dim, sigma_w=.., sigma_b=.., weights=..)`.

    Args:
      phi: activation, by name, a function, or an `Activation` with its breakpoints.
      batch: (x, t). x has shape [B, in_dim]; t labels [B] for the cross-entropy, targets [B, out_dim] for the squared error.
      width: units per hidden layer, N.
      depth: L, number of weight matrices, at least 2.  out_dim: units of the last layer.
      sigma_w, sigma_b: as for `mlp`: sigma_w multiplies what `weights` draws. Shape [], traceable.
      weights: name of an initializer: all of `vgrad.initializers` but "identity", which is not random.
      loss: "cross_entropy", "squared_error", or one of these functions of `vgrad.losses`.
    Returns:
      `Prediction`. The mean is that of infinite width; a network of width N differs by O(L / N) of its logarithm, and its seeds
        scatter by `std_log_delta`. Cross-entropy logits come from fixed draws, good to about 3e-3 in ln ||delta|| and 1e-2 in
        ln ||dW||.
    Raises:
      ValueError, TypeError: bad shapes, names, sigmas, as the network's own constructors raise them.
    """
    x, t = (jnp.asarray(a) for a in batch)
    name, act = readout.loss_name(loss), activations.facts(phi)
    for what, number, least in (("width", width, 1), ("depth", depth, 2), ("out_dim", out_dim, 1)):
        if isinstance(number, bool) or not hasattr(number, "__index__") or int(number) < least:
            raise ValueError(f"{what} is {number!r}, expected an integer of at least {least}.")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}, expected [B, in_dim]: a batch of rows. For one sample use x[None].")
    check_sigma("sigma_w", sigma_w)
    check_sigma("sigma_b", sigma_b)
    readout.check_targets(name, batch[1], x.shape[0], out_dim)
    dtype = jnp.result_type(float)
    fans = np.array([(x.shape[1], width), (width, width), (width, out_dim)])
    shift, spread = _law(weights, fans)
    x, t = x.astype(dtype), (t.astype(dtype) if name == "squared_error" else t)
    static = _Static(act, name, weights, tuple(shift), tuple(spread), int(width), int(depth), int(out_dim))
    return _compiled(static, x, t, jnp.asarray(sigma_w, dtype), jnp.asarray(sigma_b, dtype))


def _law(weights, fans):
    """Mean and std of an entry, times sqrt(fan_in), at sigma_w = 1: each of embedding, hidden layers and readout."""
    fan_in, fan_out = fans.T
    laws = dict.fromkeys(("normal", "uniform", "truncated_normal", "orthogonal", "lecun", "xavier_fan_in"), (0.0, 1.0))
    laws |= {"he": (0.0, math.sqrt(2)), "xavier_fan_avg": (0.0, np.sqrt(2 * fan_in / (fan_in + fan_out)))}
    laws |= {"positive_uniform": (0.5, math.sqrt(1 / 12))}
    if not isinstance(weights, str) or weights not in laws:
        raise ValueError(f"weights is {weights!r}, expected the name of a random initializer: {', '.join(laws)}.")
    return [np.broadcast_to(v, 3).tolist() for v in laws[weights]]


_NUM_SCENARIOS, _NUM_SUMS = 24, 8  # draws of the mean part, and for each of them of the sum of delta over the units


# Compiled as a whole: primitive by primitive the same takes seconds.
@partial(jax.jit, static_argnums=0)
def _compiled(static, x, t, sigma_w, sigma_b):
    run = partial(_one, static, x, t, sigma_w, sigma_b)
    if not any(static.shift):
        return run(None)
    noise = jax.random.normal(jax.random.key(1), (_NUM_SCENARIOS, static.depth - 1 + _NUM_SUMS, x.shape[0]), x.dtype)
    each = lax.map(run, noise, batch_size=8)
    mean = lambda v: jnp.mean(v, axis=0)  # noqa: E731
    mean_sq = lambda v: 0.5 * (logsumexp(2 * v, axis=0) - math.log(_NUM_SCENARIOS))  # noqa: E731
    typical = mean(each.mean_log_delta)
    spread = jnp.sqrt(mean(jnp.square(each.mean_log_delta - typical[None]) + jnp.square(each.std_log_delta)))
    norms = {name: mean_sq(getattr(each, name)) for name in ("log_delta", "log_grad_w", "log_grad_b", "log_h")}
    return Prediction(q=mean(each.q), c=mean(each.c), **norms, mean_log_delta=typical, std_log_delta=spread)


class _Static(NamedTuple):
    """What a program is compiled for."""

    act: activations.Activation
    loss: str
    weights: str
    shift: tuple[float, ...]  # of the weights of embedding, hidden layers, readout
    spread: tuple[float, ...]
    width: int
    depth: int
    out_dim: int


def _one(static, x, t, sigma_w, sigma_b, noise):
    """A `Prediction` for one draw of the mean part, or without one."""
    act, width, depth, out_dim, has_mean = static.act, static.width, static.depth, static.out_dim, any(static.shift)
    log_bias, powers = kernels.log(sigma_b), kernels.powers(act, x.dtype)
    laws = np.repeat(np.stack([static.shift, static.spread], axis=1), [1, depth - 2, 1], axis=0)
    gains = sigma_w * jnp.asarray(laws, x.dtype)  # [L, 2]
    first, log_x = _embed(x, gains[0], log_bias)

    def up(z, layer):
        gain, noise = layer
        seen = kernels.see(act, z, powers, has_mean=has_mean)
        spread = None if has_mean else scatter.scatter(act, z, log_bias, orthogonal=static.weights == "orthogonal")
        return kernels.up(seen, width, gain, log_bias, noise), (z, seen, spread)

    spreads: Any  # None with a mean
    top, (below, hs, spreads) = lax.scan(up, first, (gains[1:], noise if noise is None else noise[: depth - 1]))
    zs = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), below, top)
    cotangent_of = lambda log_scale: readout.cotangent(static.loss, log_scale, top.cov, top.mean, t, out_dim)  # noqa: E731
    cotangent, change = jax.jvp(cotangent_of, (top.scale,), (jnp.ones_like(top.scale),))
    layers = gains[1:], hs, _feedback(hs, zs.scale, gains[1:], width) if has_mean else jnp.ones_like(hs.bend)
    coherent = cotangent.coherent
    if has_mean:
        coherent = coherent + _own_sums(cotangent, top.cov, zs.scale[-2], hs, gains[-1], width)
    start = cotangent.log_norm, cotangent.gram, coherent
    found = _descend(start, layers, width)
    norms, grams = (jnp.concatenate([a, b[None]]) for a, b in zip(found, start[:2], strict=True))
    h = jnp.concatenate([log_x[0][None], hs.log_h + 0.5 * math.log(width)]), jnp.concatenate([log_x[1][None], hs.h])
    log_delta = 0.5 * logsumexp(2 * norms, axis=1)
    z_top = 0.5 * math.log(out_dim) + top.scale
    if has_mean:
        mean_log, std = _typical_sums(norms, cotangent, start, layers, width, noise)
    else:
        share, orthogonal = 1 - jnp.exp(2 * (log_bias - top.scale)), static.weights == "orthogonal"
        cov = scatter.covariances(spreads, cotangent.cosine, hs.slope, share * change.log_norm, width, orthogonal=orthogonal)
        shift = _shift(static, first, gains[1, 1], sigma_b, 1 + (cotangent.alignment - 1) * jnp.mean(share))
        mean_log, std = _typical(norms, cotangent, cov, shift)
    dead = jnp.isneginf(log_delta)
    return Prediction(
        q=jnp.mean(jnp.exp(2 * zs.scale), axis=1),
        c=_mean_pair(zs.cov + zs.mean[:, :, None] * zs.mean[:, None]),
        log_delta=log_delta,
        log_grad_w=jax.vmap(kernels.inner)(norms + h[0], grams * h[1]),
        log_grad_b=jax.vmap(kernels.inner)(norms, grams),
        log_h=0.5 * logsumexp(2 * jnp.concatenate([h[0][1:], z_top[None]]), axis=1),
        mean_log_delta=jnp.where(dead, -jnp.inf, mean_log),
        std_log_delta=jnp.where(dead, jnp.nan, std),
    )


def _typical(norms, cotangent, cov, shift):
    """E ln and std of ln ||delta_l|| [L], from their spread at the readout, which is not small, and the covariances above it."""
    chi = norms - norms[-1:]  # ln of what the layers above do to each sample
    draws = jax.vmap(lambda chi: logsumexp(cotangent.log_sq + 2 * chi[None], axis=1))(chi)  # [L, M]
    above = lambda v: jnp.concatenate([v, jnp.zeros_like(v[:1])])  # noqa: E731
    weight = jax.nn.softmax(2 * norms, axis=1)
    within = above(jnp.einsum("la,lb,lab->l", weight[:-1], weight[:-1], cov, precision="highest"))
    mean = jnp.mean(draws, axis=1)
    between = jnp.mean(jnp.square(draws - mean[:, None]), axis=1)
    return 0.5 * (mean + above(shift) - 0.5 * within), 0.5 * jnp.sqrt(between + within)


def _descend(state, layers, width):
    """ln(E |delta_a|^2) / 2 [l, B] and the correlations of the cotangents [l, B, B] at each of the layers."""

    def down(state, layer):
        gain, seen, feedback = layer
        below = kernels.down(state, seen, width, gain, feedback)
        return below, below[:2]

    return lax.scan(down, state, layers, reverse=True)[1]


def _feedback(hs, scales, gains, width):
    """By what the sums of delta over the units change [L-1, B], since weights that z depends on are met again on the way back.

    By parts, the fluctuating half of W_{l+1} has E[(g delta)_j] = sigma^2 / n h_j sum_i delta_i phi''_i / phi'_i: of the order of
    1 / sqrt(n) of what its mean brings, and summed over units as that is. Of a mean slope of zero the ratio is large and the
    product is not: so no power of it.
    """
    above = jnp.concatenate([hs.bend[1:] * jnp.exp(scales[:-2] - scales[1:-1]), jnp.zeros_like(hs.bend[:1])])
    ratio = kernels.divide(jnp.square(gains[:, 1]), gains[:, 0] * math.sqrt(width))
    return 1 + ratio[:, None] * above * hs.mixed


def _own_sums(cotangent, cov, scale, hs, gain, width):
    """What to add to the sums at the readout, since delta_L looks at outputs y made of the weights that it meets on its way back.

    Of W_L delta_L the part along h_{L-1} is y . delta_L / |h|, not a fresh number; summed over units it is as large as all else.
    """
    share = hs.mixed[-1] * jnp.exp(scale - hs.log_h[-1])  # of a sum over units of phi' h, in all of h
    ratio = kernels.divide(jnp.square(gain[1]), jnp.square(gain[0]) * width)
    c = kernels.over(cov, jnp.sqrt(jnp.diagonal(cov)))
    return ratio * share[:, None] * share[None] * (cotangent.pull - c * cotangent.gram)


def _typical_sums(norms, cotangent, start, layers, width, noise):
    """E ln and std of ln ||delta_l|| [L] for weights with a mean: one sum over units, a random number, rules all layers below."""
    mean, std = _typical(norms, cotangent, *(jnp.zeros_like(v) for v in (layers[1].slope, norms[:-1, 0])))
    layers, last = (jax.tree.map(lambda a, i=i: a[i], layers) for i in (slice(None, -1), -1))
    gain, seen, feedback = last
    log_norm, gram, coherent = kernels.down(start, seen, width, gain, feedback)
    # From above comes alpha sqrt(n) E phi' times the sum there; the rest is new.
    passed = gain[0] * math.sqrt(width) * seen.mean_slope * jnp.exp(start[0] + seen.log_slope - log_norm)
    fresh = coherent - passed[:, None] * passed[None] * cotangent.coherent
    sums = passed[None] * cotangent.sums[:_NUM_SUMS] + jnp.dot(noise[-_NUM_SUMS:], readout.root_of(fresh).T, precision="highest")
    walk = lambda sums: _descend((log_norm, gram, sums[:, None] * sums[None]), layers, width)[0]  # noqa: E731
    each = 0.5 * logsumexp(2 * jax.vmap(walk)(sums), axis=2)  # [K, L-2]
    return jnp.concatenate([jnp.mean(each, axis=0), mean[-2:]]), jnp.concatenate([jnp.std(each, axis=0), std[-2:]])


def _shift(static, first, sigma, sigma_b, alignment):
    """What width adds to ln E |delta_l|^2 [L-1], to first order, for a sample of the batch's mean length."""
    edge = 2 * kernels.EDGE
    q = jnp.exp(jnp.clip(jax.nn.logsumexp(2 * first.scale) - math.log(first.scale.size), -edge, edge))
    widths = jnp.broadcast_to(jnp.asarray([[static.width], [1e30]], q.dtype), (2, static.depth - 1))
    law: Any = dict(q=q, sigma_w=sigma, sigma_b=sigma_b, weights=static.weights if static.weights == "orthogonal" else "normal")
    found = jax.vmap(lambda n: finite_width.backward(static.act, n, **law, alignment=alignment).log_mean)(widths)
    return found[0] - found[1]


def _embed(x, gain, log_bias):
    """Layer 1, and ln |x_a| [B] with the correlations x_a . x_b / (|x_a| |x_b|) [B, B]."""
    top = jnp.max(jnp.abs(x), axis=1)
    unit = x / jnp.where(top > 0, top, 1.0)[:, None]
    gram, log_top, n = jnp.dot(unit, unit.T, precision="highest"), kernels.log(top), x.shape[1]
    norm = jnp.sqrt(jnp.diagonal(gram))
    inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1.0), 0.0)
    z = kernels.layer(log_top, gain[1] ** 2 * gram / n, gain[0] * jnp.sum(unit, axis=1) / math.sqrt(n), log_bias)
    return z, (log_top + kernels.log(norm), gram * inverse[:, None] * inverse[None])


def _mean_pair(c):
    """Mean of [L, B, B] over distinct pairs."""
    num = c.shape[-1]
    off = jnp.sum(c, axis=(1, 2)) - jnp.trace(c, axis1=1, axis2=2)
    return jnp.clip(off / (num * (num - 1)), -1, 1) if num > 1 else jnp.full_like(off, jnp.nan)
