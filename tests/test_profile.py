"""The instrument against `jax.grad`, at every depth and for every block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vgrad
from vgrad import layers, losses

BATCH = 16
X = jax.random.normal(jax.random.key(9), (BATCH, 7))
LABELS = jax.random.randint(jax.random.key(1), (BATCH,), 0, 5)


def ln_norms(params, part):
    """ln of the Frobenius norm of the `part` (w or b) of every layer, by NumPy in float64."""
    rows = [getattr(layers.affine_of(p), part) for p in params]
    rows = [rows[0][None], rows[1], rows[2][None]]
    return np.concatenate([np.log([np.linalg.norm(np.asarray(a, np.float64)) for a in r]) for r in rows if len(r)])


@pytest.mark.parametrize("width", [24, 12], ids=["gram", "direct"])
@pytest.mark.parametrize("phi", ["tanh", "relu", "gelu"])
@pytest.mark.parametrize("hidden", [layers.dense, layers.residual, layers.layernorm_dense])
def test_equals_grad_at_every_depth(hidden, phi, width):
    net = vgrad.mlp(width, phi, 7, 5, sigma_w=1.3, sigma_b=0.1, hidden=hidden)
    key, depth = jax.random.key(0), 9
    prof = vgrad.profile(net, net.init(key, depth), (X, LABELS), loss=losses.cross_entropy, depths=range(2, depth + 1))
    for i, d in enumerate(range(2, depth + 1)):
        grads = jax.grad(lambda p: losses.cross_entropy(net.forward(p, X), LABELS))(net.init(key, d))
        np.testing.assert_allclose(prof.log_grad_w[i, :d], ln_norms(grads, "w"), atol=1e-5)  # same maths, two routes
        np.testing.assert_allclose(prof.log_grad_b[i, :d], ln_norms(grads, "b"), atol=1e-5)
        assert all(np.isnan(f[i, d:]).all() for f in prof)


def test_the_attribution_adds_up():
    net = vgrad.mlp(24, "tanh", 7, 5, sigma_w=1.3)
    prof = vgrad.profile(net, net.init(jax.random.key(0), 20), (X, LABELS), loss=losses.cross_entropy)
    change = -np.diff(np.asarray(prof.log_delta[0]))
    np.testing.assert_allclose((prof.log_gain_w + prof.log_gain_phi)[0, :-1], change, atol=1e-5)
    assert np.isnan(prof.log_gain_w[0, -1])


@pytest.mark.parametrize(("phi", "sigma_w"), [("sigmoid", 1.0), ("relu", 4.0), ("identity", 0.01)])
def test_depth_10000_is_a_reading(phi, sigma_w):
    net = vgrad.mlp(24, phi, 7, 5, sigma_w=sigma_w)
    prof = vgrad.profile(net, net.init(jax.random.key(0), 10_000), (X, jnp.ones((BATCH, 5))), loss=losses.squared_error)
    assert all(np.isfinite(f[0, :-1]).all() for f in prof)
    assert abs(float(prof.log_delta[0, 0])) > 1000
