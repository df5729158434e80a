"""Laws of one step against mpmath and closed forms; of networks against random matrices in float64 and `vgrad.sweep`."""

import itertools

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import vgrad
from vgrad import finite_width as fw
from vgrad import losses

pytestmark = pytest.mark.xdist_group("finite_width")  # its fixtures are costly: one process for all

HE = 2**0.5
# Compiled once for all tests of the same shapes.
backward = jax.jit(fw.backward, static_argnums=0, static_argnames="weights")
step = jax.jit(fw.step, static_argnums=0, static_argnames="weights")
linear_step, relu_step, compose, dead_probability = map(jax.jit, (fw.linear_step, fw.relu_step, fw.compose, fw.dead_probability))
moment_ratio = jax.jit(fw.moment_ratio, static_argnums=0)


def draw(widths, phi, slope_of, *, sigma_w, sigma_b=0.0, q=1.0, num_outputs=1, orthogonal=False, num=2500, seed=0):
    """||delta_l||^2 / ||delta_L||^2 of real networks, [num, L-1], and ||dJ/dx||^2 for an input of 8 units. Column convention.

    The input is (1, 0, ..), so that z_1 is the first column of W_1, of variance q. One output: a fixed cotangent. More:
    delta_L = z_L, the squared error against zero.
    """
    rng = np.random.default_rng(seed)

    def matrix(rows, cols):
        w = rng.standard_normal((num, rows, cols)) / np.sqrt(cols)
        if orthogonal:
            w, r = np.linalg.qr(w.swapaxes(1, 2) if rows < cols else w)
            w = w * np.sign(np.einsum("sii->si", r))[:, None]
            w = w.swapaxes(1, 2) if rows < cols else w * np.sqrt(rows / cols)
        return sigma_w * w

    apply = lambda w, h: (w @ h[:, :, None])[:, :, 0]  # noqa: E731
    weights = [matrix(widths[0], 8)] + [matrix(m, n) for n, m in itertools.pairwise(widths)]
    weights[0] *= np.sqrt(8 * (q - sigma_b**2)) / sigma_w
    z = [weights[0][:, :, 0]]
    for l in range(len(widths)):
        z[l] = z[l] + sigma_b * rng.standard_normal(z[l].shape)
        if l + 1 < len(widths):
            z.append(apply(weights[l + 1], phi(z[l])))
    readout = matrix(num_outputs, widths[-1])
    delta = apply(readout, phi(z[-1])) if num_outputs > 1 else np.ones((num, 1))
    delta = delta / np.linalg.norm(delta, axis=1, keepdims=True)
    out = []
    for w, z_l in zip([*weights[1:], readout][::-1], z[::-1], strict=True):
        delta = slope_of(z_l) * apply(w.swapaxes(1, 2), delta)
        out.append(np.sum(np.square(delta), axis=1))
    at_input = np.sum(np.square(apply(weights[0].swapaxes(1, 2), delta)), axis=1)
    return np.stack(out[::-1], axis=1), at_input


def estimates(samples):
    """Mean and variance over seeds with their standard errors."""
    num, mean, variance = len(samples), samples.mean(0), samples.var(0, ddof=1)
    spread = np.square(samples - mean).std(0)
    return (mean, np.sqrt(variance / num)), (variance, spread / np.sqrt(num))


def agrees(samples, law, mean_term=0.0, variance_term=0.0):
    """ln of samples [S, ...] against E ln and Var ln: 4 standard errors plus the written terms of higher order."""
    (mean, e), (variance, f) = estimates(np.log(samples))
    assert np.all(abs(mean - law.mean_log) < 4 * e + mean_term), (mean, law.mean_log, e)
    assert np.all(abs(variance - law.variance) < 4 * f + variance_term), (variance, law.variance, f)


relu = lambda z: np.maximum(z, 0)  # noqa: E731
heaviside = lambda z: (z > 0) * 1.0  # noqa: E731
tanh_slope = lambda z: 1 / np.cosh(z) ** 2  # noqa: E731


