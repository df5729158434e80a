"""How far a network of finite width lies from the mean: the law of ln ||delta_l||^2 over random initializations, to order 1/n.

One step of the backward pass multiplies ||delta||^2 by a sum over the n units of a layer, sigma_w^2 / n sum_i phi'(z_i)^2 xi_i^2
with xi_i ~ N(0, 1). That has a spread, and the mean of a logarithm lies below the logarithm of the mean:

    ln E = ln chi_1,    Var ln = kappa / n,    E ln = ln chi_1 - kappa / (2 n),    kappa = 3 mu_2 / mu_1^2 - 1,

with mu_k = E phi'(sqrt(q) g)^(2k): kappa is 2 for a linear layer, 5 for relu. Steps add up, so what rules is depth over width,
beta = sum_l kappa / n_l: the typical network (E ln) lies beta / 2 below the mean (ln E), and seeds differ by sqrt(beta).

**For which signal.** For a cotangent whose direction at the output does not depend on the weights: one output, two classes, a
fixed probe. Then the laws of linear and relu layers below are exact. W_{l+1}^T delta_{l+1} is sum_i phi'(z_i) a_i w_i, where a, a
Gaussian vector from the layer above, has fair coins for signs; w_i turned by the sign of a_i is a fresh Gaussian vector, although
phi'(z_i) depends on w_i; and the relu's pattern is coin flips whatever came in. For other phi that is so to leading order only, and
the forward pass counts: the length q_l of a finite network fluctuates and takes chi_1(q_l) with it. `backward` has all of these
terms, for a cotangent that looks at the output too (`alignment`); `step` is one layer at a fixed length.

**For which batch.** One sample. Squared norms add over samples, so ln E of the squared Frobenius norm is theirs; but its moment
ratio E||.||^4 / (E||.||^2)^2 is at most the largest of one sample's, by Minkowski's inequality: equal where all samples are
parallel, less where they average out.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import digamma, polygamma

from vgrad import activations, gaussian
from vgrad.base import Array, Phi
from vgrad.initializers import check_sigma

__all__ = ["Law", "backward", "compose", "dead_probability", "linear_step", "moment_ratio", "relu_step", "step"]


class Law(NamedTuple):
    """The law over initializations of a squared norm X, in nats.

    Attributes:
      log_mean: ln E X.
      mean_log: E ln X, of the typical network.
      variance: Var ln X; the spread of ln sqrt(X) is sqrt(variance) / 2.
    """

    log_mean: Any
    mean_log: Any
    variance: Any


def linear_step(n, *, sigma_w) -> Law:
    """X = sigma_w^2 chi^2_n / n: a cotangent through a Gaussian matrix to a layer of n units, phi the identity. Exact.

    E ln chi^2_n = psi(n / 2) + ln 2,    Var ln chi^2_n = psi'(n / 2).

    Args:
      n: units of the lower layer, the fan-in of the matrix; traceable.
      sigma_w: Shape [], traceable.
    Returns:
      `Law` with arrays in the shape of n. Orthogonal square matrices have none of this: variance 0, ln X = 2 ln sigma_w.
    """
    n, log_gain = _widths(n), _log_gain(sigma_w)
    return Law(jnp.broadcast_to(log_gain, n.shape), log_gain + digamma(n / 2) - jnp.log(n / 2), polygamma(1, n / 2))


def relu_step(n, *, sigma_w, slope=0.0) -> Law:
    """X = sigma_w^2 / n (chi^2_m + slope^2 chi^2_(n-m)), m ~ Binomial(n, 1/2): a step to a layer of n relu units. Exact.

    With e ~ Exp(1), P(ln(e / X) > ln t) = E exp(-t X), an n-th power: so the moments of ln X are sums over an even grid of ln t,
    exact to rounding. At slope 0 all units are off with probability 2^-n, and X = 0: ln E counts that case, the other two are given
    that it did not happen.

    Args:
      n: units; any shape, traceable.
      sigma_w: sqrt(2) for He's initialization. Shape [], traceable.
      slope: of phi at z < 0, that of leaky relu; 0, or at least 1e-6 in absolute value. Shape [], traceable.
    Returns:
      `Law` with arrays in the shape of n. In float32 the variance has an absolute error of about 2e-6.
    """
    n, log_gain, leak = _widths(n), _log_gain(sigma_w), jnp.square(_float(slope))
    mean, variance = jnp.vectorize(partial(_log_moments, leak), signature="()->(),()")(n)
    return Law(jnp.broadcast_to(log_gain + jnp.log((1 + leak) / 2), n.shape), log_gain + mean, variance)


def _log_moments(leak, n):
    """E ln and Var ln of (chi^2_m + leak chi^2_(n-m)) / n, given that it is not zero."""
    log_t = jnp.asarray(_LOG_T, n.dtype)
    t = jnp.exp(log_t) / n
    on, off = jnp.log1p(2 * t), jnp.log1p(2 * leak * t)
    psi = (jnp.expm1(-on / 2) + jnp.expm1(-off / 2)) / 2  # E exp(-t phi'^2 xi^2) - 1; -1 itself only far out, where nothing is left
    one_unit = jnp.log1p(jnp.maximum(psi, jnp.finfo(n.dtype).eps - 1))
    density = t * jnp.exp((n - 1) * one_unit) * (jnp.exp(-1.5 * on) + leak * jnp.exp(-1.5 * off))
    density = density / jnp.sum(density)
    mean = jnp.sum(density * log_t)
    return -np.euler_gamma - mean, jnp.sum(density * jnp.square(log_t - mean)) - np.pi**2 / 6


_LOG_T = np.arange(-44.0, 85.0, 0.25)  # the density falls like t to the left, and for n = 1 as slowly as t^-1/2 to the right


def dead_probability(widths) -> Array:
    """1 - prod_l (1 - 2^-n_l): how often a relu network of these hidden layers [L] has a delta_1 of exactly zero."""
    return -jnp.expm1(jnp.sum(jnp.log1p(-jnp.exp2(-_widths(widths)))))


def step(phi: str | Phi, n, *, q, sigma_w, weights: str = "normal") -> Law:
    """One step to a layer of n units of length q, for any phi, to order 1 / n.

    An orthogonal matrix sends the cotangent in a direction uniform on the sphere, kappa = 3 mu_2 / mu_1^2 - 3; and it leaves z with
    a length of exactly sqrt(n q), which takes off another 2 (d ln chi_1 / d ln q)^2.

    Args:
      phi: activation.
      n: units. Shape [] or [L].
      q: variance of z, > 0. Shape [] or [L].  sigma_w: Shape [].
      weights: "normal" or "orthogonal" (square); others raise ValueError.
    Returns:
      `Law`, up to O(1/n^2), traceable and differentiable in n, q and sigma_w.
    """
    n, m = _widths(n), _moments(phi, q, 1.0, weights)
    log_mean = _log_gain(sigma_w) + jnp.log(m.slope) + m.shift_b / n
    return Law(log_mean, log_mean - m.kappa / (2 * n), m.kappa / n)


def compose(steps: Law) -> Law:
    """The law of a product of independent factors, given as a `Law` with a leading axis: means of logs and variances add."""
    return Law(*(jnp.sum(jnp.asarray(field), axis=0) for field in steps))


def moment_ratio(phi: str | Phi, widths, *, q: Any = 1.0) -> Array:
    """E||delta_1||^4 / (E||delta_1||^2)^2 = prod_l (1 + kappa_l / n_l), over the hidden layers. Hanin, 2018 (arXiv:1801.03744).

    prod_l (1 + 5 / n_l) for relu; gains such as sigma_w cancel. The cotangent of the input has one more factor, 1 + 2 / n_0, its
    matrix having no activation below it. A tangent J u sent up from the input has 1 + 2 / n_L instead, for the readout.

    Args:
      phi: activation.
      widths: of the hidden layers. Shape [L].
      q: variance of z. Shape [] or [L].
    Returns:
      Scalar []. Exact where phi is homogeneous (relu, leaky relu, identity); otherwise for lengths held fixed.
    """
    return jnp.exp(jnp.sum(jnp.log1p(_moments(phi, q, 1.0, "normal").kappa / _widths(widths))))


def backward(phi: str | Phi, widths, *, q, sigma_w, sigma_b=0.0, weights: str = "normal", alignment=1.0) -> Law:
    """The law of ||delta_l||^2 / ||delta_L||^2 for every hidden layer, all terms of order 1 / n_l included.

    With p = q - sigma_b^2, the part of q from weights, a = d ln p_{l+1} / d ln p_l and b = d ln chi_1 / d ln p_l, small deviations
    u of ln p and s of ln ||delta||^2 obey

        u_{l+1} = a u_l + e_l,    s_l = s_{l+1} + b u_l + eta_l,    n Var e = E phi^4 / (E phi^2)^2 - 1,    n Var eta = kappa,

    e and eta correlated, since they come from the same units. Their second order moves the means, and so does an alignment of the
    cotangent with z. In tanh networks of 20 layers u adds 43, 18 and 6 percent to the variance at sigma_w = 1.2, 2 and 4.

    Args:
      phi: activation.
      widths: of the hidden layers, L - 1 of them. Shape [L-1].
      q: variance of z_1, sigma_w^2 |x|^2 / in_dim + sigma_b^2, of the one sample x. Shape [].
      sigma_w, sigma_b: Shape [].
      weights: "normal" or "orthogonal" (square between hidden layers); others raise ValueError.
      alignment: E (z_L . delta_L)^2 / (p_L ||delta_L||^2), biases left out of z_L. 1 for a cotangent that does not look at the
        output; out_dim for the squared error against small targets, whose delta is z_L itself. Small against n / L.
    Returns:
      `Law` of arrays [L-1], row l - 1 for layer l; add what is known of ||delta_L||^2. Good while the variance is well below 1: the
      next order is about its square. All but phi and weights is traceable and differentiable. NaN for q <= sigma_b^2.
    """
    n, sigma_w, sigma_b = _widths(widths), _float(sigma_w), _float(sigma_b)

    def up(state, n):
        p, mean, variance = state
        p = jnp.where(p > 0, jnp.clip(p, 1e-12, 1e12), jnp.nan)  # beyond, phi is a power: a, b and the rest no longer change
        m = _moments(phi, p + sigma_b**2, p / (p + sigma_b**2), weights)
        above = m.a * mean + m.a_2 * variance / 2 + (m.shift_a - m.spread / 2) / n
        return (sigma_w**2 * m.square, above, m.a**2 * variance + m.spread / n), ((mean, variance), m)

    def down(state, layer):
        lever, align, mean, noise = state  # lever: d s_{l+1} / d u_{l+1}
        n, ((u, variance), m) = layer
        noise = noise + (lever**2 * m.spread + 2 * lever * m.shared + m.kappa) / n
        mean = mean + jnp.log(sigma_w**2 * m.slope) + m.b * u + m.b_2 * variance / 2
        mean = mean + (m.shift_b - m.kappa / 2 + (align - 1) * m.aligned) / n
        lever, align = m.b + m.a * lever, m.align_0 + (align - 1) * m.align_1
        return (lever, align, mean, noise), (mean, lever**2 * variance + noise)

    zero = jnp.zeros((), n.dtype)
    _, kept = lax.scan(up, (_float(q) - sigma_b**2, zero, zero), n)
    _, (mean, variance) = lax.scan(down, (zero, _float(alignment), zero, zero), (n, kept), reverse=True)
    return Law(mean + variance / 2, mean, variance)


class _Moments(NamedTuple):
    """What a layer contributes: times n, from `spread` to `aligned`. Derivatives are in ln p."""

    square: Any  # E phi^2
    slope: Any  # E phi'^2
    a: Any  # first and second derivative of ln E phi^2
    a_2: Any
    b: Any  # those of ln E phi'^2
    b_2: Any
    spread: Any  # Var e
    shared: Any  # Cov(e, eta)
    kappa: Any  # Var eta
    shift_a: Any  # by which the fixed length of z under orthogonal weights moves ln E phi^2 and ln E phi'^2
    shift_b: Any
    aligned: Any  # what alignment - 1 adds to ln ||delta||^2
    align_0: Any  # the alignment one layer below is align_0 + (alignment - 1) align_1
    align_1: Any


def _moments(phi, q, share, weights) -> _Moments:
    """At z ~ N(0, q), of which the share p / q is due to the weights."""
    if weights not in ("normal", "orthogonal"):
        raise ValueError(f"weights is {weights!r}, expected 'normal' or 'orthogonal': other laws have other fourth moments.")
    fn, options, q, share = activations.get(phi), gaussian.rule_options(phi), _float(q), _float(share)

    def expectations(q):
        def integrands(z):
            h, slope = jax.jvp(fn, (z,), (jnp.ones_like(z),))
            a, b, y = jnp.square(h), jnp.square(slope), jnp.square(z) / q
            first, second = (y - 1) / 2, (y * y - 4 * y + 1) / 4  # of the density, for d/d ln q and its square
            return jnp.stack([a, b, a * a, b * b, a * b, y * b, z * h * slope, a * first, a * second, b * first, b * second])

        return jax.vmap(lambda i: gaussian.expect(lambda z: integrands(z)[i], q, **options))(np.arange(11))

    a, b, aa, bb, ab, yb, zhs, a_1, a_2, b_1, b_2 = jnp.moveaxis(jnp.vectorize(expectations, signature="()->(k)")(q), -1, 0)
    a_2, b_2 = (share**2 * second + share * (1 - share) * first for first, second in ((a_1 / a, a_2 / a), (b_1 / b, b_2 / b)))
    a_1, b_1 = share * a_1 / a, share * b_1 / b
    on_sphere = 1.0 if weights == "orthogonal" else 0.0
    return _Moments(
        square=a, slope=b, a=a_1, a_2=a_2 - a_1**2, b=b_1, b_2=b_2 - b_1**2,
        spread=aa / a**2 - 1 - on_sphere * 2 * a_1**2,
        shared=ab / (a * b) - 1 - on_sphere * 2 * a_1 * b_1,
        kappa=3 * bb / b**2 - 1 - on_sphere * 2 * (1 + b_1**2),
        shift_a=on_sphere * (a_1 - a_2), shift_b=on_sphere * (b_1 - b_2),
        aligned=ab / (a * b) - on_sphere, align_0=share * yb / b + 1 - share, align_1=share * zhs**2 / (q * a * b),
    )  # fmt: skip


def _float(x) -> Array:
    return jnp.asarray(x, jnp.result_type(float))


def _log_gain(sigma_w):
    check_sigma("sigma_w", sigma_w)
    return 2 * jnp.log(_float(sigma_w))


def _widths(n) -> Array:
    if not any(isinstance(k, jax.core.Tracer) for k in jax.tree.leaves(n)) and not np.all(np.asarray(n) >= 1):
        raise ValueError(f"widths are {n}, expected numbers of at least 1: a layer needs a unit.")
    return _float(n)
