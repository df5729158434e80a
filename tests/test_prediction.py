"""`predict` where exact answers are known: linear networks, one layer by hand, extremes of depth and scale, one sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgrad import finite_width, losses
from vgrad.meanfield import predict

X = np.random.default_rng(0).standard_normal((3, 8))
T = np.random.default_rng(1).standard_normal((3, 2))
LABELS = np.array([0, 1, 1])
HOW = dict(width=100, out_dim=2)


def test_a_linear_network_in_closed_form(x64):
    """Squared error, no biases: G_L = C K + t t^T over B^2, and each layer multiplies by sigma_w^2 and keeps all correlations."""
    depth, s = 6, 1.2
    found = predict("identity", (X, T), depth=depth, **HOW, sigma_w=s, loss=losses.squared_error)
    gram = X @ X.T / 8
    q = s ** (2 * np.arange(1, depth + 1)) * np.mean(np.diag(gram))
    np.testing.assert_allclose(found.q, q, rtol=1e-10)
    root = np.sqrt(np.diag(gram))
    c = (gram / root[:, None] / root)[np.triu_indices(3, 1)].mean()
    np.testing.assert_allclose(found.c, np.full(depth, c), rtol=1e-9)
    top = (2 * s ** (2 * depth) * gram + T @ T.T) / 9
    for l in range(1, depth + 1):
        g = top * s ** (2 * (depth - l))
        h = X @ X.T if l == 1 else 100 * s ** (2 * (l - 1)) * gram
        rows = [found.log_delta[l - 1], found.log_grad_w[l - 1], found.log_grad_b[l - 1]]
        np.testing.assert_allclose(rows, 0.5 * np.log([np.trace(g), np.sum(h * g), np.sum(g)]), rtol=1e-9)
        size = 2 if l == depth else 100
        np.testing.assert_allclose(found.log_h[l - 1], 0.5 * np.log(size * s ** (2 * l) * np.trace(gram)), rtol=1e-9)


@pytest.mark.parametrize("weights", ["normal", "orthogonal"])
def test_one_sample_spreads_as_finite_width_says(weights, x64):
    x, far = X[:1], 1e5 * T[:1]  # targets so large that delta_L looks at nothing
    found = predict("tanh", (x, far), depth=6, **HOW, sigma_w=1.4, sigma_b=0.2, weights=weights, loss="squared_error")
    q = 1.4**2 * np.mean(x**2) + 0.04
    law = finite_width.backward("tanh", np.full(5, 100), q=q, sigma_w=1.4, sigma_b=0.2, weights=weights)
    np.testing.assert_allclose(2 * found.std_log_delta[:-1], np.sqrt(law.variance), rtol=2e-3)
    top = 2 * found.mean_log_delta[-1]
    np.testing.assert_allclose(2 * found.mean_log_delta[:-1] - top, law.mean_log, atol=2e-4)


def test_extremes():
    """In float32: e^10000 and e^-10000, an input of zeros, an input of e^50, two layers."""
    for sigma_w in (1500.0, 1e-3):
        deep = jax.device_get(predict("relu", (X, LABELS), depth=1_500, **HOW, sigma_w=sigma_w))
        growth = 0.5 * np.log(sigma_w**2 / 2)
        for change in (deep.log_h[-2] - deep.log_h[0], deep.log_delta[0] - deep.log_delta[-2]):
            np.testing.assert_allclose(change, 1498 * growth, rtol=1e-3)  # 1.5e3 sums, rounded to 5e-4 at most each
        assert np.all(np.isfinite(np.stack(deep[2:])))
    x = X * np.array([[0.0], [1.0], [np.exp(50)]])
    mixed = predict("relu", (np.float32(x), LABELS), depth=2, **HOW, sigma_w=2**0.5)
    assert np.all(np.isfinite(np.stack(mixed[2:6])))
    np.testing.assert_allclose(mixed.log_h[0], 50 + 0.5 * np.log(100 * np.mean(X[2] ** 2)), rtol=1e-3)


def test_differentiates_and_maps(x64):
    run = lambda s: predict("tanh", (X, T), depth=5, **HOW, sigma_w=s, sigma_b=0.1, loss="squared_error").log_delta[0]  # noqa: E731
    points, h = np.array([0.7, 1.3]), 1e-5
    value, slope = jax.jit(jax.vmap(lambda s: jax.jvp(run, (s,), (jnp.ones_like(s),))))(jnp.asarray(points))
    np.testing.assert_allclose(value, [run(s) for s in points], rtol=1e-9)
    np.testing.assert_allclose(slope, [(run(s + h) - run(s - h)) / (2 * h) for s in points], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(weights="identity"), ValueError, "weights is 'identity'"),
        (dict(weights=jax.nn.initializers.normal()), ValueError, "name of a random initializer"),
        (dict(loss="hinge"), ValueError, "loss is 'hinge'"),
        (dict(depth=1), ValueError, "depth is 1"),
        (dict(width=0), ValueError, "width is 0"),
        (dict(sigma_w=-1.0), ValueError, "sigma_w is -1.0"),
        (dict(batch=(X[0], LABELS)), ValueError, "For one sample use"),
        (dict(batch=(X, LABELS[:2])), ValueError, "labels have shape"),
        (dict(batch=(X, T[:, :1]), loss="squared_error"), ValueError, "target has shape"),
    ],
)
def test_bad_input(change, error, message):
    how = dict(batch=(X, LABELS), depth=4) | HOW | change
    with pytest.raises(error, match=message):
        predict("tanh", how.pop("batch"), **how)


def test_a_mean_slope_that_passes_zero_is_no_pole():
    """cos averages to zero at some layer of some draw: what is then met again on the way back is small, and not large."""
    how = dict(width=16, depth=4, out_dim=2, weights="positive_uniform", sigma_b=0.1)
    sigma_w = np.float32(0.4 + 2.6 * np.array([9, 35]) / 39)
    found = jax.jit(jax.vmap(lambda s: predict("sin", (np.ones((1, 4)), np.array([1])), sigma_w=s, **how)))(sigma_w)
    assert np.all(found.log_delta - found.mean_log_delta < 4)  # else one draw of many rules the mean
