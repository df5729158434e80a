"""The backward equations by hand, against the textbook in NumPy, `jax.grad` and finite differences."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import vgrad
from vgrad import activations, backprop, losses

BATCH, IN_DIM, WIDTH, OUT_DIM = 6, 4, 8, 3
RNG = np.random.default_rng(0)
X, TARGET = (np.float32(RNG.normal(size=(BATCH, n))) for n in (IN_DIM, OUT_DIM))
LABELS = np.array([0, 1, 2, 0, 1, 2])


def cubic(z):
    return z - 0.1 * z * z * z


def network(phi, output="identity"):
    return vgrad.mlp(WIDTH, phi, IN_DIM, OUT_DIM, sigma_w=1.3, sigma_b=0.3, output=output)


NET = network("tanh")


def affine(*shape):
    w, b = (RNG.standard_normal(s, np.float32) for s in (shape, shape[:-2] + shape[-1:]))
    return vgrad.Affine(np.float32(1.3 / shape[-2] ** 0.5) * w, np.float32(0.3) * b)


DRAWN = vgrad.Params(affine(IN_DIM, WIDTH), affine(998, WIDTH, WIDTH), affine(WIDTH, OUT_DIM))


def params_of(depth):
    """All networks share their layers, whatever phi is: drawn once, by NumPy, and cut to length."""
    return DRAWN._replace(hidden=jax.tree.map(lambda a: a[: depth - 2], DRAWN.hidden))


PARAMS = params_of(4)


def float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def worst(ours, theirs):
    """The largest difference in any leaf, relative to the largest entry of that leaf."""
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    pairs = zip(*(jax.tree.leaves(jax.device_get(tree)) for tree in (ours, theirs)), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs if a.size)


@pytest.mark.parametrize(
    ("depth", "phi"), [(2, "sigmoid"), (2, "relu"), (3, "tanh"), (4, "sigmoid"), (4, "relu"), (4, cubic), (9, "gelu")]
)
def test_equals_grad(depth, phi):
    net, params = network(phi), params_of(depth)
    cases = [(losses.squared_error, TARGET), (losses.cross_entropy, LABELS)]

    @jax.jit
    def both(params):
        return [
            (
                backprop.backward_from_loss(params, (X, t), loss=loss, phi=phi).grads,
                jax.grad(lambda p: loss(net.forward(p, X), t))(params),
            )
            for loss, t in cases
        ]

    for ours, theirs in both(params):
        assert jax.tree.structure(ours) == jax.tree.structure(params)
        assert worst(ours, theirs) < 1e-5  # same maths, two routes


@pytest.mark.parametrize("output", ["softmax", cubic])
def test_another_activation_at_the_output(output):
    net = network("tanh", output)

    @jax.jit
    def both(params):
        theirs = jax.grad(lambda p: losses.squared_error(net.forward(p, X), TARGET))(params)
        kwargs = dict(phi="tanh", output=output)
        ours = backprop.backward_from_loss(params, (X, TARGET), loss=losses.squared_error, **kwargs).grads
        d_out = (net.forward(params, X) - TARGET) / BATCH  # dA_L of the squared error
        given = backprop.backward_pass(params, X, d_out, **kwargs).grads
        return ours, given, theirs, backprop.multiply_out(backprop.expanded_product(params, X, d_out, **kwargs))

    ours, given, theirs, product = both(PARAMS)
    assert worst(ours, theirs) < 1e-5
    assert worst(given, theirs) < 1e-5
    assert worst(product, theirs.embed.w) < 1e-5


def test_equals_the_textbook_column_by_column(x64):
    """Sigmoid network of depth 4 with samples in columns and sigma' = a (1 - a), in NumPy."""
    params = float64(PARAMS)
    W = [np.nan, *(w.T for w in (params.embed.w, *params.hidden.w, params.readout.w))]
    b = [np.nan, *(b[:, None] for b in (params.embed.b, *params.hidden.b, params.readout.b))]
    A, Z = [np.asarray(X, np.float64).T], [np.nan]
    for l in range(1, 5):
        Z.append(W[l] @ A[l - 1] + b[l])
        A.append(1 / (1 + np.exp(-Z[l])))
    slope = [a * (1 - a) for a in A]
    dA_4 = np.asarray(TARGET, np.float64).T
    dZ_4 = dA_4 * slope[4]
    dZ_3 = W[4].T @ dZ_4 * slope[3]
    dZ_2 = W[3].T @ dZ_3 * slope[2]
    dZ_1 = W[2].T @ dZ_2 * slope[1]

    x, d_out = A[0].T, dA_4.T
    kwargs = dict(phi="sigmoid", output="sigmoid")
    both = jax.jit(lambda p: (backprop.forward_pass(p, x, **kwargs), backprop.backward_pass(p, x, d_out, **kwargs)))
    (z, h), (delta, grads) = jax.device_get(both(params))
    z, h, delta, grads_w, grads_b = (
        [a.T for a in (p[0], *p[1], p[2])] for p in (z, h, delta, [p.w for p in grads], [p.b for p in grads])
    )
    for l, dZ in enumerate([dZ_1, dZ_2, dZ_3, dZ_4], start=1):
        ours = [of_layers[l - 1] for of_layers in (z, h, delta, grads_w, grads_b)]
        theirs = [Z[l], A[l], dZ, dZ @ A[l - 1].T, dZ.sum(axis=1)]
        assert worst(ours, theirs) < 1e-12  # same maths, two routes, float64