def test_a_linear_step_in_closed_form(x64):
    n = np.array([1, 2, 7, 64, 1000])
    law = linear_step(n, sigma_w=1.3)
    gain = 2 * np.log(1.3)
    np.testing.assert_allclose(law.log_mean, gain)
    expected = [float(mpmath.digamma(mpmath.mpf(int(k)) / 2) + mpmath.log(mpmath.mpf(2) / int(k))) for k in n]
    np.testing.assert_allclose(law.mean_log, gain + np.array(expected), rtol=1e-12)
    np.testing.assert_allclose(law.variance, [float(mpmath.psi(1, mpmath.mpf(int(k)) / 2)) for k in n], rtol=1e-12)


def mixture(n, slope=0):
    """E ln and Var ln of (chi^2_m + slope^2 chi^2_(n-m)) / n, m ~ Bin(n, 1/2): 30 digits. With a slope, n is 2: three cases."""
    with mpmath.workdps(30):
        if slope:
            assert n == 2
            # chi^2_1 + a^2 chi^2_1 = R^2 (cos^2 + a^2 sin^2), R^2 ~ chi^2_2 of mean log ln 2 - gamma and variance pi^2 / 6

            def angle(k):
                power = lambda t: mpmath.log(mpmath.cos(t) ** 2 + slope**2 * mpmath.sin(t) ** 2) ** k  # noqa: E731
                return mpmath.quad(power, [0, mpmath.pi / 2]) / (mpmath.pi / 2)

            other = mpmath.log(mpmath.mpf(slope) ** 2)
            first, second = ((angle(k) / 2 + other**k / 4) for k in (1, 2))
            return float(first - mpmath.euler), float(second - first**2 + mpmath.pi**2 / 6)
        weight = [mpmath.binomial(n, m) / (mpmath.mpf(2) ** n - 1) for m in range(1, n + 1)]
        logs = [mpmath.digamma(mpmath.mpf(m) / 2) + mpmath.log(mpmath.mpf(2) / n) for m in range(1, n + 1)]
        mean = sum(w * x for w, x in zip(weight, logs, strict=True))
        within = sum(w * mpmath.psi(1, mpmath.mpf(m) / 2) for m, w in enumerate(weight, 1))
        return float(mean), float(within + sum(w * (x - mean) ** 2 for w, x in zip(weight, logs, strict=True)))


def test_a_relu_step_is_the_binomial_mixture(x64):
    n = np.array([1, 2, 5, 32, 300])
    law = relu_step(n, sigma_w=HE)
    expected = np.array([mixture(int(k)) for k in n])
    np.testing.assert_allclose(law.log_mean, 0, atol=1e-14)
    np.testing.assert_allclose(law.mean_log, np.log(2) + expected[:, 0], rtol=1e-10)
    np.testing.assert_allclose(law.variance, expected[:, 1], rtol=1e-10)
    # Two orders in 1/n by the delta method, from the central moments 5, 44 and 3 * 25 of 2 b xi^2.
    large = relu_step(1e4, sigma_w=HE)
    np.testing.assert_allclose(large.variance, 5e-4 + (50 + 12.5 - 44) * 1e-8, rtol=2e-6)
    np.testing.assert_allclose(large.mean_log, -2.5e-4 + (44 / 3 - 75 / 4) * 1e-8, rtol=2e-6)


def test_a_leaky_step(x64):
    law = relu_step(2, sigma_w=1.0, slope=0.1)
    np.testing.assert_allclose([law.mean_log, law.variance], mixture(2, mpmath.mpf("0.1")), rtol=1e-10)
    np.testing.assert_allclose(law.log_mean, np.log((1 + 0.1**2) / 2), rtol=1e-12)
    n = np.array([1, 3, 50])
    chex.assert_trees_all_close(relu_step(n, sigma_w=1.3, slope=1.0), linear_step(n, sigma_w=1.3), rtol=1e-9, atol=1e-12)
    other = relu_step(n, sigma_w=1.3 * 0.2, slope=5.0)  # the same slopes, in the other order
    chex.assert_trees_all_close(relu_step(n, sigma_w=1.3, slope=0.2), other, rtol=1e-9, atol=1e-12)


