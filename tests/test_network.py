"""Networks against a loop in NumPy; draws that share their layers; programs that do not grow with depth."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import vgrad
from vgrad import activations, layers
from vgrad.network import check_depth, check_input

BATCH, IN, WIDTH, OUT = 5, 3, 6, 2
RNG = np.random.default_rng(0)
X: Any = RNG.normal(size=(BATCH, IN)).astype(np.float32)
KEY = jax.random.key(0)


def network(**options):
    known: dict[str, Any] = dict(sigma_w=1.3, sigma_b=0.4)
    return vgrad.mlp(WIDTH, "tanh", IN, OUT, **known | options)


def affine(*shape):
    w, b = (RNG.standard_normal(s, np.float32) for s in (shape, shape[:-2] + shape[-1:]))
    return vgrad.Affine(np.float32(1.3 / shape[-2] ** 0.5) * w, np.float32(0.4) * b)


NET = network()
INIT = jax.jit(NET.init, static_argnums=1)
PARAMS = vgrad.Params(affine(IN, WIDTH), affine(5, WIDTH, WIDTH), affine(WIDTH, OUT))  # by NumPy, which compiles nothing
FORWARD = jax.jit(NET.forward)


def draw(key, depth):
    return jax.device_get(INIT(key, depth))


def by_loop(params, x, hidden=lambda z, w, b: np.tanh(z) @ w + b):
    """The network layer by layer, in NumPy and float64."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    z = x @ params.embed.w + params.embed.b
    for w, b in zip(params.hidden.w, params.hidden.b, strict=True):
        z = hidden(z, w, b)
    return np.tanh(z) @ params.readout.w + params.readout.b


def test_forward_is_a_loop_over_layers():
    np.testing.assert_allclose(FORWARD(PARAMS, X), by_loop(PARAMS, X), rtol=1e-5, atol=1e-6)
    shallow = PARAMS._replace(hidden=jax.tree.map(lambda a: a[:0], PARAMS.hidden))
    expected = np.tanh(X @ PARAMS.embed.w + PARAMS.embed.b) @ PARAMS.readout.w + PARAMS.readout.b
    np.testing.assert_allclose(jax.jit(NET.forward)(shallow, X), expected, rtol=1e-5, atol=1e-6)


def test_forward_of_a_residual_stack():
    net = network(hidden=layers.residual)
    expected = by_loop(PARAMS, X, lambda z, w, b: z + np.tanh(z) @ w + b)  # the same parameters: they are laid out alike
    np.testing.assert_allclose(jax.jit(net.forward)(PARAMS, X), expected, rtol=1e-5, atol=1e-6)


def test_jit_equals_no_jit_and_it_is_traced_once():
    np.testing.assert_allclose(NET.forward(PARAMS, X), FORWARD(PARAMS, X), rtol=1e-6, atol=1e-6)
    once = jax.jit(chex.assert_max_traces(NET.forward, n=1))
    for scale in (1.0, 2.0, 3.0):
        once(jax.tree.map(lambda a, s=scale: np.float32(s) * a, PARAMS), X)


def test_shapes():
    for depth in (2, 3, 7):
        params = jax.eval_shape(lambda key, d=depth: NET.init(key, d), KEY)
        assert params.embed.w.shape == (IN, WIDTH)
        assert params.hidden.w.shape == (depth - 2, WIDTH, WIDTH)
        assert params.hidden.b.shape == (depth - 2, WIDTH)
        assert params.readout.w.shape == (WIDTH, OUT)
        assert jax.eval_shape(NET.forward, params, X).shape == (BATCH, OUT)


def test_depths_of_one_key_share_their_layers():
    deep = draw(KEY, 7)
    for depth in (2, 5):
        params = draw(KEY, depth)
        jax.tree.map(np.testing.assert_array_equal, params.embed, deep.embed)
        jax.tree.map(np.testing.assert_array_equal, params.readout, deep.readout)
        jax.tree.map(np.testing.assert_array_equal, params.hidden, jax.tree.map(lambda a, d=depth: a[: d - 2], deep.hidden))


def test_layers_are_independent_draws_with_the_std_asked_for():
    net = vgrad.mlp(40, "relu", 40, 40, sigma_w=1.7, sigma_b=0.6)
    params = jax.tree.map(np.asarray, jax.jit(net.init, static_argnums=1)(KEY, 12))
    w = np.concatenate([params.embed.w[None], params.hidden.w, params.readout.w[None]])
    b = np.concatenate([params.embed.b[None], params.hidden.b, params.readout.b[None]])
    # The relative standard error of a variance of n normal draws is sqrt(2 / n).
    assert abs(w.var() / (1.7**2 / 40) - 1) < 4 * np.sqrt(2 / w.size)
    assert abs(b.var() / 0.6**2 - 1) < 4 * np.sqrt(2 / b.size)
    flat = w.reshape(12, -1)
    overlap = np.corrcoef(flat) - np.eye(12)
    assert np.max(np.abs(overlap)) < 5 / np.sqrt(flat.shape[1])  # 66 pairs, each with a standard error of 1 / sqrt(1600)


