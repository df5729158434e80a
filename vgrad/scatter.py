"""How networks of one batch scatter over seeds: `finite_width.backward`'s recursion for the covariance between samples.

Of sample a, let u_a be the deviation of ln p_a, p the part of the length due to weights, and s_a that of ln |delta_a|^2. With the
slopes a = d ln E phi^2 / d ln p and b = d ln E phi'^2 / d ln p of each sample,

    u_{l+1} = a u_l + e_l,    s_l = s_{l+1} + b u_l + eta_l,
    n Cov(e_a, e_b) = <phi_a^2 phi_b^2> - 1,    n Cov(e_a, eta_b) = <phi_a^2 phi'_b^2> - 1,
    n Cov(eta_a, eta_b) = (1 + 2 r_ab) <phi'_a^2 phi'_b^2> - 1,

<> being the mean of the product over the product of the means, and r the squared cosine between the two cotangents above. Then the
norm over the batch has Var ln sum_a |delta_a|^2 = sum_ab w_a w_b Cov(s_a, s_b), w being the samples' shares.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vgrad import activations, gaussian
from vgrad.base import Array
from vgrad.kernels import Layer, divide, look_at, over

__all__ = ["Scatter", "covariances", "scatter"]

_NUM_TERMS = 64


class Scatter(NamedTuple):
    """What a layer contributes, times its width, and the slopes through which a deviation of the length acts.

    Attributes:
      a, b: d ln E phi^2 / d ln p and d ln E phi'^2 / d ln p. Shape [B].
      forward, shared: covariances of e_a with e_b, and of e_a with eta_b. Shape [B, B].
      slopes: <phi'_a^2 phi'_b^2>. Shape [B, B].
      lengths: what orthogonal weights take off the covariances, over the two slopes, since they leave z with a fixed length: twice
        the squared correlation of z. 0 for normal weights. Shape [B, B].
    """

    a: Array
    b: Array
    forward: Array
    shared: Array
    slopes: Array
    lengths: Array


def scatter(act: activations.Activation, z: Layer, log_bias: Array, *, orthogonal: bool) -> Scatter:
    """The `Scatter` of a layer of preactivations without a mean."""
    size, _ = look_at(z)
    q = jnp.diagonal(z.cov) * jnp.square(size)

    def squares(u):
        return jnp.square(jnp.stack(jax.jvp(act.phi, (u,), (jnp.ones_like(u),))))

    def products(u):
        h, slope = squares(u)
        return jnp.stack([h * h, h * slope, slope * slope])

    options = gaussian.rule_options(act)
    whole = jax.vmap(lambda q: gaussian.expect(products, q, **options))(q)  # [B, 3]
    terms = jax.vmap(lambda q: gaussian.coefficients(squares, q, num=_NUM_TERMS))(q)  # [B, 2, K]
    mean = terms[:, :, :1]
    terms = divide(terms, jnp.broadcast_to(mean, terms.shape))
    h, slope = terms[:, 0], terms[:, 1]
    bias = jnp.exp(log_bias - jnp.where(z.scale > -jnp.inf, z.scale, 0.0))
    weighted = z.cov - bias[:, None] * bias[None]  # the part of the covariance that is due to weights
    p = jnp.maximum(jnp.diagonal(weighted), 0)
    c, share = over(z.cov, jnp.sqrt(jnp.diagonal(z.cov))), divide(p, jnp.diagonal(z.cov))
    lengths = 2 * jnp.square(over(weighted, jnp.sqrt(p))) if orthogonal else jnp.zeros_like(c)
    powers = lax.scan(lambda last, _: (last * c, last * c), jnp.ones_like(c), None, length=_NUM_TERMS - 1)[1]

    def pairs(f, g, i, square):
        """<f_a g_b> - 1. What the terms leave out at c = 1 is taken for one more, far up."""
        rest = jnp.sqrt(jnp.maximum(divide(whole[:, i], square) - jnp.sum(f * g, axis=1), 0))
        series = jnp.einsum("ak,bk,kab->ab", f[:, 1:], g[:, 1:], powers, precision="highest")
        return series + rest[:, None] * rest[None] * jnp.square(powers[-1])

    hh, hs, ss = (mean[:, i, 0] * mean[:, j, 0] for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (share * v[:, 2] / math.sqrt(2) for v in (h, slope))
    return Scatter(
        a=a, b=b,
        forward=pairs(h, h, 0, hh) - lengths * a[:, None] * a[None],
        shared=pairs(h, slope, 1, hs) - lengths * a[:, None] * b[None],
        slopes=1 + pairs(slope, slope, 2, ss),
        lengths=lengths,
    )  # fmt: skip


def covariances(layers: Scatter, cosine: Array, slope: Array, lever: Array, n: int, *, orthogonal: bool) -> Array:
    """Cov(s_a, s_b) at every hidden layer, given delta_L's direction. Shape [L-1, B, B].

    Args:
      layers: of layers 1..L-1, fields [L-1, ...].
      cosine: E of the squared cosine of delta_a and delta_b at layer L. Shape [B, B].
      slope: correlations of phi' at every layer. Shape [L-1, B, B].
      lever: d ln |delta_a|^2 / d ln p_a at layer L. Shape [B].
      n: width.
    """
    outer = lambda f, g: f[:, None] * g[None]  # noqa: E731

    def up(cov, m):
        return outer(m.a, m.a) * cov + m.forward / n, cov

    def down(state, layer):
        cosine, lever, noise = state
        m, slope, cov = layer
        kappa = (1 + 2 * cosine) * m.slopes - 1 - m.lengths * outer(m.b, m.b) - (2 * cosine if orthogonal else 0)
        mixed = lever[:, None] * m.shared
        noise = noise + (outer(lever, lever) * m.forward + mixed + mixed.T + kappa) / n
        lever = m.b + m.a * lever
        return (cosine * jnp.square(slope), lever, noise), outer(lever, lever) * cov + noise

    zero = jnp.zeros_like(cosine)
    _, below = lax.scan(up, zero, layers)
    return lax.scan(down, (cosine, lever, zero), (layers, slope, below), reverse=True)[1]