@pytest.mark.parametrize(("loss", "t"), [(losses.squared_error, TARGET), (losses.cross_entropy, LABELS)])
def test_equals_finite_differences(loss, t, x64):
    params, x = float64((PARAMS, X))
    t = t if t.dtype == LABELS.dtype else np.float64(t)
    eps = 1e-5  # truncation of order eps^2 = 1e-10, rounding of order 1e-16 / eps = 1e-11

    @jax.jit
    def both(params):
        flat, unravel = ravel_pytree(params)
        J = jax.vmap(lambda p: loss(NET.forward(unravel(p), x), t))
        steps = eps * np.eye(flat.size)
        differences = (J(flat[None] + steps) - J(flat[None] - steps)) / (2 * eps)
        return backprop.backward_from_loss(params, (x, t), loss=loss, phi="tanh").grads, unravel(differences)

    ours, theirs = both(params)
    assert worst(ours, theirs) < 1e-7  # the largest entries are of order 0.1


def test_depth_1000_equals_grad(x64):
    params, x, target = float64((DRAWN, X, TARGET))

    @jax.jit
    def both(params):
        ours = backprop.backward_from_loss(params, (x, target), loss=losses.squared_error, phi="tanh").grads
        return ours, jax.grad(lambda p: losses.squared_error(NET.forward(p, x), target))(params)

    ours, theirs = jax.device_get(both(params))
    assert np.max(np.abs(theirs.embed.w)) > 0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # Layer by layer, because their gradients differ by orders of magnitude. Rounding grows by 1e-16 a layer and by the
        # cancellation in it.
        size = np.max(np.abs(b), axis=tuple(range(1, b.ndim)), keepdims=True)
        assert np.max(np.abs(a - b) / np.where(size > 0, size, 1)) < 1e-10


def test_the_program_does_not_grow_with_depth():
    def lines(depth):
        params = jax.eval_shape(lambda key: NET.init(key, depth), jax.random.key(0))
        jaxpr = jax.make_jaxpr(lambda p: backprop.backward_from_loss(p, (X, TARGET), loss=losses.squared_error, phi="tanh"))
        return len(str(jaxpr(params)).splitlines())

    assert lines(10_000) == lines(10)


def test_expanded_product_of_four_layers():
    labels = []

    @jax.jit
    def both():
        factors = backprop.expanded_product(PARAMS, X, TARGET, phi="tanh")
        labels.extend((f.name, f.kind, f.array.shape) for f in factors)
        dW_1 = jax.grad(lambda params: jnp.sum(NET.forward(params, X) * TARGET))(PARAMS).embed.w
        return [f.array for f in factors], backprop.multiply_out(factors), dW_1

    factors, product, dW_1 = jax.device_get(both())
    assert labels == [
        ("X^T", "matrix", (IN_DIM, BATCH)),
        ("dA_4", "elementwise", (BATCH, OUT_DIM)),
        ("g'(Z_4)", "elementwise", (BATCH, OUT_DIM)),
        ("W_4^T", "matrix", (OUT_DIM, WIDTH)),
        ("phi'(Z_3)", "elementwise", (BATCH, WIDTH)),
        ("W_3^T", "matrix", (WIDTH, WIDTH)),
        ("phi'(Z_2)", "elementwise", (BATCH, WIDTH)),
        ("W_2^T", "matrix", (WIDTH, WIDTH)),
        ("phi'(Z_1)", "elementwise", (BATCH, WIDTH)),
    ]
    x_t, dA_4, g_4, W_4, phi_3, W_3, phi_2, W_2, phi_1 = factors
    written_out = x_t @ ((((dA_4 * g_4) @ W_4 * phi_3) @ W_3 * phi_2) @ W_2 * phi_1)
    assert worst(written_out, dW_1) < 1e-5
    assert worst(product, dW_1) < 1e-5
    # The factors are those of layers 1 to 4 and not of others.
    np.testing.assert_array_equal(W_4, PARAMS.readout.w.T)
    np.testing.assert_array_equal(W_3, PARAMS.hidden.w[1].T)
    np.testing.assert_array_equal(W_2, PARAMS.hidden.w[0].T)
    z_2 = np.tanh(X @ PARAMS.embed.w + PARAMS.embed.b) @ PARAMS.hidden.w[0] + PARAMS.hidden.b[0]
    np.testing.assert_allclose(phi_2, 1 - np.tanh(z_2) ** 2, atol=1e-6)