def test_same_key_same_draw_other_key_other_draw():
    first, again, other = (draw(jax.random.key(k), 7) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not any(np.any(a == b) for a, b in zip(*map(jax.tree.leaves, (first, other)), strict=True))


def test_seeds_by_vmap_equal_a_loop():
    keys = jax.random.split(KEY, 3)
    run = jax.jit(jax.vmap(lambda key: (lambda p: (p, NET.forward(p, X)))(NET.init(key, 7))))
    lanes, y = jax.tree.map(np.asarray, run(keys))
    for i in range(3):
        alone = draw(keys[i], 7)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), lanes, alone)
        np.testing.assert_allclose(y[i], FORWARD(alone, X), rtol=1e-5, atol=1e-6)


def test_a_nan_stays_in_its_own_row():
    x = X.copy()
    x[1, 0] = np.nan
    np.testing.assert_array_equal(np.isnan(FORWARD(PARAMS, x)).all(1), [False, True, False, False, False])
    np.testing.assert_allclose(np.delete(FORWARD(PARAMS, x), 1, 0), np.delete(FORWARD(PARAMS, X), 1, 0), rtol=1e-6)


def test_the_program_does_not_grow_with_depth():
    def words(depth):
        params = jax.eval_shape(lambda key: NET.init(key, depth), KEY)
        init = jax.make_jaxpr(lambda key: NET.init(key, depth))(KEY)
        grad = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(NET.forward(p, X))))(params)
        return [len(str(jaxpr).split()) for jaxpr in (init, grad)]

    assert all(deep <= shallow for deep, shallow in zip(words(10_000), words(10), strict=True))


def test_the_gradient_is_that_of_finite_differences(x64):
    net, x = network(), X.astype(np.float64)
    params = jax.tree.map(np.float64, PARAMS)
    eps = 1e-5  # truncation of order eps^2 = 1e-10, rounding of order 1e-16 / eps = 1e-11

    @jax.jit
    def both(params):
        flat, unravel = ravel_pytree(params)
        J = lambda p: jnp.sum(jnp.sin(net.forward(unravel(p), x)))  # noqa: E731
        steps = eps * np.eye(flat.size)
        ends = jax.vmap(J)(jnp.concatenate([flat[None] + steps, flat[None] - steps])).reshape(2, -1)
        return jax.grad(J)(flat), (ends[0] - ends[1]) / (2 * eps)

    np.testing.assert_allclose(*both(params), atol=1e-7)


def test_sigmas_are_traceable_through_the_draw():
    def J(sigma_w, sigma_b):
        net = network(sigma_w=sigma_w, sigma_b=sigma_b)
        return jnp.sum(jnp.square(net.forward(net.init(KEY, 7), X)))

    step = 1e-2  # central differences of a float32 function: rounding of 1e-6 / step, truncation of step^2
    sigma_w = np.array([1.3, 1.3 + step, 1.3 - step, 1.3, 1.3], np.float32)
    sigma_b = np.array([0.4, 0.4, 0.4, 0.4 + step, 0.4 - step], np.float32)
    value, grads = jax.jit(jax.vmap(jax.value_and_grad(J, (0, 1))))(sigma_w, sigma_b)
    np.testing.assert_allclose(value[0], np.sum(np.square(FORWARD(draw(KEY, 7), X))), rtol=1e-5)  # traced equals not traced
    expected = [(value[1] - value[2]) / (2 * step), (value[3] - value[4]) / (2 * step)]
    np.testing.assert_allclose([g[0] for g in grads], expected, rtol=5e-3)


def test_output_by_name_and_by_function():
    z = np.asarray(FORWARD(PARAMS, X), np.float64)
    e = np.exp(z - z.max(1, keepdims=True))
    expected = {
        "softmax": e / e.sum(1, keepdims=True),
        "sigmoid": 1 / (1 + np.exp(-z)),
        jnp.square: z * z,
        jax.nn.log_softmax: np.log(e / e.sum(1, keepdims=True)),  # an output may mix units
    }
    ours = jax.jit(lambda p, x: [network(output=output).forward(p, x) for output in expected])(PARAMS, X)
    for y, theirs in zip(ours, expected.values(), strict=True):
        np.testing.assert_allclose(y, theirs, rtol=1e-5, atol=1e-6)
    assert NET.output is activations.identity


