"""Expectations against mpmath, closed forms and Monte Carlo."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import integrate

from vgrad import activations, gaussian

SMOOTH = ["identity", "sigmoid", "tanh", "erf", "softplus", "gelu", "gelu_tanh", "silu"]
KINKED = ["relu", "leaky_relu", "hard_tanh", "elu", "selu"]
LENGTHS = [1e-12, 1e-6, 1e-2, 1.0, 100.0, 1e4, 1e6]

_s = lambda z: 1 / (1 + mpmath.exp(-z))  # noqa: E731
_lam, _alpha = mpmath.mpf("1.0507009873554805"), mpmath.mpf("1.6732632423543772")
_u = lambda z: 2 * mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3)  # noqa: E731
# phi and phi' written afresh in mpmath
REFERENCE = {
    "identity": (lambda z: z, lambda z: mpmath.mpf(1)),
    "sigmoid": (_s, lambda z: _s(z) * _s(-z)),
    "tanh": (mpmath.tanh, lambda z: mpmath.sech(z) ** 2),
    "erf": (mpmath.erf, lambda z: 2 / mpmath.sqrt(mpmath.pi) * mpmath.exp(-(z**2))),
    "softplus": (lambda z: mpmath.log1p(mpmath.exp(z)) if z < 0 else z + mpmath.log1p(mpmath.exp(-z)), _s),
    "gelu": (lambda z: z * mpmath.ncdf(z), lambda z: mpmath.ncdf(z) + z * mpmath.npdf(z)),
    "gelu_tanh": (
        lambda z: z * _s(_u(z)),
        lambda z: _s(_u(z)) + z * _s(_u(z)) * _s(-_u(z)) * 2 * mpmath.sqrt(2 / mpmath.pi) * (1 + 3 * mpmath.mpf("0.044715") * z**2),
    ),
    "silu": (lambda z: z * _s(z), lambda z: _s(z) + z * _s(z) * _s(-z)),
    "relu": (lambda z: max(z, 0), lambda z: mpmath.mpf(z > 0)),
    "leaky_relu": (lambda z: z if z > 0 else z / 100, lambda z: mpmath.mpf(1) if z > 0 else mpmath.mpf("0.01")),
    "hard_tanh": (lambda z: max(min(z, 1), -1), lambda z: mpmath.mpf(abs(z) < 1)),
    "elu": (lambda z: z if z > 0 else mpmath.expm1(z), lambda z: mpmath.mpf(1) if z > 0 else mpmath.exp(z)),
    "selu": (
        lambda z: _lam * z if z > 0 else _lam * _alpha * mpmath.expm1(z),
        lambda z: _lam if z > 0 else _lam * _alpha * mpmath.exp(z),
    ),
}


def moments(name):
    """The integrands phi, phi^2, phi', phi'^2, stacked."""

    def f(z):
        h, slope = jax.jvp(activations.get(name), (z,), (jnp.ones_like(z),))
        return jnp.stack([h, h * h, slope, slope * slope])

    return f


@jax.jit
def all_moments(lengths):
    """[activation, length, 4], in one program."""
    one = lambda name: jax.vmap(lambda q: gaussian.expect(moments(name), q, **gaussian.rule_options(name)))(lengths)  # noqa: E731
    return jnp.stack([one(name) for name in SMOOTH + KINKED])


@pytest.fixture(scope="module")
def computed():
    with jax.enable_x64(True):
        return np.asarray(all_moments(jnp.asarray(LENGTHS)))


def by_mpmath(name, q):
    """E phi^2 and E phi'^2 by Gauss-Legendre on pieces that end wherever the integrand changes its scale; 25 digits."""
    with mpmath.workdps(25):
        std = mpmath.sqrt(mpmath.mpf(q))
        marks = {0} | {s * b for b in (1, 4, 16, 60) for s in (-1, 1)}  # of phi, in z
        cuts = sorted({-12, 12} | {m / std for m in marks if abs(m / std) < 12} | {s * y for y in (1, 3, 6) for s in (-1, 1)})

        def moment(f):
            value, error = mpmath.quad(lambda y: f(std * y) * mpmath.npdf(y), cuts, error=True, method="gauss-legendre")
            assert error < 1e-13 * abs(value) + 1e-30
            return float(value)

        phi, slope = REFERENCE[name]
        return [moment(f) for f in (lambda z: phi(z) ** 2, lambda z: slope(z) ** 2)]


