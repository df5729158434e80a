"""Critical points and universality classes against closed forms and against SciPy's quadrature of their definitions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, special

from vgrad import meanfield as mf

sigmoid = special.expit
SLOPES = {  # phi and phi' written afresh
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    "gelu": (lambda z: z * special.ndtr(z), lambda z: special.ndtr(z) + z * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)),
    "silu": (lambda z: z * sigmoid(z), lambda z: sigmoid(z) * (1 + z * sigmoid(-z))),
}


def gauss(f, q):
    weight = lambda y: np.exp(-y * y / 2) / np.sqrt(2 * np.pi)  # noqa: E731
    return integrate.quad(lambda y: f(np.sqrt(q) * y) * weight(y), -12, 12, points=[0], epsabs=1e-14, epsrel=1e-12, limit=300)[0]


def maps(name, q, sigma_w, sigma_b):
    """q_map, chi_1 and chi_par at q by SciPy."""
    phi, slope = SLOPES[name]
    length = lambda q: sigma_w**2 * gauss(lambda z: phi(z) ** 2, q) + sigma_b**2  # noqa: E731
    h = 1e-3 * q
    # four points: the error is h^4
    chi_par = (8 * (length(q + h) - length(q - h)) - (length(q + 2 * h) - length(q - 2 * h))) / (12 * h)
    return length(q), sigma_w**2 * gauss(lambda z: slope(z) ** 2, q), chi_par


def test_relu_tanh_and_erf_in_closed_form(x64):
    np.testing.assert_allclose(mf.critical_sigma_w("relu"), 2**0.5, rtol=1e-12)
    np.testing.assert_allclose(mf.critical_sigma_w("tanh"), 1, rtol=1e-9)
    np.testing.assert_allclose(mf.critical_sigma_w("erf"), np.sqrt(np.pi / 4), rtol=1e-9)
    assert np.isnan(mf.critical_sigma_w("relu", 0.1))  # the length of relu grows for ever
    # erf: sigma_w^2 = (pi/4) sqrt(1 + 4q), and q - sigma_w^2 (2/pi) asin(2q / (1 + 2q)) is the bias
    bias = lambda q: q - np.sqrt(1 + 4 * q) / 2 * np.arcsin(2 * q / (1 + 2 * q)) - 0.3**2  # noqa: E731
    q = optimize.brentq(bias, 1e-6, 10, rtol=1e-14)
    np.testing.assert_allclose(mf.critical_sigma_w("erf", 0.3), np.sqrt(np.pi / 4 * np.sqrt(1 + 4 * q)), rtol=1e-9)


@pytest.mark.parametrize(("name", "sigma_b"), [("tanh", 0.3), ("sigmoid", 0.0), ("gelu", 0.1), ("silu", 0.2)])
def test_critical_points_satisfy_their_equations(name, sigma_b, x64):
    found = mf.critical_points(name, sigma_b)
    real = np.flatnonzero(np.isfinite(found.q))
    assert real.size
    for i in real:
        q, sigma_w, b, chi_par = (float(v[i]) for v in found)
        np.testing.assert_allclose(maps(name, q, sigma_w, b), [q, 1, chi_par], rtol=1e-7)
        assert b == sigma_b
    # There is no other: the bias along the critical line changes sign as often as points were found.
    phi, slope = SLOPES[name]
    lengths = np.geomspace(1e-4, 1e3, 120)
    excess = [q - gauss(lambda z: phi(z) ** 2, q) / gauss(lambda z: slope(z) ** 2, q) - sigma_b**2 for q in lengths]
    assert np.sum(np.diff(np.sign(excess)) != 0) == np.sum(found.q[real] > 1e-4)


def test_small_lengths_of_gelu_and_silu_repel(x64):
    for name, sigma_b in (("gelu", 0.1), ("silu", 0.2)):
        assert mf.critical_points(name, sigma_b).chi_par[0] > 1
    assert mf.critical_points("tanh", 0.3).chi_par[0] < 1


def test_the_critical_line(x64):
    lengths = jnp.array([1e-3, 0.5, 4.0])
    found = jax.vmap(partial(mf.critical_line, "tanh"))(lengths)
    for q, sigma_w, sigma_b, chi_par in zip(*found, strict=True):
        np.testing.assert_allclose(maps("tanh", float(q), float(sigma_w), float(sigma_b)), [q, 1, chi_par], rtol=1e-7)
        np.testing.assert_allclose(mf.critical_sigma_w("tanh", sigma_b), sigma_w, rtol=1e-6)
    assert np.isnan(mf.critical_line("softplus", 1.0).sigma_w)  # sigma_b^2 would be negative
    assert np.isfinite(mf.critical_line("relu", 5.0).sigma_w)


def test_half_stable_points(x64):
    """chi_1 = chi_par = 1 at a length above zero, which iteration does not find."""
    values = {}
    for name in ("gelu", "silu"):
        found = mf.universality(name)
        assert found.kind == "half-stable"
        np.testing.assert_allclose(maps(name, found.q, found.sigma_w, found.sigma_b), [found.q, 1, 1], rtol=1e-7)
        values[name] = (found.q, found.sigma_w**2, found.sigma_b**2)
    # gelu has a closed form. For silu a sigma_b^2 of 0.0555 is often given: ten times too small, and there the length repels.
    np.testing.assert_allclose(values["gelu"][0], (3 + 17**0.5) / 2, rtol=1e-8)
    np.testing.assert_allclose(values["silu"], [14.320, 1.98800, 0.55514], rtol=1e-4)
    assert mf.critical_points("silu", 0.0555**0.5).chi_par[0] > 1.001


def test_classes(x64):
    found = mf.universality("relu")
    assert found.kind == "scale-invariant"
    np.testing.assert_allclose([found.sigma_w, found.sigma_b, found.chi_par], [2**0.5, 0, 1], atol=1e-9)
    found = mf.universality("tanh")
    assert found.kind == "K*=0"
    np.testing.assert_allclose([found.power, found.rate], [1, 2], rtol=2e-3)  # E tanh^2 = q - 2 q^2 at small q
    assert mf.universality("softplus").kind == "none"


def test_the_decay_of_tanh_at_criticality(x64):
    """K* = 0: after l layers q is 1 / (2 l), whatever it was."""
    q = jax.lax.fori_loop(0, 2000, lambda _, q: mf.q_map("tanh", q, sigma_w=1.0), jnp.asarray(1.0))
    np.testing.assert_allclose(2 * 2000 * q, 1, rtol=0.01)


def test_gain(x64):
    for mode in ("forward", "backward"):
        np.testing.assert_allclose(mf.gain("relu", mode), 2**0.5, rtol=1e-10)
        np.testing.assert_allclose(mf.gain("identity", mode, q=3.0), 1, rtol=1e-10)
    np.testing.assert_allclose(mf.gain("tanh"), gauss(lambda z: np.tanh(z) ** 2, 1.0) ** -0.5, rtol=1e-9)  # 1.593, and not 5/3
    np.testing.assert_allclose(mf.gain("tanh", "backward"), gauss(lambda z: np.cosh(z) ** -4.0, 1.0) ** -0.5, rtol=1e-9)
    # selu keeps E h^2 = 1 at sigma_w = 1, as it was made to. 3/4 is often given, 0.9660 is what keeps the gradient: in closed form
    # E selu'^2 = lambda^2 (1 + alpha^2 E exp(2z) over z < 0) / 2.
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    backward = scale**2 * (0.5 + alpha**2 * np.exp(2) * special.ndtr(-2))
    np.testing.assert_allclose(mf.gain("selu"), 1, rtol=1e-9)
    np.testing.assert_allclose(mf.gain("selu", "backward"), backward**-0.5, rtol=1e-9)
    own = lambda z: jnp.square(z)  # noqa: E731  any callable: E z^4 = 3 and E (2z)^2 = 4
    np.testing.assert_allclose([mf.gain(own), mf.gain(own, "backward")], [3**-0.5, 0.5], rtol=1e-10)
    with pytest.raises(ValueError, match="expected 'forward' or 'backward'"):
        mf.gain("relu", "sideways")


def test_maps_and_differentiates(x64):
    biases, h = np.array([0.05, 0.2, 0.6]), 1e-4
    line = partial(mf.critical_sigma_w, "tanh")
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(line)))(biases)
    np.testing.assert_allclose(values, [line(b) for b in biases], rtol=1e-9)
    np.testing.assert_allclose(slopes, [(line(b + h) - line(b - h)) / (2 * h) for b in biases], rtol=1e-5)


def test_at_no_bias_the_lengths_near_zero_are_one_point(x64):
    for phi in ("tanh", "erf", "sin"):
        found = mf.critical_points(phi, 0.0)
        assert float(found.q[0]) == 0
        assert np.isnan(found.q[1:]).all()
