"""One layer of a wide network as it acts on covariances over a batch: up with the signal, down with its gradient.

A layer's preactivations are Gaussian over its units, with covariance K over the samples and, where weights have a mean, a mean M
that the units share. Each sample a is kept in units of e^scale_a, so that K_aa + M_a^2 = 1 there at any magnitude. Beyond 1e±6, phi
is taken for the power law that it is there,

    phi(e^s z) ~ e^(d s) phi(z),    d = 1 for relu at both ends, 1 below and 0 above for tanh,

with d read off E phi^2 at two lengths, for phi' likewise.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vgrad import activations, gaussian
from vgrad.base import Array
from vgrad.readout import root_of

__all__ = ["EDGE", "Layer", "Powers", "Seen", "divide", "down", "inner", "layer", "log", "look_at", "over", "powers", "see", "up"]

EDGE = 6 * math.log(10)  # ln of the greatest std at which phi itself is looked at; minus that of the least


class Layer(NamedTuple):
    """The preactivations of a layer: second moments of the samples [B], in units of e^scale.

    Attributes:
      scale: ln(E z^2) / 2. Shape [B]. -inf for a sample that has died.
      cov: covariance. Shape [B, B].
      mean: Shape [B].
    """

    scale: Array
    cov: Array
    mean: Array


class Seen(NamedTuple):
    """The activations of a layer, and what the way back needs. Correlations are means of products over root mean squares.

    Attributes:
      log_h, log_slope: ln(E h^2) / 2 and ln(E phi'^2) / 2. Shape [B].
      h, slope: correlations of h and of phi' between samples. Shape [B, B].
      mean_h, mean_slope: E h and E phi' over their root mean squares. Shape [B].
      bend, mixed: E phi'' / E phi' and E(phi phi') / E phi', with z and phi in units of e^scale; 0 for weights without a mean. [B].
    """

    log_h: Array
    log_slope: Array
    h: Array
    slope: Array
    mean_h: Array
    mean_slope: Array
    bend: Array
    mixed: Array


class Powers(NamedTuple):
    """Exponents of phi and phi' as powers of z, of small z and of large: E phi^2 ~ q^d. Shape [2], small first."""

    h: Array
    slope: Array


def powers(act: activations.Activation, dtype) -> Powers:
    """The `Powers` of an activation, to the next multiple of a half."""
    lengths = jnp.exp(jnp.asarray([-2 * EDGE, 2 * EDGE], dtype))[:, None] * jnp.asarray([[1.0, 4.0], [0.25, 1.0]], dtype)
    found = jax.vmap(jax.vmap(lambda q: gaussian.expect(partial(_squares, act.phi), q, **gaussian.rule_options(act))))(lengths)
    exponents = (log(found[:, 1]) - log(found[:, 0])) / math.log(4)
    exponents = jnp.where(jnp.isfinite(exponents), jnp.round(2 * exponents) / 2, 0.0)
    return Powers(exponents[:, 0], exponents[:, 1])


def layer(log_unit: Array, cov: Array, mean: Array, log_bias: Array) -> Layer:
    """The `Layer` of a signal with moments `cov` and `mean` in units of e^log_unit, and of biases with std e^log_bias."""
    scale = 0.5 * jnp.logaddexp(2 * log_unit + log(jnp.diagonal(cov) + jnp.square(mean)), 2 * log_bias)
    unit, bias = (jnp.exp(v - jnp.where(scale > -jnp.inf, scale, 0.0)) for v in (log_unit, log_bias))
    return Layer(scale, cov * unit[:, None] * unit[None] + bias[:, None] * bias[None], mean * unit)


def look_at(z: Layer) -> tuple[Array, Array]:
    """The scales [B] at which phi is looked at, and the logarithms [B] by which the layer's own lie beyond them."""
    at = jnp.clip(z.scale, -EDGE, EDGE)
    return jnp.exp(at), z.scale - at