def test_stack_of_three_blocks():
    embed, block, readout = (layers.linear(n, m, sigma_w=1.3, sigma_b=0.4) for n, m in ((IN, WIDTH), (WIDTH, WIDTH), (WIDTH, OUT)))
    net = vgrad.stack(embed, block, readout, output=jnp.sin)
    h = X.astype(np.float64)
    for w, b in [PARAMS.embed, *zip(*PARAMS.hidden, strict=True), PARAMS.readout]:
        h = h @ np.asarray(w, np.float64) + np.asarray(b, np.float64)
    np.testing.assert_allclose(jax.jit(net.forward)(PARAMS, X), np.sin(h), rtol=1e-4, atol=1e-4)
    shapes = jax.eval_shape(lambda key: net.init(key, 7), KEY)
    jax.tree.map(lambda a, b: chex.assert_equal_shape([a, b]), shapes, PARAMS)


@pytest.mark.parametrize(
    ("depth", "error", "message"),
    [
        (1, ValueError, "depth is 1, expected at least 2"),
        (0, ValueError, "depth is 0"),
        (-3, ValueError, "depth is -3"),
        (True, TypeError, "depth is True, expected an integer"),
        (3.0, TypeError, "depth is 3.0, expected an integer"),
        (np.float32(3), TypeError, "expected an integer"),
        ("3", TypeError, "depth is '3', expected an integer"),
        (None, TypeError, "depth is None"),
    ],
)
def test_bad_depth(depth, error, message):
    for call in (lambda: NET.init(KEY, depth), lambda: check_depth(depth)):
        with pytest.raises(error, match=message):
            call()


def test_depths_that_numpy_counted_and_traced_ones():
    shapes = jax.eval_shape(lambda key: NET.init(key, np.int64(4)), KEY)
    assert shapes.hidden.w.shape == (2, WIDTH, WIDTH)
    with pytest.raises(TypeError):
        jax.jit(lambda d: NET.init(KEY, d))(4)


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (X[0], r"\(3,\)"),
        (X[:, :2], r"\(5, 2\)"),
        (X.T, r"\(3, 5\)"),
        (X[None], r"\(1, 5, 3\)"),
        (np.float32(1.0), r"\(\)"),
        (X[:0], r"\(0, 3\)"),
    ],
)
def test_bad_x(x, shape):
    for call in (lambda: NET.forward(PARAMS, x), lambda: FORWARD(PARAMS, x), lambda: check_input(PARAMS, x)):
        with pytest.raises(ValueError, match=rf"x has shape {shape}, expected \[B, 3\]"):
            call()


def test_a_list_is_no_x():
    with pytest.raises(TypeError, match=r"x is list, expected an array \[B, in_dim\]"):
        NET.forward(PARAMS, X.tolist())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(width=0), ValueError, "is 0, expected an integer of at least 1"),
        (dict(width=-2), ValueError, "is -2, expected an integer of at least 1"),
        (dict(width=2.0), ValueError, "is 2.0, expected an integer of at least 1"),
        (dict(width=True), ValueError, "is True, expected an integer of at least 1"),
        (dict(in_dim=0), ValueError, "is 0, expected an integer of at least 1"),
        (dict(out_dim=0), ValueError, "is 0, expected an integer of at least 1"),
        (dict(phi="tahn"), ValueError, "did you mean 'tanh'"),
        (dict(phi="softmax"), ValueError, "softmax is not elementwise"),
        (dict(phi=jax.nn.softmax), ValueError, "phi=softmax is not elementwise"),
        (dict(phi=2), TypeError, "phi is int"),
        (dict(output="sigmiod"), ValueError, "did you mean 'sigmoid'"),
        (dict(output=3), TypeError, "output is int, expected a name or a function"),
        (dict(weights="xavier"), ValueError, "did you mean 'xavier_fan_"),
        (dict(weights=1.0), TypeError, "weights is float"),
        (dict(sigma_w=-0.1), ValueError, "sigma_w is -0.1, expected a finite number >= 0"),
        (dict(sigma_b=-0.1), ValueError, "sigma_b is -0.1, expected a finite number >= 0"),
        (dict(sigma_w=np.inf), ValueError, "sigma_w is inf, expected a finite number"),
        (dict(hidden="residual"), TypeError, "hidden is 'residual', expected a constructor of blocks"),
        (dict(sigma_w=np.nan), ValueError, "sigma_w is nan"),
        (dict(sigma_w=np.ones(3)), ValueError, r"sigma_w has shape \(3,\), expected a scalar"),
        (dict(sigma_w=None), TypeError, "sigma_w is None, expected a number"),
    ],
)
def test_bad_options(change, error, message):
    with pytest.raises(error, match=message):
        vgrad.mlp(**dict(width=4, phi="tanh", in_dim=3, out_dim=2) | change)