# Where each is hardest: for saturating ones large lengths, for all where phi bends within a standard deviation.
@pytest.mark.parametrize("name", SMOOTH + KINKED)
def test_second_moments_to_ten_digits(name, computed):
    for q in (1e-12, 1.0, 100.0, 1e6):
        found = computed[(SMOOTH + KINKED).index(name), LENGTHS.index(q), [1, 3]]
        np.testing.assert_allclose(found, by_mpmath(name, q), rtol=1e-10)


def test_closed_forms_at_all_lengths(computed):
    row = lambda name: computed[(SMOOTH + KINKED).index(name)]  # noqa: E731
    q = np.asarray(LENGTHS)
    np.testing.assert_allclose(row("identity")[:, 1], q, rtol=1e-12)
    np.testing.assert_allclose(row("relu"), np.stack([np.sqrt(q / 2 / np.pi), q / 2, 0.5 + 0 * q, 0.5 + 0 * q], 1), rtol=1e-11)
    # E erf^2 = (2/pi) asin(2q / (1 + 2q)) and E erf'^2 = (4/pi) / sqrt(1 + 4q). Williams, 1998.
    erf = np.stack([2 / np.pi * np.arcsin(2 * q / (1 + 2 * q)), 4 / np.pi / np.sqrt(1 + 4 * q)], axis=1)
    np.testing.assert_allclose(row("erf")[:, [1, 3]], erf, rtol=1e-10)
    np.testing.assert_allclose(row("sigmoid")[:, 0], 0.5, rtol=1e-12)


def test_sin_in_closed_form(x64):
    expect = jax.jit(lambda q: gaussian.expect(moments("sin"), q, oscillates=True))
    for q in (1e-12, 0.3, 25.0, 1e4, 1e6):
        expected = [0, -np.expm1(-2 * q) / 2, np.exp(-q / 2), (1 + np.exp(-2 * q)) / 2]
        np.testing.assert_allclose(expect(q), expected, rtol=1e-10, atol=1e-13)


def test_what_is_not_declared_costs_what_is_said(x64):
    """A kink at 0.7 that the rule does not know: three digits; declared: ten. And a mean."""
    phi, q, mean = (lambda z: jnp.maximum(z - 0.7, 0)), 2.0, 0.4
    h = (0.7 - mean) / np.sqrt(q)
    with mpmath.workdps(25):
        expected = float(mpmath.quad(lambda y: (mpmath.sqrt(2) * (y - h)) ** 2 * mpmath.npdf(y), [h, 4, 14]))
    expect = lambda breakpoints: gaussian.expect(lambda z: jnp.square(phi(z)), q, mean=mean, breakpoints=breakpoints)  # noqa: E731
    declared, not_declared = jax.jit(lambda: (expect((0.7,)), expect(())))()
    np.testing.assert_allclose(declared, expected, rtol=1e-8)
    np.testing.assert_allclose(not_declared, expected, rtol=3e-3)


def test_float32(computed):
    with jax.enable_x64(False):
        found = np.asarray(all_moments(jnp.asarray(LENGTHS, jnp.float32)))
    assert found.dtype == np.float32
    # elu at q = 1e-12: exp(z) - 1 of a z of 1e-6 has lost nothing, thanks to expm1.
    np.testing.assert_allclose(found[:, :, [1, 3]], computed[:, :, [1, 3]], rtol=2e-5)


