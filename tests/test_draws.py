"""Normal draws against the bits of jax's own generator, transformed in float64, and against the normal law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vgrad.draws import standard_normal

KEY = jax.random.key(11)
NUM = 2**20


@pytest.fixture(scope="module")
def drawn():
    return np.asarray(standard_normal(KEY, (NUM,)), np.float64)


def test_each_number_is_what_box_and_muller_make_of_the_bits_of_jax(drawn):
    with jax.enable_x64(True):
        words = np.asarray(jax.random.bits(KEY, (NUM // 2,), jnp.uint64))
    a, b = words >> np.uint64(32), words & np.uint64(2**32 - 1)
    r = np.sqrt(-2 * np.log(((a >> np.uint64(1)) + 0.5) / 2**31))
    # Within an eighth of a turn of an axis by 30 bits; by the upper two which axis, and its end.
    angle = np.pi / 4 * ((b & np.uint64(2**30 - 1)) / 2.0**29)
    angle = np.where(angle < np.pi / 4, angle, angle - np.pi / 2)
    angle = np.where(b >> np.uint64(30) & np.uint64(1), angle, np.pi / 2 - angle) + np.pi * (b >> np.uint64(31))
    # u is rounded to 24 bits, which a short radius feels: d(r^2) = -2 du / u.
    error = abs(drawn.reshape(2, -1) - [r * np.cos(angle), r * np.sin(angle)])
    assert np.all(error < 4e-7 * (1 + r) + 2.0**-24 / r)


def test_the_law_is_normal(drawn):
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    for edge in (3.0, 4.0, 4.5):
        expected = NUM * stats.norm.sf(edge)
        for side in (drawn, -drawn):
            assert abs(np.sum(side > edge) - expected) < 4 * np.sqrt(expected)
    # What comes of one hash is independent, in sign and in size.
    p, q = drawn.reshape(2, -1)
    for f in (np.sign, np.abs, np.square, lambda x: x):
        for g in (np.sign, np.abs, np.square, lambda x: x):
            assert abs(np.corrcoef(f(p), g(q))[0, 1]) < 4 / np.sqrt(p.size)


def test_any_shape_and_any_way_to_call_it():
    for shape in ((), (1,), (0, 3), (3, 5), (2, 3, 4)):
        assert standard_normal(KEY, shape).shape == shape
    keys = jax.random.split(KEY, 3)
    each = np.stack([standard_normal(k, (3, 5)) for k in keys])
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda k: standard_normal(k, (3, 5))))(keys), each, rtol=1e-5, atol=1e-6)
    assert np.unique(each).size == each.size
    np.testing.assert_array_equal(standard_normal(jax.random.PRNGKey(11), (3, 5)), standard_normal(KEY, (3, 5)))


def test_another_dtype_and_another_generator_are_those_of_jax(x64):
    for key, dtype in ((KEY, jnp.bfloat16), (KEY, jnp.float64), (KEY, None), (jax.random.key(0, impl="rbg"), jnp.float32)):
        np.testing.assert_array_equal(standard_normal(key, (4, 2), dtype), jax.random.normal(key, (4, 2), dtype or jnp.float64))
