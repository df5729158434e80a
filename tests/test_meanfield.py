"""Maps, fixed points and depth scales against closed forms, SciPy and plain iteration."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, special

from vgrad import meanfield as mf
from vgrad import moments

POINT = dict(sigma_w=1.5**0.5, sigma_b=0.05**0.5)


def gauss(f, q):
    """E f(sqrt(q) g) by SciPy."""
    density = lambda y: np.exp(-y * y / 2) / np.sqrt(2 * np.pi)  # noqa: E731
    return integrate.quad(lambda y: f(np.sqrt(q) * y) * density(y), -12, 12, points=[0], epsabs=1e-13, epsrel=1e-12, limit=400)[0]


def tanh_q(q, sigma_w, sigma_b):
    return sigma_w**2 * gauss(lambda z: np.tanh(z) ** 2, q) + sigma_b**2


# For erf all is known: Williams, 1998.
def erf_q(q, sigma_w, sigma_b):
    return sigma_w**2 * 2 / np.pi * np.arcsin(2 * q / (1 + 2 * q)) + sigma_b**2


def erf_c(c, q, sigma_w, sigma_b):
    return (sigma_w**2 * 2 / np.pi * np.arcsin(2 * c * q / (1 + 2 * q)) + sigma_b**2) / erf_q(q, sigma_w, sigma_b)


def erf_chi(c, q, sigma_w):
    return sigma_w**2 * 4 / np.pi / np.sqrt((1 + 2 * q) ** 2 - (2 * c * q) ** 2)


def erf_star(sigma_w, sigma_b):
    q = optimize.brentq(lambda q: erf_q(q, sigma_w, sigma_b) - q, 1e-6, 1e3, xtol=1e-15, rtol=1e-14)
    if erf_chi(1, q, sigma_w) <= 1:
        return q, 1.0
    return q, optimize.brentq(lambda c: erf_c(c, q, sigma_w, sigma_b) - c, 0, 1 - 1e-6, xtol=1e-15)


def test_the_length_map(x64):
    for q in (1e-10, 0.4, 30.0):
        np.testing.assert_allclose(mf.q_map("tanh", q, **POINT), tanh_q(q, **POINT), rtol=1e-9)
        np.testing.assert_allclose(mf.q_map("erf", q, **POINT), erf_q(q, **POINT), rtol=1e-10)
        np.testing.assert_allclose(mf.q_map("relu", q, sigma_w=1.3, sigma_b=0.2), 1.3**2 * q / 2 + 0.04, rtol=1e-12)
        np.testing.assert_allclose(mf.q_map("identity", q, sigma_w=1.3, sigma_b=0.2), 1.3**2 * q + 0.04, rtol=1e-12)
    assert mf.q_map("tanh", 0.0, sigma_w=2.0) == 0
    np.testing.assert_allclose(mf.q_map("sigmoid", 0.0, sigma_w=2.0), 1.0)


CORRELATIONS = np.array([-1.0, -0.7, 0.0, 0.5, 0.999, 1 - 1e-7, 1.0])


def test_the_correlation_map_and_its_slope(x64):
    q = 1.7
    c = np.asarray(CORRELATIONS)
    found = jax.vmap(partial(mf.c_map, "erf", q=q, **POINT))(jnp.asarray(CORRELATIONS))
    np.testing.assert_allclose(found, erf_c(c, q, **POINT), rtol=1e-10)
    assert found[-1] == 1
    np.testing.assert_allclose(
        jax.vmap(partial(mf.chi, "erf", q=q, sigma_w=1.2))(jnp.asarray(CORRELATIONS)), erf_chi(c, q, 1.2), rtol=1e-8
    )
    angle = np.arccos(c)  # Cho & Saul, 2009: without biases the map knows no length, and ends at c = -1 with 0
    relu = lambda q: jax.vmap(partial(mf.c_map, "relu", q=q, sigma_w=2.0))(jnp.asarray(CORRELATIONS))  # noqa: E731
    np.testing.assert_allclose(relu(q), (np.sin(angle) + (np.pi - angle) * c) / np.pi, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(relu(1e5), relu(q), rtol=1e-9, atol=1e-11)
    chi = jax.vmap(partial(mf.chi, "relu", q=q, sigma_w=2**0.5))(jnp.asarray(CORRELATIONS))
    np.testing.assert_allclose(chi, (np.pi - angle) / np.pi, rtol=1e-9, atol=1e-11)


def test_near_a_step_the_correlation_map_is_still_exact_at_its_ends(x64):
    """tanh at q = 100: 2e-3 of the series is beyond its 192 terms."""
    q, how = 100.0, dict(sigma_w=2.0, sigma_b=0.3)
    near = np.array([0.99, 0.999, 1 - 1e-5])
    y = np.linspace(-9, 9, 6001)
    w = np.exp(-y * y / 2) / np.sqrt(2 * np.pi) * (y[1] - y[0])

    def pair(c):  # the common part of the two inputs outside, their own inside
        mean = np.array([np.sum(w[::8] * 8 * np.tanh(10 * (np.sqrt(c) * u + np.sqrt(1 - c) * y[::8]))) for u in y])
        return np.sum(w * mean**2)

    expected = [(4 * pair(c) + 0.09) / tanh_q(q, **how) for c in near]
    np.testing.assert_allclose(jax.vmap(partial(mf.c_map, "tanh", q=q, **how))(jnp.asarray(near)), expected, atol=1e-4)
    steep = (1 - mf.c_map("tanh", 1 - 1e-9, q, **how)) / 1e-9  # against an independent quadrature of phi'^2
    chi_1 = 4 * gauss(lambda z: np.cosh(z) ** -4.0, q)
    np.testing.assert_allclose(steep, chi_1 * q / tanh_q(q, **how), rtol=1e-5)


def test_tanh_at_the_point_where_others_are_wrong(x64):
    """chi_1 is 0.9386, and not 0.552."""
    q = 1.0
    for _ in range(200):
        q = tanh_q(q, **POINT)
    np.testing.assert_allclose(mf.q_star("tanh", **POINT), q, rtol=1e-9)
    expected = 1.5 * gauss(lambda z: np.cosh(z) ** -4.0, q)
    np.testing.assert_allclose(mf.chi_1("tanh", **POINT), expected, rtol=1e-9)
    np.testing.assert_allclose(expected, 0.9386, atol=5e-5)
    h = 1e-4
    slope = (tanh_q(q + h, **POINT) - tanh_q(q - h, **POINT)) / (2 * h)
    np.testing.assert_allclose(mf.chi_par("tanh", **POINT), slope, rtol=1e-6)


@pytest.mark.parametrize(("sigma_w", "sigma_b"), [(0.7, 0.3), (1.6, 0.2), (4.0, 0.5)])
def test_everything_at_once_for_erf(sigma_w, sigma_b, x64):
    q, c = erf_star(sigma_w, sigma_b)
    chi_1, chi_c = erf_chi(1, q, sigma_w), erf_chi(c, q, sigma_w)
    chi_par = sigma_w**2 * 4 / np.pi / ((1 + 2 * q) * np.sqrt(1 + 4 * q))
    scales = [-1 / np.log(v) for v in (chi_par, chi_c, chi_1)]
    found = mf.asymptotics("erf", sigma_w=sigma_w, sigma_b=sigma_b)
    np.testing.assert_allclose(found, [q, c, chi_1, chi_par, *scales], rtol=1e-7)
    assert mf.phase("erf", sigma_w=sigma_w, sigma_b=sigma_b) == ("chaotic" if chi_1 > 1 else "ordered")
    # xi_q and xi_c are how fast iteration comes to rest.
    x, y = [q * 1.01], [c - 0.01]
    for _ in range(30):
        x.append(erf_q(x[-1], sigma_w, sigma_b))
        y.append(erf_c(y[-1], q, sigma_w, sigma_b))
    np.testing.assert_allclose(np.log((x[9] - q) / (x[10] - q)), 1 / found.xi_q, rtol=0.02)
    np.testing.assert_allclose(np.log((c - y[29]) / (c - y[30])), 1 / found.xi_c, rtol=0.03)


def test_relu_and_its_lack_of_fixed_points(x64):
    he = 2**0.5
    assert mf.q_star("relu", sigma_w=he, q_0=3.7) == 3.7  # every length stays
    assert mf.q_star("relu", sigma_w=1.0) == 0
    np.testing.assert_allclose(mf.q_star("relu", sigma_w=1.0, sigma_b=0.5), 0.25 / (1 - 0.5), rtol=1e-10)
    np.testing.assert_allclose(mf.chi_par("relu", sigma_w=1.2, q=3.0), 1.2**2 / 2, rtol=1e-10)  # relu'' is a delta function
    assert mf.phase("relu", sigma_w=he) == "critical"
    for sigma_w, sigma_b in ((1.5, 0.0), (1.5, 0.3), (he, 0.3)):
        assert np.isnan(mf.q_star("relu", sigma_w=sigma_w, sigma_b=sigma_b))
        assert np.all(np.isnan(mf.asymptotics("relu", sigma_w=sigma_w, sigma_b=sigma_b)))
        found = mf.fixed_points("relu", sigma_w=sigma_w, sigma_b=sigma_b)
        if sigma_b:
            assert np.all(np.isnan(np.stack(found)))
        else:
            assert found.q[0] == 0
            assert found.chi_par[0] > 1  # a fixed point that repels
        assert mf.phase("relu", sigma_w=sigma_w, sigma_b=sigma_b) == "no fixed point"


def silu_q(q, sigma_w, sigma_b):
    return sigma_w**2 * gauss(lambda z: (z * special.expit(z)) ** 2, q) + sigma_b**2


def test_all_fixed_points_and_their_stability(x64):
    """silu just below its half-stable point has three: one attracts, one repels; SciPy finds each between sign changes."""
    how = dict(sigma_w=1.988**0.5 * 0.999, sigma_b=0.3)
    found = mf.fixed_points("silu", **how)
    q = found.q[np.isfinite(found.q)]
    grid = np.geomspace(1e-3, 1e4, 60)
    excess = [silu_q(g, **how) - g for g in grid]
    roots = [
        optimize.brentq(lambda q: silu_q(q, **how) - q, a, b, rtol=1e-12)
        for a, b, f, g in zip(grid[:-1], grid[1:], excess[:-1], excess[1:], strict=True)
        if f * g < 0
    ]
    assert len(roots) >= 1
    np.testing.assert_allclose(q, roots, rtol=1e-7)
    for root, chi_par in zip(roots, found.chi_par, strict=False):
        h = 1e-3 * root
        slope = (silu_q(root + h, **how) - silu_q(root - h, **how)) / (2 * h)
        np.testing.assert_allclose(chi_par, slope, rtol=1e-5)
    assert np.all(found.residual[: len(roots)] < 1e-10)
    start = np.asarray([mf.q_star("silu", **how, q_0=q_0) for q_0 in (0.01, 30.0)])
    for q_0, settled in zip((0.01, 30.0), start, strict=True):
        x = q_0
        for _ in range(3):  # where iteration is heading is where q_star is
            last, x = x, silu_q(x, **how)
        assert np.isnan(settled) or (settled - x) * (x - last) >= 0


GRID = np.array([[0.8, 0.1], [1.3, 0.0], [1.3, 0.4], [3.0, 0.2]])


def test_maps_over_a_grid_and_differentiates(x64):
    run = lambda p: mf.asymptotics("tanh", sigma_w=p[0], sigma_b=p[1])  # noqa: E731
    singles, h = [run(p) for p in GRID], 1e-4
    points = np.array([[0.8, 0.3], [1.7, 0.3]])  # an ordered and a chaotic one
    around = points[:, None, None] + h * np.array([1, -1])[:, None, None] * np.eye(2)
    of_xi_c = jax.value_and_grad(lambda p: (lambda found: (found.xi_c, found))(run(p)), has_aux=True)
    everywhere = np.concatenate([GRID, points, around.reshape(-1, 2)])
    (xi_c, together), slopes = jax.device_get(jax.jit(jax.vmap(of_xi_c))(everywhere))
    together = jax.tree.map(lambda v: v[: len(GRID)], together)
    chex.assert_trees_all_close(together, jax.tree.map(lambda *v: np.stack(v), *singles), rtol=1e-8, atol=1e-12)
    ends = xi_c[len(GRID) + 2 :].reshape(2, 2, 2)  # of point, sign and direction
    np.testing.assert_allclose(slopes[len(GRID) :][:2], (ends[:, 0] - ends[:, 1]) / (2 * h), rtol=1e-5)
    scales = mf.depth_scales("tanh", sigma_w=GRID[0, 0], sigma_b=GRID[0, 1])
    np.testing.assert_array_equal(scales, singles[0][-3:])


def test_rounding_at_a_root_does_not_lose_it(x64):
    """Within rounding of the root the slope has the wrong sign here, as if value and step came from two evaluations."""

    @jax.custom_jvp
    def excess(q):
        return 0.1 - q * q - 1e-16

    @excess.defjvp
    def _(primal, tangent):
        (q,), (t,) = primal, tangent
        value = excess(q)
        return value, jnp.where(jnp.abs(value) < 1e-14, q, -2 * q) * t

    for low, high in ((0.3, 0.4), (0.2, 0.32), (0.25, 0.35)):
        assert abs(moments.root(excess, low, high) - 0.1**0.5) < 1e-12


def test_float32():
    found = mf.asymptotics("tanh", **POINT)
    assert found.q_star.dtype == np.float32
    with jax.enable_x64(True):
        expected = mf.asymptotics("tanh", **POINT)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_a_search_traces_once(x64):
    count = []

    def phi(z):
        count.append(1)
        return jnp.tanh(z)

    first = mf.chi_1(phi, sigma_w=1.1, sigma_b=0.2)
    seen = len(count)
    mf.chi_1(phi, sigma_w=1.2, sigma_b=0.1)
    assert len(count) - seen <= 5  # the look at whether phi is elementwise, and no trace
    np.testing.assert_allclose(first, mf.chi_1("tanh", sigma_w=1.1, sigma_b=0.2), rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mf.q_star("tanh", sigma_w=-1.0), ValueError, "sigma_w is -1.0"),
        (lambda: mf.chi_1("tanh", sigma_w=1.0, sigma_b=np.nan), ValueError, "sigma_b is nan"),
        (lambda: mf.q_map("tanh", -1.0, sigma_w=1.0), ValueError, "q is -1.0"),
        (lambda: mf.q_star("tanh", sigma_w="1"), TypeError, "sigma_w is '1'"),
        (lambda: mf.q_star("tanh", sigma_w=jnp.ones(3)), ValueError, "jax.vmap"),
        (lambda: mf.chi_1("tan", sigma_w=1.0), ValueError, "unknown activation 'tan', did you mean 'tanh'"),
        (lambda: mf.chi_1(jax.nn.softmax, sigma_w=1.0), ValueError, "not elementwise"),
        (lambda: mf.critical_sigma_w("tanh", -0.1), ValueError, "sigma_b is -0.1"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_where_the_second_moment_diverges(x64):
    """E exp(z^2)^2 is infinite for q >= 1/4: NaN, and no fixed point."""
    steep = lambda z: jnp.exp(jnp.square(z))  # noqa: E731
    assert np.isnan(mf.q_map(steep, 0.3, sigma_w=1.0))
    np.testing.assert_allclose(mf.q_map(steep, 0.05, sigma_w=1.0), 1 / np.sqrt(1 - 4 * 0.05), rtol=1e-9)
    assert np.isnan(mf.q_star(steep, sigma_w=1.0))
