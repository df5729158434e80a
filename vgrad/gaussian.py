"""Gaussian expectations, E f(z) for z ~ N(mean, q) and E f(u1) g(u2) for correlated pairs: the one place with a quadrature.

In units of the standard deviation, y = (z - mean) / sqrt(q), the line |y| < 9.5 is cut at y = 0, at z = 0 and at the breakpoints
of f, and on each piece [a, b] the trapezoidal rule runs in t,

    y = a + (b - a) s(t),    s(t) = 1 / (1 + exp(-t)),    |t| < 20,

whose nodes crowd toward both ends on a logarithmic scale. So a feature of f at a cut is resolved whatever its width: tanh has the
width 1/sqrt(q) in y, and it makes no difference whether q is 1e-12 or 1e+6. Gauss-Hermite, with its nodes spread evenly, sees a
step there and is off by percents at q = 100. Declared kinks cost nothing, nor do jumps, save of phi in a `series`: percents.

Correlated pairs of one activation have a series in the Hermite coefficients a_k(q) = E[phi(sqrt(q) y) He_k(y)] / sqrt(k!),

    E phi(u1) phi(u2) = sum_k a_k(q1) a_k(q2) c^k        (Mehler),

from one-dimensional integrals only. For a kinked phi it converges slowly near |c| = 1, so the kinks are taken out first,
phi = smooth + sum_b jump_b max(z - b, 0), and their pairs are put back in closed form.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtr

from vgrad import activations
from vgrad.base import Array, Phi

__all__ = ["Series", "coefficients", "correlator", "expect", "expect_pair", "rule_options", "series"]

_REACH = 9.5  # standard deviations; the density there is 1e-20


def _trapezoid(step):
    """s(-t), s(t) and weights of the rule on [0, 1]; its two ends stand also for what lies beyond them."""
    t = np.arange(-round(20 / step), round(20 / step) + 1) * step
    left, right = 1 / (1 + np.exp(t)), 1 / (1 + np.exp(-t))
    weight = step * left * right
    weight[[0, -1]] += step / np.expm1(step) * right[0]
    return left, right, weight


_LEFT, _RIGHT, _WEIGHT = _trapezoid(0.17)
_EVEN, NUM_TERMS = np.linspace(-_REACH, _REACH, 2**14), 192


def rule_options(phi: str | Phi | activations.Activation) -> dict[str, Any]:
    """What `expect` should know of an activation: its breakpoints, and whether it oscillates."""
    facts = activations.facts(phi)
    return {"breakpoints": facts.breakpoints, "oscillates": facts.oscillates}


def expect(f: Callable, q, *, mean=0.0, breakpoints: tuple[float, ...] = (), oscillates: bool = False) -> Array:
    """E f(z), z ~ N(mean, q).

    Args:
      f: elementwise, of an array [n] to [..., n]: several integrands may be stacked in front.
      q: variance, >= 0; 0 gives f next to the mean. Shape [], traceable.
      mean: Shape [], traceable.
      breakpoints: where f has kinks, jumps, or features narrower than their distance from zero. Zero itself is always one.
      oscillates: f is like sin: it has structure at all z. An even grid of 16,384 nodes then, good for frequency * sqrt(q) < 2,000.
    Returns:
      [...], in the dtype of q. Relative error in float64 below 1e-10 for every smooth activation of the registry, its derivative,
      and their squares, q from 1e-12 to 1e6, and for the kinked ones too as their breakpoints are declared. Kinks that are not
      declared cost about 1e-3. NaN where f grows so fast that |z| > 9.5 sqrt(q) matters, exp(z^2) for instance, where f itself is
      NaN, or for a negative q. Derivatives in q and mean are those of the density, so f may have jumps.
    """
    at_zero, (q, mean) = isinstance(mean, float) and mean == 0, _floats(q, mean)  # then y = 0 and z = 0 are one cut
    side = float(jnp.finfo(q.dtype).tiny) ** 0.75  # at q = 0 both sides of the mean are seen still, and its square is 0
    std, centre = jnp.maximum(jnp.sqrt(lax.stop_gradient(q)), side), lax.stop_gradient(mean)
    cuts = [b for b in breakpoints if not isinstance(b, float) or b] if at_zero else [0.0, *breakpoints]
    y, weight = _nodes([(b - centre) / jnp.maximum(std, 1e-15) for b in cuts], oscillates, q.dtype)
    values = f(centre + std * y)
    total = jnp.dot(values, weight * _density_ratio(y, q, mean), precision="highest")
    far, edge = jnp.abs(values[..., jnp.array([0, -1])]).max(-1), jnp.abs(centre) + _REACH * std
    # Heavy beyond the reach, and steeper than any polynomial one meets: the tail may well be all there is of a tame f.
    heavy = (far * math.exp(-0.5 * _REACH**2) > 1e-9 * jnp.abs(total)) & (jnp.log(far) > 8 * jnp.log(_REACH**2 + jnp.square(edge)))
    return jnp.where(heavy | ~jnp.isfinite(total) | ~(q >= 0) | jnp.isnan(mean), jnp.nan, total)


@jax.custom_jvp
def _density_ratio(y, q, mean):
    """The density at the nodes as a function of q and mean over what it is at their values: 1, with derivatives of all orders."""
    return jnp.ones_like(y) + 0 * (q + mean)  # vmap must see that it depends on them, or its derivative loses an axis


@_density_ratio.defjvp
def _(primals, tangents):
    y, q, mean = primals
    _, dq, dmean = tangents
    inverse = lax.rsqrt(_positive(q))
    y = (lax.stop_gradient(1 / inverse) * y + lax.stop_gradient(mean) - mean) * inverse  # of the same z, whatever q and mean do
    growth = 0.5 * (jnp.square(y) - 1) * jnp.square(inverse) * dq + y * inverse * dmean
    ratio = _density_ratio(*primals)
    return ratio, ratio * growth


def expect_pair(f1: Callable, f2: Callable, q1, q2, c, *, breakpoints: tuple = (), oscillates: bool = False) -> Array:
    """E f1(u1) f2(u2) for Gaussians of mean zero, variances q1 and q2 and correlation c in [-1, 1].

    Two nested rules of `expect`, u2 given u1, cut wherever either function is: for any f1 and f2 with these breakpoints, and as
    precise as `expect`, at a million values of f2. `correlator` is cheaper where both are the same activation. Arguments, NaN and
    derivatives as for `expect`; the derivative in c loses digits in proportion to 1 / (1 - |c|).
    """
    q1, q2, c = _floats(q1, q2, c)
    slope = c * jnp.sqrt(_positive(q2) / _positive(q1))
    steep = jnp.where(jnp.abs(slope) < 1e-9, 1e-9, slope)
    options: Any = {"breakpoints": breakpoints, "oscillates": oscillates}
    given = jax.vmap(lambda u1: expect(f2, q2 * (1 - c) * (1 + c), mean=slope * u1, **options))
    cuts = (*breakpoints, *(b / lax.stop_gradient(steep) for b in breakpoints if b))
    return expect(lambda u1: f1(u1) * given(u1), q1, breakpoints=cuts, oscillates=oscillates)


class Series(NamedTuple):
    """Hermite coefficients of an activation at one variance and mean, its kinks kept apart; K terms, M breakpoints.

    Attributes:
      smooth, slopes: a_k of phi without its kinks, and of its derivative. Shape [K].
      kinks, steps: a_k of sum_b jump_b max(z - b, 0) and of its derivative, in closed form. Shape [K].
      jumps: phi'(b+) - phi'(b-). Shape [M].
      cuts: (b - mean) / std. Shape [M].
      std: sqrt(q). Shape [].
      tail: root of what the terms leave out of E phi^2, and the power of c that it goes with, even and odd. Shape [2, 2].
    """

    smooth: Array
    slopes: Array
    kinks: Array
    steps: Array
    jumps: Array
    cuts: Array
    std: Array
    tail: Array


def series(phi: str | Phi | activations.Activation, q, *, mean=0.0) -> Series:
    """The `Series` of an activation for z ~ N(mean, q).

    192 terms, and one for all the rest: c to the power that makes value and slope at c = ±1 right, which are known from E phi^2,
    E phi'^2 and E phi(mean + v) phi(mean - v). In units of E phi^2 the error is 1e-11 for smooth phi up to q = 10, but 4e-9 for
    tanh, which nears a step: 6e-5 at q = 100, 1e-3 at 1000. It vanishes at |c| = 1, and is below 1e-11 for |c| < 0.9.
    """
    facts = activations.facts(phi)
    mean_given, (q, mean) = mean, _floats(q, mean)
    std = jnp.sqrt(_positive(q))
    breaks = [float(b) for b in facts.breakpoints]
    jumps = jnp.stack([_jump(facts.phi, b, q.dtype) for b in breaks]) if breaks else jnp.zeros(0, q.dtype)
    cuts = (jnp.asarray(breaks, q.dtype) - mean) / std
    y, weight = (jnp.asarray(a, q.dtype) for a in _HERMITE_NODES)
    z = mean + std * y

    def smooth(z):
        return facts.phi(z) - sum((jump * jnp.maximum(z - b, 0) for jump, b in zip(jumps, breaks, strict=True)), jnp.zeros_like(z))

    both = jnp.stack(jax.jvp(smooth, (z,), (jnp.ones_like(z),))) * weight[None]
    rest, slopes = jnp.dot(both, jnp.asarray(_HERMITE.T, q.dtype), precision="highest")
    kinks, steps = (jnp.dot(a, jumps, precision="highest") for a in _kink(cuts))
    tail = jnp.zeros((2, 2), q.dtype) if facts.oscillates else _tail(smooth, facts, q, mean, mean_given, rest, slopes)
    return Series(rest, slopes, std * kinks, steps, jumps, cuts, std, tail)


def _tail(smooth, facts, q, mean, mean_given, values, slopes):
    """The last term: what the others leave out at c = 1 and c = -1 fixes its even and its odd part, and the power of each."""

    def both_ways(z):
        (h, slope), (h2, slope2) = (jax.jvp(smooth, (u,), (jnp.ones_like(u),)) for u in (z, 2 * mean - z))
        return jnp.stack([h * h, h * h2, slope * slope, slope * slope2])

    centred = isinstance(mean_given, float) and mean_given == 0
    where = {"mean": 0.0 if centred else mean, "breakpoints": (*facts.breakpoints, *(() if centred else (2 * mean,)))}
    signs = jnp.asarray((-1.0) ** np.arange(NUM_TERMS), q.dtype)
    known = jnp.stack([jnp.sum(v) for t in (jnp.square(values), jnp.square(slopes)) for v in (t, signs * t)])
    whole = expect(both_ways, q, **where)
    h, mirrored, slope, slope_mirrored = whole - known
    left_out = jnp.stack([h + mirrored, h - mirrored]) / 2
    steep = q * jnp.stack([slope - slope_mirrored, slope + slope_mirrored]) / 2
    real = left_out > 64 * jnp.finfo(q.dtype).eps * whole[0]
    left_out = jnp.where(real, left_out, 1.0)
    return jnp.stack([jnp.where(real, jnp.sqrt(left_out), 0.0), jnp.clip(steep / left_out, NUM_TERMS, 1e9)])


def coefficients(f: Callable, q, *, num: int = NUM_TERMS) -> Array:
    """E[f(sqrt(q) y) He_k(y)] / sqrt(k!) [..., num], num <= 192, of f from [n] to [..., n]. Jumps of f, but at 0, cost digits."""
    (q,) = _floats(q)
    y, weight = (jnp.asarray(a, q.dtype) for a in _HERMITE_NODES)
    values = f(jnp.sqrt(_positive(q)) * y)
    return jnp.dot(values * jnp.broadcast_to(weight, values.shape), jnp.asarray(_HERMITE[:num].T, q.dtype), precision="highest")


def correlator(a: Series, b: Series) -> Callable[[Any], tuple[Array, Array]]:
    """From two `Series` of one activation, c [] -> (E phi(u1) phi(u2), E phi'(u1) phi'(u2)), for correlation c in [-1, 1].

    The second is d/dc of the first over std1 * std2 (Price, 1958). Better so than by autodiff, where phi has kinks: the second
    derivative is infinite at |c| = 1.
    """
    values = a.smooth * b.smooth + a.smooth * b.kinks + a.kinks * b.smooth
    slopes = a.slopes * b.slopes + a.slopes * b.steps + a.steps * b.slopes
    coefficients = jnp.stack([values, slopes], axis=-1)[::-1]
    jumps = a.jumps[:, None] * b.jumps[None]
    h, k = a.cuts[:, None], b.cuts[None]

    def at(c):
        c = jnp.clip(c, -1, 1)
        (value, slope), _ = lax.scan(lambda total, x: (total * c + x, None), 0 * coefficients[0] * c, coefficients, unroll=16)
        size, sign = jnp.maximum(jnp.abs(c), 0.5), jnp.where(c < 0, -1.0, 1.0)  # below a half nothing is left of such powers
        power = 0.5 * (a.tail[1] + b.tail[1])
        term = a.tail[0] * b.tail[0] * jnp.stack([jnp.ones_like(sign), sign]) * jnp.exp(power * jnp.log(size))
        value, slope = value + jnp.sum(term), slope + jnp.sum(power * term) / (sign * size * a.std * b.std)
        if not jumps.size:
            return value, slope
        s = jnp.sqrt(_positive((1 - c) * (1 + c)))
        both = _orthant(h, k, c)
        kinks = (c + h * k) * both - k * _density(h) * ndtr((c * h - k) / s) - h * _density(k) * ndtr((c * k - h) / s)
        kinks += s * jnp.exp(-0.5 * (jnp.square(h) + jnp.square((k - c * h) / s))) / (2 * np.pi)
        return value + a.std * b.std * jnp.sum(jumps * kinks), slope + jnp.sum(jumps * both)

    return at


def _floats(*args):
    dtype = jnp.result_type(float, *(a for a in args if isinstance(a, jax.Array)))
    return [jnp.asarray(a, dtype) for a in args]


def _positive(q):
    return jnp.maximum(q, 1e-30)


def _density(y):
    return jnp.exp(-0.5 * jnp.square(y)) / math.sqrt(2 * math.pi)


def _nodes(cuts, oscillates, dtype):
    """Nodes y and weights, density included, cut at `cuts` [M]."""
    if oscillates:
        y = jnp.asarray(_EVEN, dtype)
        return y, _density(y) * (2 * _REACH / (_EVEN.size - 1))
    ends = jnp.sort(jnp.clip(jnp.stack([jnp.asarray(c, dtype) for c in (-_REACH, 0, _REACH, *cuts)]), -_REACH, _REACH))
    a, b = ends[:-1, None], ends[1:, None]
    y = a * jnp.asarray(_LEFT[None], dtype) + b * jnp.asarray(_RIGHT[None], dtype)
    return y.ravel(), (_density(y) * (b - a) * jnp.asarray(_WEIGHT[None], dtype)).ravel()


def _jump(phi, b, dtype):
    """phi'(b+) - phi'(b-), a hair to either side of b."""
    b = np.asarray(b, dtype)
    sides = [np.nextafter(b, np.asarray(way, dtype)) if b else np.asarray(way * 1e-30, dtype) for way in (-1e9, 1e9)]
    left, right = (jax.jvp(phi, (jnp.asarray(side),), (jnp.ones((), dtype),))[1] for side in sides)
    return right - left


def _hermite_functions(y, num):
    """He_k(y) / sqrt(k!), k < num, stacked in front. Normalised so, they neither over- nor underflow."""
    up, by = np.sqrt(np.arange(num)), np.sqrt(np.arange(1, num + 1))
    if not isinstance(y, np.ndarray):
        up, by, zero = jnp.asarray(up, y.dtype), jnp.asarray(by, y.dtype), jnp.zeros_like(y)
        return lax.scan(lambda rows, k: (((y * rows[0] - k[0] * rows[1]) / k[1], rows[0]), rows[0]), (zero + 1, zero), (up, by))[1]
    rows = [np.zeros_like(y), np.ones_like(y)]
    for k in range(num - 1):
        rows.append((y * rows[-1] - up[k] * rows[-2]) / by[k])
    return np.stack(rows[1:])


def _orthant(h, k, c):
    """P(x > h, y > k) of standard normals of correlation c []: Plackett's integral over the angle. h [M, 1], k [1, M] -> [M, M]."""
    angle = jnp.arcsin(c)
    left, right, weight = (jnp.asarray(a, c.dtype)[None, None] for a in _trapezoid(0.4))
    # sin and cos of theta from its distance to a right angle, where 1 - sin would be rounding noise
    gap = jnp.where(angle > 0, 0.5 * np.pi - angle + angle * left, 0.5 * np.pi - angle * right)
    h, k = h[:, :, None], k[:, :, None]
    quadratic = jnp.square(h - k) + 4 * h * k * jnp.square(jnp.sin(0.5 * gap))
    quadratic = jnp.maximum(quadratic, 0) / (2 * jnp.square(jnp.maximum(jnp.sin(gap), 1e-15)))
    integral = angle * jnp.sum(jnp.exp(-quadratic) * weight, axis=-1)
    return ndtr(-h[:, :, 0]) * ndtr(-k[:, :, 0]) + integral / (2 * np.pi)