def test_derivatives_in_the_length_and_the_mean(x64):
    """Against closed forms, through the jump of relu' too; and in float32."""
    slope = lambda z: jnp.where(z > 0, 1.0, 0.0)  # noqa: E731
    expect = lambda q, mean: gaussian.expect(slope, q, mean=mean, breakpoints=(0.0,))  # noqa: E731  ndtr(mean / sqrt q)
    q, mean = 2.0, 0.5
    y = mean / np.sqrt(q)
    density = np.exp(-(y**2) / 2) / np.sqrt(2 * np.pi)
    first = jax.jit(jax.grad(expect, argnums=(0, 1)))(q, mean)
    np.testing.assert_allclose(first, [-density * y / (2 * q), density / np.sqrt(q)], rtol=1e-9)
    second = jax.jit(jax.grad(jax.grad(expect, argnums=1), argnums=1))(q, mean)
    np.testing.assert_allclose(second, -density * y / q, rtol=1e-9)
    erf = lambda q: gaussian.expect(lambda z: jnp.square(jax.lax.erf(z)), q)  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.grad(erf))(q), 4 / np.pi / ((1 + 2 * q) * np.sqrt(1 + 4 * q)), rtol=1e-9)
    with jax.enable_x64(False):
        found = jax.jit(jax.grad(erf))(jnp.float32(q))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, 4 / np.pi / ((1 + 2 * q) * np.sqrt(1 + 4 * q)), rtol=1e-5)


@pytest.mark.parametrize(
    ("f", "q"),
    [
        (lambda z: jnp.exp(jnp.square(z)), 0.6),  # diverges from q = 1/2 on
        (lambda z: jnp.exp(jnp.square(z)), 0.45),  # converges, beyond what the rule sees
        (jnp.square, -1.0),
        (jnp.square, np.nan),
        (lambda z: jnp.where(z > 1, jnp.nan, z), 1.0),
    ],
)
def test_what_cannot_be_integrated_is_nan(f, q, x64):
    at = jax.jit(lambda q: (gaussian.expect(f, q), gaussian.expect(lambda z: jnp.exp(jnp.square(z)), 0.2)))
    unknown, known = at(q)
    assert np.isnan(unknown)
    assert np.isfinite(known)


# Pairs


def erf_pair(q1, q2, c):
    k = c * np.sqrt(q1 * q2)
    root = np.sqrt((1 + 2 * q1) * (1 + 2 * q2) - 4 * k**2)
    return 2 / np.pi * np.arcsin(2 * k / np.sqrt((1 + 2 * q1) * (1 + 2 * q2))), 4 / np.pi / root


def relu_pair(q1, q2, c):
    angle = np.arccos(c)  # Cho & Saul, 2009 (arXiv:1405.3566), eq. 3 and 6
    return np.sqrt(q1 * q2) / (2 * np.pi) * (np.sin(angle) + (np.pi - angle) * c), (np.pi - angle) / (2 * np.pi)


def sin_pair(q1, q2, c):
    k, half = c * np.sqrt(q1 * q2), np.exp(-(q1 + q2) / 2)
    return half * np.sinh(k), half * np.cosh(k)


CORRELATIONS = np.array([-1.0, -0.999, -0.6, 0.0, 1e-3, 0.5, 0.99, 1 - 1e-6, 1.0])


def pairs(phi, q1, q2, mean=0.0):
    @jax.jit
    def run(c):
        a = gaussian.series(phi, q1, mean=mean)
        return jax.vmap(gaussian.correlator(a, a if q1 == q2 else gaussian.series(phi, q2, mean=mean)))(c)

    return [np.asarray(v) for v in run(CORRELATIONS)]


