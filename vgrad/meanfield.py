"""Mean-field theory: what depth does to a signal and its gradient in the limit of infinite width.

At initialization the preactivations of a wide network are Gaussian, and two numbers follow them through the layers: the variance q
and the correlation c of two inputs,

    q_map(q) = sigma_w^2 E phi(u)^2 + sigma_b^2,    c_map(c) = (sigma_w^2 E phi(u1) phi(u2) + sigma_b^2) / q_map(q),

with u, u1, u2 of variance q and correlation c. Their fixed points q_star and c_star are where a deep network settles. On the way
back ||delta||^2 is multiplied at every layer by

    chi_1 = sigma_w^2 E phi'(u)^2:

below 1 gradients vanish ("ordered": all inputs come to look alike), above 1 they explode ("chaotic": c_star < 1), and at 1
("critical") both are kept. All functions are pure and scalar: vmap them over sigma_w and sigma_b, differentiate them. What does
not exist is NaN. Use float64 for more than six digits.

Poole et al., 2016 (arXiv:1606.05340); Schoenholz et al., 2017 (arXiv:1611.01232).

>>> import vgrad
>>> float(vgrad.meanfield.critical_sigma_w("relu"))  # He's initialization  # doctest: +ELLIPSIS
1.4142...
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vgrad import gaussian
from vgrad.base import Array
from vgrad.criticality import (
    CriticalPoints,
    Universality,
    critical_line,
    critical_points,
    critical_sigma_w,
    gain,
    universality,
)
from vgrad.moments import (
    AnyPhi,
    Real,
    all_roots,
    checked,
    compiled,
    divide,
    length_slope,
    residual,
    root,
    second_moment,
    slope_moment,
    table,
    tolerance,
)
from vgrad.prediction import Prediction, predict

__all__ = [
    "Asymptotics", "CriticalPoints", "DepthScales", "FixedPoints", "Prediction", "Universality", "asymptotics", "c_map", "c_star",
    "chi", "chi_1", "chi_par", "critical_line", "critical_points", "critical_sigma_w", "depth_scales", "fixed_points", "gain",
    "phase", "predict", "q_map", "q_star", "universality",
]  # fmt: skip


class FixedPoints(NamedTuple):
    """Fixed points of the length map in increasing order, [num], NaN where there are fewer.

    Attributes:
      q: the fixed point.
      chi_par: slope of the map there. The point attracts where |chi_par| < 1 and repels above.
      chi_1: growth of the squared gradient per layer at this length.
      residual: |q_map(q) - q| / q, of the order of float rounding where the solver succeeded; it reports NaN where it did not.
    """

    q: Array
    chi_par: Array
    chi_1: Array
    residual: Array


class DepthScales(NamedTuple):
    """How many layers a perturbation lives, e-fold. inf at criticality.

    Attributes:
      xi_q: of the length, -1 / ln |chi_par|; negative where the fixed point repels.
      xi_c: of the correlation of two inputs, -1 / ln chi(c_star): information about the input is lost beyond about 6 xi_c.
      xi_grad: of the squared gradient, -1 / ln chi_1; negative where it explodes. Equal to xi_c in the ordered phase.
    """

    xi_q: Array
    xi_c: Array
    xi_grad: Array


class Asymptotics(NamedTuple):
    """What the functions of these names return, together: `q_star`, `c_star`, `chi_1`, `chi_par` at q_star, and `DepthScales`."""

    q_star: Array
    c_star: Array
    chi_1: Array
    chi_par: Array
    xi_q: Array
    xi_c: Array
    xi_grad: Array


@compiled
def q_map(phi: AnyPhi, q, *, sigma_w: Real, sigma_b: Real = 0.0) -> Array:
    """Variance of the preactivations of one layer from that of the layer below: sigma_w^2 E phi(sqrt(q) g)^2 + sigma_b^2.

    Args:
      phi: activation, by name, a function, or an `Activation`.  q: variance below, >= 0. Shape [].
      sigma_w, sigma_b: stds of weights (times sqrt(fan_in)) and biases. Shape [].
    Returns:
      Shape []. NaN for q < 0 and where E phi^2 diverges.
    """
    sigma_w, sigma_b, q = checked(sigma_w, sigma_b, q)
    return sigma_w**2 * second_moment(phi, q) + sigma_b**2


@compiled
def c_map(phi: AnyPhi, c, q, *, sigma_w: Real, sigma_b: Real = 0.0) -> Array:
    """Correlation of two inputs after one layer, from their correlation c before it; both have variance q. Shape [].

    c = 1 stays 1. Accuracy as for `gaussian.series`.
    """
    sigma_w, sigma_b, q = checked(sigma_w, sigma_b, q)
    a = gaussian.series(phi, q)
    covariance, _ = gaussian.correlator(a, a)(jnp.asarray(c, q.dtype))
    mapped = (sigma_w**2 * covariance + sigma_b**2) / (sigma_w**2 * second_moment(phi, q) + sigma_b**2)
    return jnp.where(jnp.asarray(c) == 1, 1.0, mapped)


@compiled
def fixed_points(phi: AnyPhi, *, sigma_w: Real, sigma_b: Real = 0.0, num: int = 4) -> FixedPoints:
    """All fixed points of the length map between 0 and 1e12, stable or not; the first `num` of them. Arguments as for `q_map`.

    Two that lie within a quarter of each other are taken for none. A scale-invariant phi at its critical point has all lengths for
    fixed points, and reports 0.
    """
    sigma_w, sigma_b = checked(sigma_w, sigma_b)
    excess = _excess(phi, sigma_w, sigma_b)
    roots = all_roots(excess, table(excess, sigma_w.dtype), num)
    return _describe(phi, excess, roots, sigma_w)


@compiled
def q_star(phi: AnyPhi, *, sigma_w: Real, sigma_b: Real = 0.0, q_0: Real = 1.0) -> Array:
    """The length at which the layers of a deep network settle, coming from q_0. Shape []; arguments as for `q_map`.

    That is the nearest fixed point in the direction in which the map moves q_0. 0 where the signal dies; q_0 itself where the map
    leaves every length alone (relu at sigma_w = sqrt 2); NaN where the length grows without bound (relu above it), or where
    the solver failed: `fixed_points` has the residuals.
    """
    sigma_w, sigma_b, q_0 = checked(sigma_w, sigma_b, q_0)
    excess = _excess(phi, sigma_w, sigma_b)
    lengths, values = table(excess, sigma_w.dtype)
    start = excess(q_0)
    neutral = jnp.abs(start) <= 64 * jnp.finfo(q_0.dtype).eps * q_0
    up = jnp.argmax((lengths > q_0) & (values <= 0))
    down = lengths.size - 1 - jnp.argmax(((lengths < q_0) & (values >= 0))[::-1])
    found = jnp.where(start > 0, (values[up] <= 0) & (lengths[up] > q_0), (values[down] >= 0) & (lengths[down] < q_0))
    low = jnp.where(start > 0, jnp.maximum(lengths[up - 1], q_0), lengths[down])
    high = jnp.where(start > 0, lengths[up], jnp.minimum(lengths[jnp.minimum(down + 1, lengths.size - 1)], q_0))
    q = root(excess, low, high)
    good = found & (residual(excess, q) < tolerance(q))
    return jnp.where(neutral, q_0, jnp.where(good, q, jnp.nan))


@compiled
def c_star(phi: AnyPhi, *, sigma_w: Real, sigma_b: Real = 0.0, q=None) -> Array:
    """The correlation at which two different inputs settle, at length q (default: q_star). Shape []; arguments as for `q_map`.

    1 where chi_1 <= 1, and below 1 in the chaotic phase, where it attracts and 1 does not. The map is convex in c >= 0 (its Hermite
    coefficients are squares), so Newton's method from 0 climbs to the smaller root without passing it.
    """
    sigma_w, sigma_b = checked(sigma_w, sigma_b)
    q = q_star(phi, sigma_w=sigma_w, sigma_b=sigma_b) if q is None else checked(q)[0]
    ordered = sigma_w**2 * slope_moment(phi, q) <= 1
    a = gaussian.series(phi, q)
    pair, length = gaussian.correlator(a, a), sigma_w**2 * second_moment(phi, q) + sigma_b**2

    def excess(c):
        return (sigma_w**2 * pair(c)[0] + sigma_b**2) / length - c

    def solve(_, c):
        def climb(state):
            count, c, _ = state
            covariance, slope = pair(c)
            step = ((sigma_w**2 * covariance + sigma_b**2) / length - c) / (sigma_w**2 * q / length * slope - 1)
            return count + 1, jnp.clip(c - step, 0, 1), jnp.abs(step)

        small = 8 * jnp.finfo(c.dtype).eps
        return lax.while_loop(lambda s: (s[0] < 60) & (s[2] > small) & ~ordered, climb, (0, c, jnp.ones_like(c)))[1]

    c = lax.custom_root(excess, jnp.zeros_like(q), solve, divide)
    return jnp.where(ordered, 1.0, jnp.where(jnp.abs(excess(c)) < tolerance(c), c, jnp.nan))


@compiled
def chi(phi: AnyPhi, c, q, *, sigma_w: Real) -> Array:
    """sigma_w^2 E phi'(u1) phi'(u2): the slope of the correlation map at a fixed length q, at correlation c. Shape []."""
    sigma_w, q = checked(sigma_w, q)
    a = gaussian.series(phi, q)
    inside = sigma_w**2 * gaussian.correlator(a, a)(jnp.asarray(c, q.dtype))[1]
    return jnp.where(jnp.asarray(c) == 1, sigma_w**2 * slope_moment(phi, q), inside)


@compiled
def chi_1(phi: AnyPhi, *, sigma_w: Real, sigma_b: Real = 0.0, q=None) -> Array:
    """Growth of the mean squared gradient per layer toward the input, sigma_w^2 E phi'(sqrt(q) g)^2, at length q (default: q_star).

    Below 1 gradients vanish, above 1 they explode. Shape []; NaN where q_star is. By one quadrature of phi'^2. Schoenholz et al.,
    2017, eq. 9.

    >>> round(float(chi_1("tanh", sigma_w=1.5**0.5, sigma_b=0.05**0.5)), 4)
    0.9386
    """
    sigma_w, sigma_b = checked(sigma_w, sigma_b)
    q = q_star(phi, sigma_w=sigma_w, sigma_b=sigma_b) if q is None else checked(q)[0]
    return sigma_w**2 * slope_moment(phi, q)


@compiled
def chi_par(phi: AnyPhi, *, sigma_w: Real, sigma_b: Real = 0.0, q=None) -> Array:
    """Slope of the length map, d q_map / dq, at length q (default: q_star). Shape []; NaN where q_star is.

    A fixed point with |chi_par| < 1 attracts. The derivative is that of the Gaussian density, so phi'' is not needed: it is a
    delta function for relu, and left out by everybody who differentiates twice.
    """
    sigma_w, sigma_b = checked(sigma_w, sigma_b)
    q = q_star(phi, sigma_w=sigma_w, sigma_b=sigma_b) if q is None else checked(q)[0]
    return sigma_w**2 * length_slope(phi, q)


@compiled
def asymptotics(phi: AnyPhi, *, sigma_w: Real, sigma_b: Real = 0.0) -> Asymptotics:
    """Everything about the deep layers of a network at once, the fixed points found once. Arguments as for `q_map`."""
    sigma_w, sigma_b = checked(sigma_w, sigma_b)
    q = q_star(phi, sigma_w=sigma_w, sigma_b=sigma_b)
    c = c_star(phi, sigma_w=sigma_w, sigma_b=sigma_b, q=q)
    growth = chi_1(phi, sigma_w=sigma_w, q=q)
    along = chi_par(phi, sigma_w=sigma_w, q=q)
    at_c = jnp.where(growth <= 1, growth, chi(phi, jnp.where(growth <= 1, 0.0, c), q, sigma_w=sigma_w))
    return Asymptotics(q, c, growth, along, *(-1 / jnp.log(slope) for slope in (jnp.abs(along), at_c, growth)))


def depth_scales(phi: AnyPhi, *, sigma_w: Real, sigma_b: Real = 0.0) -> DepthScales:
    """The three depth scales at the fixed points q_star and c_star, in layers. Arguments as for `q_map`; NaN where q_star is."""
    return DepthScales(*asymptotics(phi, sigma_w=sigma_w, sigma_b=sigma_b)[-3:])


def phase(phi: AnyPhi, *, sigma_w: Real, sigma_b: Real = 0.0, tolerance: float = 1e-5) -> str:
    """"ordered", "critical" (|ln chi_1| <= tolerance), "chaotic", or "no fixed point". Of concrete numbers: it returns a word."""
    growth = float(chi_1(phi, sigma_w=sigma_w, sigma_b=sigma_b))
    if np.isnan(growth):
        return "no fixed point"
    if growth > 0 and abs(np.log(growth)) <= tolerance:
        return "critical"
    return "ordered" if growth < 1 else "chaotic"


def _excess(phi, sigma_w, sigma_b) -> Callable[[Array], Array]:
    return lambda q: sigma_w**2 * second_moment(phi, q) + sigma_b**2 - q


def _describe(phi, excess, q, sigma_w):
    slopes = jax.vmap(lambda q: (length_slope(phi, q), slope_moment(phi, q)))(jnp.where(jnp.isnan(q), 1.0, q))
    nan = jnp.where(jnp.isnan(q), jnp.nan, 0.0)
    return FixedPoints(q, sigma_w**2 * slopes[0] + nan, sigma_w**2 * slopes[1] + nan, jax.vmap(partial(residual, excess))(q))
