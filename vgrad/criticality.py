"""Criticality: at which sigma_w and sigma_b a network of a given activation keeps its gradient.

On the critical line chi_1 = sigma_w^2 E phi'^2 = 1 at the fixed point of the length. Taking that length q for the parameter, the
line is two quadratures and no search,

    sigma_w^2 = 1 / E phi'(u)^2,    sigma_b^2 = q - sigma_w^2 E phi(u)^2,    u ~ N(0, q).
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vgrad.base import Array
from vgrad.moments import AnyPhi, Real, all_roots, checked, compiled, length_slope, root, second_moment, slope_moment, table

__all__ = ["CriticalPoints", "Universality", "critical_line", "critical_points", "critical_sigma_w", "gain", "universality"]


class CriticalPoints(NamedTuple):
    """Points of the critical line, chi_1 = 1, at lengths that are fixed points; arrays of one shape.

    Attributes:
      q: the length. For a scale-invariant phi every length will do, and this is 1.
      sigma_w, sigma_b: stds that make it so. NaN where no real sigma_b does.
      chi_par: slope of the length map: below 1 the fixed point attracts, above 1 it repels, and iteration never finds it.
    """

    q: Array
    sigma_w: Array
    sigma_b: Array
    chi_par: Array


class Universality(NamedTuple):
    """How an activation behaves where chi_1 = chi_par = 1, so that neither the gradient nor the length runs away with depth.

    Attributes:
      kind: "scale-invariant" (like relu: the map leaves every length alone), "K*=0" (like tanh: at sigma_b = 0 the length decays,
        but only as a power of depth), "half-stable" (gelu, silu: a length > 0 that attracts from one side and repels on the
        other, so that iteration does not find it), or "none".
      sigma_w, sigma_b, q: the critical point and its length; for "none" the point of the critical line where chi_par is
        nearest to 1, NaN where the activation has no critical line at all.
      chi_par: slope of the length map there.
      power, rate: of the decay for "K*=0", q_map(q) = q - rate q^(1 + power) at small q, so that q^l ~ (rate power l)^(-1 / power).
        NaN for the others; power is inf for hard_tanh, which leaves small signals alone.
    """

    kind: str
    sigma_w: float
    sigma_b: float
    q: float
    chi_par: float
    power: float
    rate: float


@compiled
def critical_line(phi: AnyPhi, q) -> CriticalPoints:
    """The point of the critical line at length q: sigma_w^2 = 1 / E phi'^2, sigma_b^2 = q - sigma_w^2 E phi^2. Fields of shape [].

    Two quadratures, no root finding: vmap it over q to draw the edge of chaos.
    """
    (q,) = checked(q)
    sigma_w_sq = 1 / slope_moment(phi, q)
    length = sigma_w_sq * second_moment(phi, q)
    sigma_b_sq = jnp.where(jnp.abs(q - length) < 64 * jnp.finfo(q.dtype).eps * q, 0.0, q - length)
    real = (sigma_b_sq >= 0) & jnp.isfinite(sigma_w_sq)
    root = lambda v: jnp.where(v > 0, jnp.sqrt(jnp.where(v > 0, v, 1.0)), 0.0)  # noqa: E731  a finite derivative at 0
    found = CriticalPoints(q, root(sigma_w_sq), root(sigma_b_sq), sigma_w_sq * length_slope(phi, q))
    return CriticalPoints(*(jnp.where(real, v, jnp.nan) for v in found))


@compiled
def critical_points(phi: AnyPhi, sigma_b: Real = 0.0, *, num: int = 4) -> CriticalPoints:
    """All solutions of chi_1 = 1 at a given sigma_b in the order of their length; fields of shape [num], NaN where there are fewer.

    Every activation of the registry has one, or none: softplus at all, and relu and its kin with a bias, whose length grows without
    bound at any sigma_w that keeps the gradient. Look at chi_par: above 1, as for gelu and silu at a small sigma_b, the point
    repels, and a network set there leaves it.
    """
    (sigma_b,) = checked(sigma_b)

    def bias(q):  # sigma_b^2 along the critical line
        return q - second_moment(phi, q) / slope_moment(phi, q)

    lengths, values = table(bias, sigma_b.dtype)
    noise = jnp.abs(values) <= 4096 * jnp.finfo(values.dtype).eps * lengths
    scale_invariant = jnp.all(noise)
    # At sigma_b = 0 a length so small that nothing bends is a root to rounding; q = 0 stands for them all.
    values = jnp.where((sigma_b == 0) & noise, 0.0, values)
    roots = all_roots(lambda q: bias(q) - sigma_b**2, (lengths, values - sigma_b**2), num)
    any_length = jnp.where((jnp.arange(num) == 0) & (sigma_b == 0), 1.0, jnp.nan)
    roots = jnp.where(scale_invariant, any_length, roots)
    found = jax.vmap(partial(critical_line, phi))(roots)
    return found._replace(sigma_b=jnp.where(jnp.isnan(found.q), jnp.nan, sigma_b))


@compiled
def critical_sigma_w(phi: AnyPhi, sigma_b: Real = 0.0) -> Array:
    """The sigma_w at which chi_1 = 1, for a given sigma_b. Shape []; NaN where there is none.

    Where there are several the first whose length attracts (chi_par <= 1), and the first of all if none does: `critical_points` has
    them all.
    """
    found = critical_points(phi, sigma_b)
    order = jnp.where(jnp.isnan(found.q), 2, jnp.where(found.chi_par <= 1 + 1e-5, 0, 1))
    return found.sigma_w[jnp.argmin(order)]


def universality(phi: AnyPhi) -> Universality:
    """The universality class of an activation. Roberts, Yaida & Hanin, 2022, The Principles of Deep Learning Theory, chapter 5.

    By root finding on chi_par = 1 along the critical line, not by iterating the map. It returns a word, so it is not for use under
    `jit`. In float64 good to ten digits.
    """
    dtype = jnp.result_type(float)
    small, seen = float(jnp.finfo(dtype).eps) ** (1 / 3), _survey(phi)

    def point(kind, q, power=math.nan, rate=math.nan):
        found = critical_line(phi, q)
        sigma_w, sigma_b, chi_par = (float(v) for v in (found.sigma_w, found.sigma_b, found.chi_par))
        return Universality(kind, sigma_w, sigma_b, float(q), chi_par, power, rate)

    lengths, values, slopes = seen.lengths, seen.values, seen.slopes
    if bool(jnp.all(jnp.abs(values) <= 4096 * jnp.finfo(dtype).eps * lengths)):
        return point("scale-invariant", jnp.ones((), dtype))
    if float(seen.at_zero) == 0 and float(seen.slope) < 8 * small**2:
        near, far = (float(e) for e in seen.excess)
        if min(near, far) < 8 * small**2:
            return point("K*=0", jnp.zeros((), dtype), math.inf)
        power = math.log(far / near) / math.log(4)
        return point("K*=0", jnp.zeros((), dtype), power, near / small**power)
    real = (values >= 0) & jnp.isfinite(slopes) & (lengths >= small)
    falls = jnp.nonzero(real[:-1] & real[1:] & (slopes[:-1] > 0) & (slopes[1:] <= 0))[0]
    if falls.size:
        return point("half-stable", _half_stable(phi, q=lengths[falls[0]], q_0=lengths[falls[0] + 1]))
    if not bool(real.any()):
        return Universality("none", *(math.nan,) * 6)
    return point("none", lengths[jnp.argmin(jnp.where(real, jnp.abs(slopes), jnp.inf))])


class _Survey(NamedTuple):
    lengths: Array
    values: Array  # sigma_b^2 along the critical line
    slopes: Array  # chi_par - 1 there
    at_zero: Array  # phi(0)^2
    slope: Array  # chi_par - 1 at a small length
    excess: Array  # 1 - q_map(q) / q at two small lengths, sigma_b = 0 and the sigma_w that is critical for vanishing signals


@compiled
def _survey(phi):
    dtype = jnp.result_type(float)
    small, zero = jnp.asarray(float(jnp.finfo(dtype).eps) ** (1 / 3), dtype), jnp.zeros((), dtype)
    lengths, values = table(lambda q: q - second_moment(phi, q) / slope_moment(phi, q), dtype)
    excess = [1 - second_moment(phi, q) / (q * slope_moment(phi, zero)) for q in (small, 4 * small)]
    slopes = jax.vmap(partial(_slope, phi))(jnp.concatenate([lengths, small[None]]))
    return _Survey(lengths, values, slopes[:-1], second_moment(phi, zero), slopes[-1], jnp.stack(excess))


@compiled
def _half_stable(phi, *, q, q_0):
    """Where chi_par is 1 on the critical line between two lengths."""
    return root(partial(_slope, phi), q, q_0)


def _slope(phi, q):
    """chi_par - 1 along the critical line, which need not be real there."""
    return length_slope(phi, q) / slope_moment(phi, q) - 1


def gain(phi: AnyPhi, mode: str = "forward", *, q: Real = 1.0) -> Array:
    """The sigma_w that preserves one second moment at preactivations of variance q. Shape [].

    "forward": E h^2 = 1 / sigma_w^2, so that the variance is 1 again after the next weights, sigma_w = 1 / sqrt(E phi^2) at q = 1.
    "backward": that of the gradient, sigma_w = 1 / sqrt(E phi'^2). For relu both are sqrt 2, for other phi they differ, and no
    value of `calculate_gain` in PyTorch but those of relu and linear is either of them. inf where phi (or phi') vanishes.
    """
    if mode not in ("forward", "backward"):
        raise ValueError(f"mode is {mode!r}, expected 'forward' or 'backward'.")
    return _gains(phi, q=q)[("forward", "backward").index(mode)]


@compiled
def _gains(phi, *, q):
    (q,) = checked(q)
    return jnp.sqrt(q / second_moment(phi, q)), lax.rsqrt(slope_moment(phi, q))