@pytest.mark.parametrize(
    ("phi", "exact", "q"), [("erf", erf_pair, (0.3, 1.2)), ("relu", relu_pair, (0.5, 300.0)), ("sin", sin_pair, (0.4, 1.0))]
)
def test_pairs_in_closed_form(phi, exact, q, x64):
    value, slope = pairs(phi, *q)
    expected = exact(*q, CORRELATIONS)
    np.testing.assert_allclose(value, expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(slope, expected[1], rtol=1e-7, atol=1e-9)


def by_nested_quad(phi, q1, q2, c, cuts):
    """E phi(u1) phi(u2) by SciPy in the plane."""
    s = np.sqrt(1 - c * c)

    def inner(y):
        marks = [(b / np.sqrt(q2) - c * y) / s for b in cuts]
        marks = [m for m in marks if abs(m) < 9] or None
        f = lambda x: phi(np.sqrt(q2) * (c * y + s * x)) * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)  # noqa: E731
        return integrate.quad(f, -9, 9, points=marks, limit=200, epsabs=1e-12)[0]

    outer = lambda y: phi(np.sqrt(q1) * y) * inner(y) * np.exp(-y * y / 2) / np.sqrt(2 * np.pi)  # noqa: E731
    marks = [b / np.sqrt(q1) for b in cuts] or None
    return integrate.quad(outer, -9, 9, points=marks, limit=200, epsabs=1e-11)[0]


@pytest.mark.parametrize(
    ("phi", "plain", "cuts"),
    [("hard_tanh", lambda z: np.clip(z, -1, 1), (-1.0, 1.0)), ("selu", None, (0.0,)), ("silu", lambda z: z / (1 + np.exp(-z)), ())],
)
def test_pairs_against_scipy(phi, plain, cuts, x64):
    plain = plain or (lambda z: 1.0507009873554805 * (z if z > 0 else 1.6732632423543772 * np.expm1(z)))
    value, slope = pairs(phi, 2.0, 0.7)
    for i in (2, 6):
        c = CORRELATIONS[i]
        np.testing.assert_allclose(value[i], by_nested_quad(plain, 2.0, 0.7, c, cuts), rtol=1e-7)
    h = 1e-4  # Price: d/dc of the first is sqrt(q1 q2) times the second
    ends = [by_nested_quad(plain, 2.0, 0.7, 0.5 + d, cuts) for d in (-h, h)]
    np.testing.assert_allclose(slope[5], (ends[1] - ends[0]) / (2 * h) / np.sqrt(1.4), rtol=1e-5)


def test_pairs_with_a_mean_against_draws(x64):
    rng, q, mean, c = np.random.default_rng(0), 1.5, 0.8, 0.5
    y = rng.standard_normal((2, 400_000))
    u = mean + np.sqrt(q) * np.stack([y[0], c * y[0] + np.sqrt(1 - c * c) * y[1]])
    for phi, plain in (("tanh", np.tanh), ("relu", lambda z: np.maximum(z, 0))):
        draws = plain(u[0]) * plain(u[1])
        value, _ = pairs(phi, q, q, mean)
        assert abs(value[5] - draws.mean()) < 4 * draws.std() / np.sqrt(draws.size)


def test_expect_pair_of_two_functions(x64):
    """E erf(u1) 1[u2 > 0]: half of E erf erf with one infinitely steep."""
    q1, q2, c = 0.8, 3.0, 0.6
    step = lambda z: jnp.where(z > 0, 1.0, 0.0)  # noqa: E731
    pair = lambda c: gaussian.expect_pair(jax.lax.erf, step, q1, q2, c, breakpoints=(0.0,))  # noqa: E731
    a = np.sqrt(2 * q1 / (1 + 2 * q1))
    found, slope = jax.jit(lambda c: jax.jvp(pair, (c,), (jnp.ones_like(c),)))(c)
    np.testing.assert_allclose(found, np.arcsin(a * c) / np.pi, rtol=1e-9)
    np.testing.assert_allclose(slope, a / np.pi / np.sqrt(1 - (a * c) ** 2), rtol=1e-7)


def test_coefficients(x64):
    """relu at q = 1: a_0 = 1/sqrt(2 pi), a_1 = 1/2, a_2 = a_0 / sqrt 2, a_3 = 0. And z^2 = He_2 + 1."""
    found = jax.jit(lambda q: gaussian.coefficients(lambda z: jnp.stack([jnp.maximum(z, 0), jnp.square(z)]), q, num=4))(1.0)
    a = 1 / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(found, [[a, 0.5, a / np.sqrt(2), 0], [1, 0, np.sqrt(2), 0]], atol=1e-9)
