"""Mean and variance of every draw by Monte Carlo, shapes and signatures as in `jax.nn.initializers`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgrad import initializers, layers
from vgrad.initializers import INITIALIZERS

SIGMA = 1.7
SEEDS = 1500
SHAPES = [(30, 8), (8, 30)]  # [fan_in, fan_out]
KEY = jax.random.key(0)
# name: (initializer, the mean of an entry, its variance), as functions of fan_in n and fan_out m.
MOMENTS = {
    "normal": (initializers.normal(SIGMA), lambda n, m: (0, SIGMA**2 / n)),
    "uniform": (initializers.uniform(SIGMA), lambda n, m: (0, SIGMA**2 / n)),
    "truncated_normal": (initializers.truncated_normal(SIGMA), lambda n, m: (0, SIGMA**2 / n)),
    "orthogonal": (initializers.orthogonal(SIGMA), lambda n, m: (0, SIGMA**2 / n)),
    "lecun": (initializers.lecun(), lambda n, m: (0, 1 / n)),
    "he": (initializers.he(), lambda n, m: (0, 2 / n)),
    "xavier_fan_in": (initializers.xavier_fan_in(), lambda n, m: (0, 1 / n)),
    "xavier_fan_avg": (initializers.xavier_fan_avg(), lambda n, m: (0, 2 / (n + m))),
    "positive_uniform": (initializers.positive_uniform(3.0), lambda n, m: (math.sqrt(3.0 / n) / 2, 3.0 / (12 * n))),
}


@pytest.fixture(scope="module")
def draws():
    """{shape: {name: [seeds, fan_in, fan_out]}} in one program per shape."""
    keys = jax.random.split(KEY, SEEDS)

    def all_of(shape):
        return jax.jit(jax.vmap(lambda key: {name: init(key, shape, jnp.float32) for name, (init, _) in MOMENTS.items()}))(keys)

    return {shape: jax.tree.map(lambda a: np.asarray(a, np.float64), all_of(shape)) for shape in SHAPES}


def assert_is_mean_of(samples, expected):
    """Within 4 standard errors over the seeds, plus rounding where the samples do not vary."""
    stderr = samples.std(ddof=1) / math.sqrt(samples.size)
    assert abs(samples.mean() - expected) < 4 * stderr + 1e-6 * (1 + abs(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MOMENTS)
def test_mean_and_variance(name, shape, draws):
    mean, var = MOMENTS[name][1](*shape)
    w = draws[shape][name]
    assert_is_mean_of(w.mean((1, 2)), mean)
    assert_is_mean_of(np.square(w - mean).mean((1, 2)), var)
    # Every entry, not only their average, has this variance: none of fan_in and fan_out is swapped along an axis.
    per_entry = np.square(w - mean).mean(0) / var
    # The variance of an estimated variance is at most 2 / seeds for these laws; 5 for the largest of 240 entries.
    assert np.max(np.abs(per_entry - 1)) < 5 * math.sqrt(2 / SEEDS)


def test_entries_are_uncorrelated(draws):
    """Of iid draws with mean zero: the covariance of two neighbours, in a row and in a column."""
    for name in ("normal", "uniform", "truncated_normal", "xavier_fan_avg"):
        w = draws[SHAPES[0]][name]
        for product in (w[:, 1:] * w[:, :-1], w[:, :, 1:] * w[:, :, :-1]):
            assert_is_mean_of(product.mean((1, 2)), 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_bounds_and_shape_of_the_laws(shape, draws):
    n, w = shape[0], draws[shape]
    std = SIGMA / math.sqrt(n)
    # The standard deviation of a unit normal cut at ±2 is sqrt(1 - 4 f(2) / (2 F(2) - 1)).
    density, mass = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    cut = 2 * std / math.sqrt(1 - 4 * density / mass)
    for name, low, high in (
        ("uniform", -math.sqrt(3) * std, math.sqrt(3) * std),
        ("truncated_normal", -cut, cut),
        ("positive_uniform", 0.0, math.sqrt(3.0 / n)),
    ):
        slack = 1e-4 * (high - low)
        assert low * (1 + 1e-6) <= w[name].min() < low + 10 * slack
        assert high - 10 * slack < w[name].max() <= high * (1 + 1e-6)
    # Fourth moments tell the normal (3) from the uniform (9/5).
    for name, kurtosis in (("normal", 3.0), ("uniform", 1.8), ("he", 3.0), ("xavier_fan_avg", 3.0)):
        var = MOMENTS[name][1](*shape)[1]
        assert_is_mean_of((w[name] ** 4).mean((1, 2)) / var**2, kurtosis)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_rows_or_columns(shape, draws):
    n, m = shape
    for w in draws[shape]["orthogonal"][:3]:
        gram = w.T @ w if n >= m else w @ w.T
        np.testing.assert_allclose(gram, SIGMA**2 * max(n, m) / n * np.eye(min(shape)), atol=1e-5 * SIGMA**2 * max(n, m) / n)


def test_square_orthogonal_is_an_isometry_and_haar():
    draw = jax.jit(jax.vmap(lambda key: initializers.orthogonal(SIGMA)(key, (6, 6))))
    w = np.asarray(draw(jax.random.split(KEY, 800)), np.float64)
    np.testing.assert_allclose(np.linalg.svd(w[0], compute_uv=False), SIGMA, rtol=1e-5)
    np.testing.assert_allclose(w[0].T @ w[0], SIGMA**2 * np.eye(6), atol=1e-5)
    # Haar: E tr W = 0 and E (tr W)^2 = sigma^2, which a QR without the sign of R's diagonal misses.
    trace = np.trace(w, axis1=1, axis2=2)
    assert_is_mean_of(trace, 0.0)
    assert_is_mean_of(trace**2, SIGMA**2)


def test_identity_is_cut_or_padded():
    shapes = (4, 4), (2, 3), (3, 2)
    draw = jax.jit(lambda key: [initializers.identity(2.5)(key, shape) for shape in shapes])
    for key in (KEY, jax.random.key(5)):
        for w, shape in zip(draw(key), shapes, strict=True):
            np.testing.assert_array_equal(w, 2.5 * np.eye(*shape, dtype=np.float32))


def test_positive_uniform_is_the_literal_recipe(draws):
    """Its mean part has the gain sqrt(scale fan_in) / 2 on a vector of ones."""
    w = draws[SHAPES[0]]["positive_uniform"]
    n, m = SHAPES[0]
    mean = np.full((n, m), math.sqrt(3.0 / n) / 2)
    gain = np.linalg.norm(np.ones(n) @ mean) / math.sqrt(n) / math.sqrt(m / n)
    np.testing.assert_allclose(gain, math.sqrt(3.0 * n) / 2, rtol=1e-12)
    np.testing.assert_allclose(w.mean(0), mean, atol=5 * math.sqrt(3.0 / (12 * n) / SEEDS))


TRACEABLE = [
    initializers.normal, initializers.uniform, initializers.truncated_normal, initializers.orthogonal, initializers.identity,
]  # fmt: skip


def test_sigma_w_is_traceable():
    """W is linear in sigma_w, so that dW / dsigma_w = W / sigma_w; positive_uniform goes as the square root of its scale."""
    weights, sigmas = np.random.default_rng(3).standard_normal((5, 3), np.float32), (0.5, 2.0)

    @jax.jit
    def values_and_grads(traced):
        def of(make):
            number = lambda s: jnp.sum(weights * make(s)(KEY, (5, 3)))  # noqa: E731
            return *jax.vmap(jax.value_and_grad(number))(traced), [number(s) for s in sigmas]

        return [of(make) for make in [*TRACEABLE, initializers.positive_uniform]]

    for i, (value, grad, alone) in enumerate(jax.device_get(values_and_grads(np.float32(sigmas)))):
        np.testing.assert_allclose(grad, (1 if i < len(TRACEABLE) else 0.5) * value / np.float32(sigmas), rtol=1e-5)
        np.testing.assert_allclose(value, alone, rtol=1e-5, atol=1e-5)  # vmap equals loop, traced equals not


@pytest.mark.parametrize("name", INITIALIZERS)
def test_the_signature_is_that_of_jax(name):
    init, shape, half = initializers.get(name), (3, 4), jnp.float16
    drawn = jax.eval_shape(lambda: (init(KEY, shape), init(KEY, shape, half), init(key=KEY, shape=shape, dtype=half)))
    assert [(a.shape, a.dtype) for a in drawn] == [(shape, jnp.float32), (shape, half), (shape, half)]
    with jax.enable_x64(True):
        a, b = jax.eval_shape(lambda: (init(KEY, (3, 4)), init(KEY, (3, 4), jnp.float32)))
        assert (a.dtype, b.dtype) == (jnp.float64, jnp.float32)


@pytest.mark.parametrize(("ours", "mode"), [("lecun", "fan_in"), ("xavier_fan_avg", "fan_avg")])
def test_the_fans_are_those_of_jax(ours, mode):
    """Also of a convolution's kernel: in float64 the draws are jax's own, so that nothing but the std can differ."""
    theirs = jax.nn.initializers.variance_scaling(1.0, mode, "normal")
    with jax.enable_x64(True):
        for shape in ((4, 6), (3, 2, 4, 6)):
            np.testing.assert_allclose(initializers.get(ours)(KEY, shape), theirs(KEY, shape), rtol=1e-14)
    with pytest.raises(ValueError, match=r"the shape of the weights is \(4,\), expected \[fan_in, fan_out\]"):
        initializers.get(ours)(KEY, (4,))


def test_an_initializer_of_jax_fits_everywhere():
    theirs: Any = jax.nn.initializers.he_uniform()
    assert initializers.get(theirs) is theirs

    @jax.jit
    def both(key):
        return layers.linear(6, 4, weights=theirs, sigma_w=0.5).init(key).w, theirs(jax.random.split(key)[0], (6, 4), jnp.float32)

    ours, expected = jax.device_get(both(KEY))
    np.testing.assert_allclose(ours, 0.5 * expected, rtol=1e-6)


def test_same_key_same_draw_other_key_other_draw():
    init = initializers.get("he")
    a, b, c = (np.asarray(init(k, (3, 4))) for k in (KEY, jax.random.key(0), jax.random.key(1)))
    np.testing.assert_array_equal(a, b)
    assert not np.any(a == c)


def test_sigma_zero_draws_zeros():
    assert not np.any(initializers.normal(0.0)(KEY, (3, 4)))


@pytest.mark.parametrize("make", [*TRACEABLE, initializers.positive_uniform], ids=lambda f: f.__name__)
def test_a_sigma_that_is_none_is_an_error(make):
    for bad in (-1.0, -1, math.nan, np.float32(-0.5), jnp.float32(-0.5)):
        with pytest.raises(ValueError, match=r"is (-\d|nan).*, expected a finite number >= 0"):
            make(bad)
    with pytest.raises(ValueError, match=r"has shape \(2,\), expected a scalar"):
        make(jnp.ones(2))
    for bad in ("big", None, [1.0, 2.0], 1j):
        with pytest.raises(TypeError, match="expected a number"):
            make(bad)


@pytest.mark.parametrize(
    ("typed", "meant"), [("lecum", "lecun"), ("He", "he"), ("xavier_fan_out", "xavier_fan"), ("ortogonal", "orthogonal")]
)
def test_an_unknown_name_gets_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=f"unknown initializer '{typed}', did you mean '{meant}"):
        initializers.get(typed)


def test_neither_a_name_nor_a_function_is_an_error():
    with pytest.raises(ValueError, match=r"unknown initializer 'zzzz'. Known: normal, .*positive_uniform"):
        initializers.get("zzzz")
    for bad in (3, None, np.ones((2, 2))):
        with pytest.raises(TypeError, match=f"weights is {type(bad).__name__}, expected a name or a function"):
            initializers.get(bad)