def test_expanded_product_of_two_layers_and_softmax():
    params = params_of(2)
    kinds = {}

    @jax.jit
    def both():
        factors = backprop.expanded_product(params, X, TARGET, phi="tanh", output="softmax")
        kinds.update({f.name: f.kind for f in factors})
        dW_1 = jax.grad(lambda w: jnp.sum(jax.nn.softmax(jnp.tanh(X @ w + b) @ readout.w + c) * TARGET))(params.embed.w)
        return backprop.multiply_out(factors), dW_1

    readout, b, c = params.readout, params.embed.b[None], params.readout.b[None]
    assert worst(*both()) < 1e-5
    assert list(kinds) == ["X^T", "dA_2", "g'(Z_2)", "W_2^T", "phi'(Z_1)"]
    assert list(kinds.values()) == ["matrix", "elementwise", "jacobian", "matrix", "elementwise"]


def test_vmap_equals_loop_and_jit_equals_no_jit():
    def run(params):
        return backprop.backward_pass(params, X, TARGET, phi="tanh")

    jitted = jax.jit(run)
    seeds = [PARAMS, jax.tree.map(lambda a: np.float32(0.5) * a, PARAMS)]
    stacked = jax.jit(jax.vmap(run))(jax.tree.map(lambda *a: np.stack(a), *seeds))
    for i, params in enumerate(seeds):
        assert worst(jax.tree.map(lambda a, i=i: np.asarray(a)[i], stacked), jitted(params)) < 1e-5
    assert worst(jitted(PARAMS), run(PARAMS)) < 1e-5


def test_a_nan_stays_in_its_own_row():
    x = np.array(X)
    x[2, 0] = np.nan
    delta = np.asarray(jax.jit(lambda x: backprop.backward_pass(PARAMS, x, TARGET, phi="tanh").delta.embed)(x))
    others = np.delete(delta, 2, axis=0)
    assert np.isnan(delta[2]).all()
    assert np.isfinite(others).all()


OK = dict(params=PARAMS, x=X, d_out=TARGET, phi="tanh")
NOT_SQUARE = PARAMS._replace(hidden=PARAMS.hidden._replace(w=PARAMS.hidden.w[:, :, 1:]))
UNSTACKED = PARAMS._replace(hidden=vgrad.Affine(PARAMS.hidden.w[0], PARAMS.hidden.b[0]))
SEEDS = jax.tree.map(lambda a: np.stack([a, a]), PARAMS)


@pytest.mark.parametrize("fn", [backprop.backward_pass, backprop.expanded_product])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(d_out=TARGET[:, :2]), r"d_out is float32\[6, 2\], expected float32\[6, 3\]"),
        (dict(d_out=TARGET[0]), r"d_out is float32\[3\], expected float32\[6, 3\]: dJ/dy, a row per sample"),
        (dict(d_out=LABELS), r"d_out is int32\[6\], expected float32\[6, 3\]"),
        (dict(x=X[:, :3]), r"x has shape \(6, 3\), expected \[B, 4\]"),
        (dict(x=X[0]), r"For one sample use x\[None\]"),
        (dict(params=NOT_SQUARE), r"params.hidden.w has shape \(2, 8, 7\), expected \(2, 8, 8\)"),
        (dict(params=UNSTACKED), "stacked on a leading axis"),
        (dict(params=SEEDS), "use jax.vmap"),
        (dict(phi="tahn"), "did you mean 'tanh'"),
        (dict(phi="softmax"), "not elementwise"),
        (dict(output="sigmiod"), "did you mean 'sigmoid'"),
        (dict(output=jax.nn.log_softmax), "not elementwise"),
    ],
)
def test_bad_input_is_an_error(fn, change, message):
    arguments = OK | change
    with pytest.raises(ValueError, match=message):
        fn(arguments.pop("params"), arguments.pop("x"), arguments.pop("d_out"), **arguments)


def test_an_output_that_mixes_units_is_told_what_to_do():
    with pytest.raises(ValueError, match="not elementwise") as error:
        backprop.forward_pass(PARAMS, X, phi="tanh", output=jax.nn.log_softmax)
    assert any('only "softmax" may mix units' in note for note in error.value.__notes__)


def test_softmax_is_the_same_by_name_and_as_a_function():
    outputs = (jax.nn.softmax, activations.softmax, "softmax")
    run = lambda: [backprop.forward_pass(PARAMS, X, phi="tanh", output=g).h.readout for g in outputs]  # noqa: E731
    passes, expected = jax.jit(lambda: (run(), jax.nn.softmax(NET.forward(PARAMS, X))))()
    for y in passes:
        np.testing.assert_allclose(y, expected, atol=1e-6)


def test_parameters_of_another_kind_are_a_type_error():
    others: list[Any] = [tuple(PARAMS), PARAMS._replace(embed={"affine": PARAMS.embed})]
    for params in others:
        with pytest.raises(TypeError, match="not those of a dense network"):
            backprop.forward_pass(params, X, phi="tanh")


def test_a_loss_that_is_no_scalar_is_an_error():
    with pytest.raises(ValueError, match=r"loss returned \(6, 3\), expected a scalar"):
        backprop.backward_from_loss(PARAMS, (X, TARGET), loss=lambda y, t: y - t, phi="tanh")
    with pytest.raises(ValueError, match=r"labels contain 3, expected 0..2"):
        backprop.backward_from_loss(PARAMS, (X, LABELS + 1), loss=losses.cross_entropy, phi="tanh")