def see(act: activations.Activation, z: Layer, p: Powers, *, has_mean: bool) -> Seen:
    """What the activations of a layer are. `has_mean` is static: without a mean there is less to integrate."""
    size, beyond = look_at(z)
    q, mean = jnp.diagonal(z.cov) * jnp.square(size), z.mean * size

    def own(q, mean):
        where = {"mean": mean} if has_mean else {}
        integrands = partial(_moments, act.phi, q, mean) if has_mean else partial(_squares, act.phi)
        return gaussian.expect(integrands, q, **where, **gaussian.rule_options(act)), gaussian.series(act, q, **where)

    moments, series = jax.vmap(own)(q, mean)
    std = jnp.sqrt(jnp.diagonal(z.cov))
    c = jnp.clip(over(z.cov, std), -1, 1)
    pair = lambda a, b, c: gaussian.correlator(a, b)(c)  # noqa: E731
    h, slope = jax.vmap(jax.vmap(pair, (None, 0, 0)), (0, None, 0))(series, series, c)
    same = jnp.eye(q.shape[0], dtype=bool)
    root = [jnp.sqrt(moments[:, i]) for i in range(2)]
    h, slope = (jnp.where(same, 1.0, jnp.clip(over(v, r), -1, 1)) for v, r in ((h, root[0]), (slope, root[1])))
    mean_h = mean_slope = bend = mixed = jnp.zeros_like(q)
    if has_mean:
        mean_h, mean_slope = (divide(moments[:, 2 + i], root[i]) for i in range(2))
        whole = jnp.where(moments[:, 3] == 0, jnp.inf, moments[:, 3])
        bend, mixed = moments[:, 4] * size / whole, moments[:, 5] / size / whole
    d, e = (jnp.where(beyond > 0, v[1], v[0]) for v in p)
    grown = lambda d: jnp.where((beyond == 0) | (d == 0), 0.0, d * beyond)  # noqa: E731  0 * inf
    return Seen(log(root[0]) + grown(d), log(root[1]) + grown(e), h, slope, mean_h, mean_slope, bend, mixed)


def up(seen: Seen, n: int, gain: Array, log_bias: Array, noise: Array | None) -> Layer:
    """The next layer, of weights with mean and std gain [2] / sqrt(n); noise [B] draws its mean, None means that there is none."""
    alpha, sigma = gain[0], gain[1]
    mean = jnp.zeros_like(seen.log_h)
    if noise is not None:
        scatter = root_of(seen.h - seen.mean_h[:, None] * seen.mean_h[None])
        mean = alpha * (math.sqrt(n) * seen.mean_h + jnp.dot(scatter, noise, precision="highest"))
    return layer(seen.log_h, sigma**2 * seen.h, mean, log_bias)


def down(state: tuple[Array, Array, Array], seen: Seen, n: int, gain: Array, feedback: Array):
    """From the cotangents above to those of this layer: (ln(E |delta_a|^2) / 2, correlations, correlations of sums over units).

    The weights between them have mean and std gain [2] / sqrt(n); `feedback` [B] multiplies the sums.
    """
    alpha, sigma = gain[0], gain[1]
    log_norm, gram, coherent = state
    coherent = coherent * feedback[:, None] * feedback[None]
    inside = jnp.square(alpha) * coherent + jnp.square(sigma) * gram
    root = jnp.sqrt(jnp.maximum(jnp.diagonal(inside), 0))
    gram = seen.slope * over(inside, root)
    coherent = gram + jnp.square(alpha) * (n - 1) * seen.mean_slope[:, None] * seen.mean_slope[None] * over(coherent, root)
    return log_norm + seen.log_slope + log(root), gram, coherent


def inner(log_norm: Array, gram: Array) -> Array:
    """ln(sum_ab gram_ab e^(log_norm_a + log_norm_b)) / 2; -inf where it cancels. Shape []."""
    top = jnp.max(log_norm)
    unit = jnp.exp(log_norm - jnp.where(jnp.isfinite(top), top, 0.0))
    return 0.5 * log(jnp.sum(gram * unit[:, None] * unit[None])) + top


def log(x: Array) -> Array:
    """ln x, -inf for x <= 0 with a derivative of zero, and NaN for NaN."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), jnp.where(jnp.isnan(x), jnp.nan, -jnp.inf))


def _squares(phi, u):
    return jnp.square(jnp.stack(jax.jvp(phi, (u,), (jnp.ones_like(u),))))


def _moments(phi, q, mean, u):
    h, slope = both = jnp.stack(jax.jvp(phi, (u,), (jnp.ones_like(u),)))
    # The mean of phi'' by parts, so that kinks have theirs.
    return jnp.concatenate([jnp.square(both), both, jnp.stack([slope * (u - mean) / q, h * slope])])


def divide(a: Array, b: Array) -> Array:
    """a / b, 0 where b is not above 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)


def over(matrix: Array, root: Array) -> Array:
    """matrix_ab / (root_a root_b) for a matrix [B, B] and roots [B]; 0 where a root is."""
    inverse = divide(jnp.ones_like(root), root)
    return matrix * inverse[:, None] * inverse[None]