def _kink(h):
    """Hermite coefficients of max(y - h, 0) and of its derivative, h [M] -> two of [K, M]."""
    near = jnp.clip(h, -12, 12)  # beyond, the density has nothing left of them
    root = jnp.sqrt(jnp.arange(1, NUM_TERMS, dtype=h.dtype))[:, None]
    first = lambda v, rest: jnp.concatenate([v[None], rest])  # noqa: E731
    steps = first(ndtr(-h), _density(near)[None] * _hermite_functions(near, NUM_TERMS - 1) / root)
    return first(_density(h) - h * ndtr(-h), steps[:-1] / root), steps


def _hermite_rule():
    """Nodes and weights [n] and He_k / sqrt(k!) [K, n]: even as far as the Hermite functions oscillate, crowded toward zero."""
    t = np.arange(-20, 13.5, 0.15)
    half, weight = np.log1p(np.exp(t)), 0.15 / (1 + np.exp(-t))
    weight[0] *= 1 / -np.expm1(-0.15)
    y = np.concatenate([-half[::-1], half])
    weight = np.concatenate([weight[::-1], weight]) * np.exp(-0.5 * np.square(y)) / math.sqrt(2 * math.pi)
    return (y, weight), _hermite_functions(y, NUM_TERMS)


_HERMITE_NODES, _HERMITE = _hermite_rule()