def test_a_relu_step_in_float32():
    for n in (2, 32, 1000):
        law, expected = relu_step(n, sigma_w=1.0), mixture(n)
        assert law.variance.dtype == np.float32
        np.testing.assert_allclose([law.mean_log, law.variance], expected, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize(("slope", "sigma_b"), [(0.0, 0.0), (0.0, 0.4), (0.3, 0.5), (1.0, 0.0)])
def test_homogeneous_networks_of_tiny_layers_exactly(slope, sigma_b, x64):
    """Unequal widths of a few units, biases: no term of higher order is allowed."""
    widths, sigma_w = (6, 11, 8), 1.2
    phi, slope_of = (lambda z: np.where(z > 0, z, slope * z)), (lambda z: np.where(z > 0, 1, slope))
    samples, _ = draw(widths, phi, slope_of, sigma_w=sigma_w, sigma_b=sigma_b, num=10000)
    alive = samples[:, 0] > 0
    steps = jax.device_get(relu_step(np.array(widths), sigma_w=sigma_w, slope=slope))
    for l in range(3):
        agrees(samples[alive, l], compose(jax.tree.map(lambda a, l=l: a[l:], steps)))
    if slope == 0:
        dead = float(dead_probability(np.array(widths)))
        np.testing.assert_allclose(dead, 1 - (1 - 2**-6) * (1 - 2**-11) * (1 - 2**-8), rtol=1e-12)
        assert abs(np.mean(~alive) - dead) < 4 * np.sqrt(dead / 10000)
    else:
        assert alive.all()


def test_moment_ratio_of_relu(x64):
    """5 per hidden layer whatever sigma_w, and 2 for the input's linear one."""
    widths = (12, 30, 20)
    samples, at_input = draw(widths, relu, heaviside, sigma_w=1.5, num=8000)
    expected = float(moment_ratio("relu", np.array(widths)))
    np.testing.assert_allclose(expected, (1 + 5 / 12) * (1 + 5 / 30) * (1 + 5 / 20), rtol=1e-10)
    for x, ratio in ((samples[:, 0], expected), (at_input, expected * (1 + 2 / 8))):
        parts = np.stack([np.split(x, 20)])[0]  # 20 independent estimates
        each = np.mean(parts**2, axis=1) / np.mean(parts) ** 2
        assert abs(each.mean() - ratio) < 4 * each.std(ddof=1) / np.sqrt(20), (each.mean(), ratio)


def erf_moments(q):
    """mu_1 and mu_2 of phi = erf: E exp(-2 k q g^2) = 1 / sqrt(1 + 4 k q)."""
    return 4 / np.pi / np.sqrt(1 + 4 * q), 16 / np.pi**2 / np.sqrt(1 + 8 * q)


def test_kappa_in_closed_form(x64):
    q, n, sigma_w = np.array([0.3, 2.0, 50.0]), np.array([10, 20, 40]), 1.4
    mu_1, mu_2 = erf_moments(q)
    law = step("erf", n, q=q, sigma_w=sigma_w)
    kappa = 3 * mu_2 / mu_1**2 - 1
    np.testing.assert_allclose(law.variance, kappa / n, rtol=1e-9)
    np.testing.assert_allclose(law.log_mean, np.log(sigma_w**2 * mu_1), rtol=1e-9)
    np.testing.assert_allclose(law.mean_log, law.log_mean - kappa / (2 * n), rtol=1e-9)
    np.testing.assert_allclose(moment_ratio("erf", n, q=q), np.prod(1 + kappa / n), rtol=1e-9)
    turned = step("erf", n, q=q, sigma_w=sigma_w, weights="orthogonal")
    b = -2 * q / (1 + 4 * q)  # d ln mu_1 / d ln q
    np.testing.assert_allclose(turned.variance, (kappa - 2 - 2 * b**2) / n, rtol=1e-9)
    own = step(lambda z: jnp.where(z > 0, z, 0.0), np.array(10), q=0.7, sigma_w=1.0, weights="orthogonal")
    np.testing.assert_allclose([own.log_mean, own.variance], [np.log(0.5), 3 / 10], rtol=1e-9)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_one_step_against_draws(orthogonal, x64):
    n, q, sigma_w, rng = 64, 2.0, 1.5, np.random.default_rng(3)
    z, xi = rng.standard_normal((2, 30000, n))
    if orthogonal:
        z, xi = (np.sqrt(n) * v / np.linalg.norm(v, axis=1, keepdims=True) for v in (z, xi))
    samples = sigma_w**2 * np.mean(np.square(tanh_slope(np.sqrt(q) * z) * xi), axis=1)
    law = step("tanh", np.array(n), q=q, sigma_w=sigma_w, weights="orthogonal" if orthogonal else "normal")
    agrees(samples, law, mean_term=30 / n**2, variance_term=40 / n**2)
    mean_square, error = samples.mean(), samples.std() / np.sqrt(len(samples))
    assert abs(mean_square / np.exp(law.log_mean) - 1) < 4 * error / mean_square + 5 / n**2


# What only the whole of the theory explains: near the edge, where the length's fluctuations add almost half of the variance;
# orthogonal weights; a cotangent that is the output itself, of 6 units; biases.
NETWORKS = {
    "normal": ("tanh", dict(sigma_w=1.2, q=1.0), {}),
    "biases, aligned": ("tanh", dict(sigma_w=1.5, sigma_b=0.4, q=1.0), dict(num_outputs=6, seed=1)),
    "orthogonal": ("tanh", dict(sigma_w=1.5, q=1.0), dict(orthogonal=True, num=1500)),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_backward_against_random_matrices(case, x64):
    phi, point, how = NETWORKS[case]
    n, num_hidden = 32, 5
    samples, _ = draw((n,) * num_hidden, np.tanh, tanh_slope, **point, **how)
    options = dict(weights="orthogonal" if how.get("orthogonal") else "normal", alignment=float(how.get("num_outputs", 1)))
    law = jax.device_get(backward(phi, np.full(num_hidden, n), **{"sigma_b": 0.0} | point, **options))
    np.testing.assert_allclose(law.log_mean, law.mean_log + law.variance / 2)
    agrees(samples, law, mean_term=law.variance**2, variance_term=law.variance**2 / 2)
    # Layers on their own at the mean lengths would not do.
    q = [point["q"]]
    for _ in range(num_hidden - 1):
        q.append(point["sigma_w"] ** 2 * moment(np.tanh, q[-1]) + point.get("sigma_b", 0.0) ** 2)
    alone = compose(step(phi, np.full(num_hidden, n), q=np.array(q), sigma_w=point["sigma_w"], weights=options["weights"]))
    (mean, e), (variance, f) = estimates(np.log(samples[:, 0]))
    assert abs(variance - alone.variance) > 4 * f or abs(mean - alone.mean_log) > 4 * e + law.variance[0] ** 2


def moment(phi, q):
    g = np.linspace(-9, 9, 4001)
    return np.sum(phi(np.sqrt(q) * g) ** 2 * np.exp(-(g**2) / 2)) * (g[1] - g[0]) / np.sqrt(2 * np.pi)


def draw_vectors(n, num_hidden, phi, slope_of, *, sigma_w, sigma_b, q, orthogonal, num, num_outputs=1):
    """ln of what `draw` gives, without its matrices: z_{l+1} depends on h_l through its length alone, and given z_{l+1} the
    cotangent W^T delta is (W h . delta) / |h| along h, and a fresh vector of known length (Gaussian or turned) across it."""
    rng, out = np.random.default_rng(7), []
    dot = lambda a, b: np.sum(a * b, axis=1, keepdims=True)  # noqa: E731
    for _ in range(num // 10000):
        length, parts = np.sqrt(n * (q - sigma_b**2)), []
        for _ in range(num_hidden):
            u, v = rng.standard_normal((2, 10000, n))
            w = u * length / (np.sqrt(dot(u, u)) if orthogonal else np.sqrt(n))
            h = phi(w + sigma_b * v)
            parts.append((w, slope_of(w + sigma_b * v), h / np.sqrt(dot(h, h)), np.sqrt(dot(h, h))))
            length = sigma_w * parts[-1][-1]
        w, logs = rng.standard_normal((10000, num_outputs)) * length / np.sqrt(n), []  # W h at the output
        delta = w / np.sqrt(dot(w, w))
        if orthogonal:  # one row of an orthogonal matrix is a point on the sphere
            u = rng.standard_normal((10000, n))
            w = length * u[:, :1] / np.sqrt(dot(u, u))
        for below, slope, along, size in parts[::-1]:
            g = rng.standard_normal((10000, n))
            across, first = g - along * dot(along, g), dot(w, delta) / size
            square = sigma_w**2 * dot(delta, delta)
            scale = np.sqrt((square - first**2) / dot(across, across)) if orthogonal else np.sqrt(square / n)
            w, delta = below, slope * (along * first + across * scale)
            logs.append(np.log(dot(delta, delta)[:, 0]))
        out.append(np.stack(logs[::-1], axis=1))
    return np.exp(np.concatenate(out))


def power(z):
    return jnp.sign(z) * jnp.abs(z) ** 1.5


# The last number is half the square of the alignment's part of E ln, which the first order leaves out, there and in Var ln.
PRECISE = {
    "near the edge": ("tanh", 64, 5, dict(sigma_w=1.3, sigma_b=0.3, q=1.0), "normal", 1, 0.0),
    "orthogonal": ("tanh", 64, 5, dict(sigma_w=1.3, sigma_b=0.3, q=1.0), "orthogonal", 1, 0.0),
    "a power": (power, 128, 3, dict(sigma_w=1.0, sigma_b=0.0, q=1.0), "normal", 2, 0.03),  # z . delta grows on the way down
}


@pytest.mark.parametrize("case", PRECISE)
def test_backward_to_three_digits(case, x64):
    phi, n, num_hidden, point, weights, num_outputs, bend = PRECISE[case]
    functions = (np.tanh, tanh_slope) if phi == "tanh" else (lambda z: np.sign(z) * abs(z) ** 1.5, lambda z: 1.5 * abs(z) ** 0.5)
    how = dict(orthogonal=weights == "orthogonal", num=40000, num_outputs=num_outputs)
    samples = draw_vectors(n, num_hidden, *functions, **point, **how)
    law = jax.device_get(backward(phi, np.full(num_hidden, n), **point, weights=weights, alignment=float(num_outputs)))
    agrees(samples, law, mean_term=law.variance**2 / 25 + bend, variance_term=law.variance**2 / 3 + bend)


def test_backward_of_relu_is_the_sum_of_its_steps(x64):
    widths = np.array([20, 40, 30])
    law = backward("relu", widths, q=1.7, sigma_w=HE, sigma_b=0.4)
    expected = np.cumsum((5 / widths)[::-1])[::-1]
    np.testing.assert_allclose(law.variance, expected, rtol=1e-9)
    np.testing.assert_allclose(law.mean_log, -expected / 2, rtol=1e-9)
    still = backward("identity", widths, q=1.7, sigma_w=1.3, weights="orthogonal")
    np.testing.assert_allclose(still.variance, 0, atol=1e-12)
    np.testing.assert_allclose(still.mean_log, 2 * np.log(1.3) * np.array([3, 2, 1]), rtol=1e-12)


def upward(steps):
    return jax.tree.map(lambda a: np.cumsum(np.asarray(a)[::-1])[::-1], steps)


@pytest.fixture(scope="module")
def measured():
    """||delta_l||^2 / ||delta_L||^2 by `vgrad.sweep`, [S, L-1], for relu and tanh with one sample and relu with six.

    The targets of the squared error are large, so that delta_L does not look at the output. Where one sample is wanted, the others'
    outputs are replaced by zero: so one program does for all.
    """

    def family(point):
        phi = lambda z: jnp.where(point["relu"] > 0, jnp.maximum(z, 0.0), jnp.tanh(z))  # noqa: E731
        kept = lambda y: jnp.where((np.arange(6, dtype=np.float32) < point["samples"])[:, None], y, 0.0)  # noqa: E731
        return vgrad.mlp(32, phi, 8, 2, sigma_w=point["sigma_w"], output=kept)

    points = [
        {"relu": 1.0, "sigma_w": HE, "samples": 1.0},
        {"relu": 0.0, "sigma_w": 1.5, "samples": 1.0},
        {"relu": 1.0, "sigma_w": HE, "samples": 6.0},
    ]
    x, t = np.random.default_rng(5).standard_normal((2, 6, 8), np.float32)
    batch = x * np.sqrt(8 / np.sum(np.square(x), axis=1, keepdims=True)), np.float32(1e4) * t[:, :2]
    how: dict = dict(key=jax.random.key(0), num_seeds=300, depths=[6], batch=batch, loss=losses.squared_error)
    log_delta = vgrad.sweep(family, points, **how).log_delta[:, :, 0]
    return np.exp(2 * (log_delta[..., :-1] - log_delta[..., -1:]))


def test_the_law_of_measured_profiles(measured, x64):
    agrees(measured[0], upward(relu_step(np.full(5, 32), sigma_w=HE)))
    law = jax.device_get(backward("tanh", np.full(5, 32), q=2.25, sigma_w=1.5, sigma_b=0.0, weights="normal", alignment=1.0))
    agrees(measured[1], law, mean_term=law.variance**2, variance_term=law.variance**2 / 2)


def test_a_batch_has_the_mean_of_one_sample_and_less_spread(measured):
    samples = measured[2, :, 0]
    law, variance = upward(relu_step(np.full(5, 32), sigma_w=HE)), np.log(samples).var()
    assert abs(samples.mean() - np.exp(law.log_mean[0])) < 4 * samples.std() / np.sqrt(300)
    assert np.mean(samples**2) / np.mean(samples) ** 2 < (1 + 5 / 32) ** 5
    assert law.variance[0] / 6 < variance < 0.8 * law.variance[0]  # one network's weights, shared by six samples


def test_traces_once_maps_and_differentiates(x64):
    def law(q, sigma_w):
        return fw.relu_step(16, sigma_w=sigma_w, slope=q), fw.backward("tanh", [16, 32], q=q, sigma_w=sigma_w)

    once = jax.jit(chex.assert_max_traces(law, n=1))
    at = lambda *point: jax.device_get(once(*point))  # noqa: E731
    points, h = np.array([[0.5, 1.0, 2.0], [1.0, 1.5, 2.0]]), 1e-5
    together = jax.jit(jax.vmap(jax.jacfwd(lambda q, s: (law(q, s),) * 2, has_aux=True)))(*points)
    for i, (q, s) in enumerate(points.T):
        slope, value = jax.tree.map(lambda a, i=i: a[i], jax.device_get(together))
        chex.assert_trees_all_close(value, at(q, s), rtol=1e-12)
        numeric = jax.tree.map(lambda a, b: (a - b) / (2 * h), at(q + h, s), at(q - h, s))
        chex.assert_trees_all_close(slope, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fw.linear_step(0, sigma_w=1.0), "widths are 0"),
        (lambda: fw.backward("tanh", [8, -1], q=1.0, sigma_w=1.0), "at least 1"),
        (lambda: fw.relu_step(8, sigma_w=-1.0), "sigma_w is -1.0"),
        (lambda: fw.step("tanh", 8, q=1.0, sigma_w=1.0, weights="uniform"), "expected 'normal' or 'orthogonal'"),
        (lambda: fw.moment_ratio("tan", [8]), "unknown activation"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
