"""Numbers m 2^k against `math.frexp`, `np.ldexp`, exact fractions and mpmath."""

import math
from fractions import Fraction
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgrad import scaled
from vgrad.scaled import LogNorm, Scaled

QUICK = settings(max_examples=40, deadline=None, database=None, derandomize=True)
add, canonical, norm, tidy, pow2, scale, log, log_ratio = map(
    jax.jit,
    (scaled.add, scaled.canonical, scaled.norm, scaled.tidy, scaled.pow2, scaled.scale, scaled.log, scaled.log_ratio),
)
exponent = jax.jit(scaled.exponent, static_argnums=1)
plus = jax.jit(lambda x, y: x + y)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


def make(m, k, dtype="float32"):
    parts: Any = np.asarray(m, dtype), np.int32(k)
    return Scaled(*parts)


def exact(x):
    """The entries of a `Scaled` as fractions."""
    return [Fraction(float(m)) * Fraction(2) ** int(x.k) for m in np.ravel(x.m)]


def ln(n):
    """ln of a `LogNorm` at 50 digits."""
    with mpmath.workdps(50):
        return mpmath.log(mpmath.mpf(float(n.sumsq))) / 2 + mpmath.log(2) * int(n.exponent)


def ln_norm(x):
    """ln of the Frobenius norm of a `Scaled` at 50 digits, from its entries."""
    with mpmath.workdps(50):
        return mpmath.log(mpmath.sqrt(sum(mpmath.mpf(float(m)) ** 2 for m in np.ravel(x.m)))) + int(x.k) * mpmath.log(2)


def every_binade(dtype):
    """One random number for each exponent of the float, with random signs. Shape [number of binades]."""
    f, rng = np.finfo(dtype), np.random.default_rng(0)
    e = np.arange(f.minexp, f.maxexp)
    return np.ldexp(rng.choice([-1, 1], e.size) * rng.uniform(1, 2, e.size).astype(dtype), e).astype(dtype)


def test_pow2_is_ldexp_to_the_last_bit(dtype):
    x, f = every_binade(dtype), np.finfo(dtype)
    span = f.maxexp - f.minexp
    rng = np.random.default_rng(1)
    steps = [*rng.integers(-span, span, 30), 0, 1, -1, f.maxexp, f.minexp, span - 1, 1 - span, span, -span, 10_000, -10_000]
    for e in steps:
        with np.errstate(over="ignore", under="ignore"):
            expected = np.ldexp(x, e)
        if e < -2 * scaled.reach(dtype):
            expected = 0 * x
        normal = np.abs(expected) >= f.tiny
        ours = np.asarray(pow2(x, np.int32(e)))
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours[normal], expected[normal], err_msg=f"e = {e}")
        assert np.all(np.abs(ours[~normal]) <= f.tiny)  # some backends flush subnormal numbers to zero


def test_pow2_broadcasts_and_keeps_zero_nan_and_inf():
    x = np.array([[0.0, -0.0, np.inf, -np.inf, np.nan]], np.float32)
    for e in (-252, -3, 0, 3, 100):
        np.testing.assert_array_equal(pow2(x, np.int32(e)), x)
    lanes = pow2(np.ones((2, 3), np.float32), np.array([[-1], [4]], np.int32))
    np.testing.assert_array_equal(lanes, [[0.5] * 3, [16.0] * 3])


def test_scale_is_ldexp_to_the_last_bit(dtype):
    x, reach = every_binade(dtype), np.finfo(dtype).maxexp - 2
    for e in (-reach, 1 - reach, -17, -1, 0, 1, 29, reach):
        with np.errstate(over="ignore", under="ignore"):
            expected = np.ldexp(x, e)
        normal = np.abs(expected) >= np.finfo(dtype).tiny
        np.testing.assert_array_equal(np.asarray(scale(x, np.int32(e)))[normal], expected[normal], err_msg=f"e = {e}")


def test_exponent_is_that_of_frexp(dtype):
    x = every_binade(dtype)
    e = np.asarray(jax.jit(jax.vmap(scaled.exponent))(x))
    assert e.dtype == np.int32
    # The top two binades may be said to be one lower, because no float undoes them.
    expected = np.array([math.frexp(v)[1] for v in x])
    reach = np.finfo(dtype).maxexp - 2
    np.testing.assert_array_equal(np.minimum(e, reach), np.minimum(expected, reach))
    assert np.all(e <= expected)
    assert int(exponent(x[:-2])) == expected[-3]


def test_exponent_of_what_has_none(dtype):
    subnormal = np.finfo(dtype).smallest_subnormal * 3
    for v in (0.0, -0.0, subnormal, -subnormal, np.inf, -np.inf, np.nan):
        assert int(exponent(np.array([v], dtype))) == 0
    assert int(exponent(np.array([np.nan, 1e30], dtype))) == 0
    assert int(exponent(np.zeros((0,), dtype))) == 0


def test_exponent_along_an_axis():
    x = np.float32([[1.0, 3.0], [0.0, 0.0], [1e-30, -0.25]])
    np.testing.assert_array_equal(exponent(x, 1), [2, 0, -1])
    np.testing.assert_array_equal(exponent(x, 0), [1, 2])


def test_change_if_changes_those_who_need_it_and_is_entered_by_none_else():
    entered = []

    def change(x):
        jax.debug.callback(lambda: entered.append(1))
        return {"x": -x["x"], "n": x["n"] + 1}

    @jax.jit
    @jax.vmap
    def run(x):
        return scaled.change_if(x < 0, change, {"x": x, "n": jnp.zeros((), jnp.int32)})

    chex.assert_trees_all_equal(run(np.float32([1, -2, np.nan])), {"x": np.float32([1, 2, np.nan]), "n": np.int32([0, 1, 0])})
    jax.effects_barrier()
    assert entered
    entered.clear()
    chex.assert_trees_all_equal(run(np.float32([1, 2, 0])), {"x": np.float32([1, 2, 0]), "n": np.int32([0, 0, 0])})
    jax.effects_barrier()
    assert not entered


def test_headroom_leaves_room_for_a_cube():
    for dtype in (np.float32, np.float64):
        cube = np.ldexp(dtype(1), scaled.headroom(dtype)) ** 3
        assert np.isfinite(cube)
        assert np.log2(cube) > np.finfo(dtype).maxexp - 4  # and no more room than that


@pytest.mark.parametrize("k", [-3000, -150, 0, 150, 3000])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_norm_and_its_logarithm_against_mpmath(dtype, k, size):
    x = make(np.random.default_rng(2).normal(size=(5, 7)) * size, k, dtype)
    n = norm(x)
    expected = ln_norm(x)
    eps = float(np.finfo(dtype).eps)
    assert abs(ln(n) - expected) < 20 * eps  # the pair, at any magnitude, is accurate to rounding
    assert abs(float(log(n)) - expected) < 4 * eps * (abs(expected) + 10)  # one logarithm has its own rounding
    assert n.exponent.dtype == dtype


def test_norm_in_every_binade(dtype):
    x, f = every_binade(dtype), np.finfo(dtype)
    n = jax.jit(jax.vmap(lambda v: scaled.tidy(scaled.norm(Scaled(v, jnp.zeros((), jnp.int32))))))(x[:, None])
    squares = [Fraction(float(s)) * Fraction(4) ** int(e) for s, e in zip(*map(np.asarray, n), strict=True)]
    ratios = [square / Fraction(float(v)) ** 2 for square, v in zip(squares, x, strict=True)]
    assert max(abs(r - 1) for r in ratios) < 20 * float(f.eps)


def test_norm_of_zero_and_of_nan():
    zero, nan = (norm(make([v, 0.0], 700)) for v in (0.0, np.nan))
    assert float(zero.sumsq) == 0
    assert float(log(zero)) == -np.inf
    assert np.isnan(float(log(nan)))
    one = norm(make([1.0], 0))
    assert float(log_ratio(zero, one)) == -np.inf
    assert np.isnan(float(log_ratio(zero, zero)))
    assert np.isnan(float(log_ratio(nan, one)))


@pytest.mark.parametrize("k", [-3000, 0, 3000])
def test_the_ratio_of_extreme_norms_is_accurate_to_rounding(dtype, k):
    rng = np.random.default_rng(3)
    a, b = (make(rng.normal(size=9) * s, k, dtype) for s in (1.0, 1.01))
    expected = ln_norm(a) - ln_norm(b)
    eps = float(np.finfo(dtype).eps)
    assert abs(float(log_ratio(norm(a), norm(b))) - expected) < 20 * eps
    if k and dtype == np.float32:  # what the docstring of LogNorm says of the naive way
        two_logs = np.float32(float(ln_norm(a))) - np.float32(float(ln_norm(b)))
        assert abs(float(two_logs) - expected) > 20 * eps


def test_log_and_log_ratio_of_numpy_arrays_keep_float64():
    n = LogNorm(np.array([1.7, 0.0, 3.1]), np.array([3000.0, 5.0, -3000.0]))
    logs = scaled.log(n)
    assert isinstance(logs, np.ndarray)
    assert logs[1] == -np.inf
    ratio = scaled.log_ratio(n, LogNorm(n.sumsq[::-1], n.exponent[::-1]))
    for i in (0, 2):
        expected = ln(LogNorm(n.sumsq[i], n.exponent[i]))
        assert abs(logs[i] - expected) < 1e-15 * abs(expected)
        assert abs(ratio[i] - 2 * expected + mpmath.log(1.7 * 3.1) / 2) < 1e-15 * abs(ratio[i])
    assert np.isnan(ratio[1])


def test_log_takes_an_integer_exponent():
    n = LogNorm(np.float32(9.0), np.int32(-7))
    expected = math.log(3 * 2**-7)
    assert abs(float(log(n)) - expected) < 1e-6
    assert abs(float(log_ratio(n, LogNorm(np.float32(1.0), np.int32(0)))) - expected) < 1e-6


def test_tidy_keeps_the_value_and_brings_the_sum_to_order_one(dtype):
    x = np.abs(every_binade(dtype))
    n = jax.device_get(tidy(LogNorm(x, np.int32(5))))  # an integer exponent becomes a float
    assert n.exponent.dtype == dtype
    for v, s, e in zip(x, *n, strict=True):
        assert Fraction(float(s)) * Fraction(4) ** int(e) == Fraction(float(v)) * 4**5
    low, high = np.min(n.sumsq), np.max(n.sumsq)
    assert 0.5 <= low <= high < 4
    assert float(tidy(LogNorm(np.zeros((), dtype), np.zeros((), dtype))).sumsq) == 0


whole = st.integers(-1000, 1000)
# Sums of such numbers need 10 + 10 + 2 bits: float32 holds them exactly, whatever the order.
entry = st.tuples(whole, st.integers(0, 10))


@QUICK
@given(st.tuples(entry, entry, entry), st.sampled_from([-3000, -200, -60, 0, 31, 60, 3000]))
def test_a_sum_within_the_precision_is_exact_and_associative(entries, k):
    x, y, z = (make([m, 1], k + e) for m, e in entries)
    sums = [add(add(x, y), z), add(x, add(y, z)), add(add(z, x), y)]
    expected = [sum(e) for e in zip(exact(x), exact(y), exact(z), strict=True)]
    assert all(exact(s) == expected for s in sums)
    assert exact(plus(x, y)) == exact(plus(y, x))


@QUICK
@given(st.lists(st.tuples(st.floats(-1, 1, width=32), st.integers(-20, 20)), min_size=3, max_size=3), st.integers(-4000, 4000))
def test_canonical_changes_the_units_and_not_the_value(entries, k):
    # Entries within 2^60 of each other, so that none of them underflows in the units of the largest.
    m = [math.ldexp(v if abs(v) > 2**-20 else 0.0, e) for v, e in entries]
    x = make(m, k)
    y = canonical(x)
    assert exact(y) == exact(x)
    top = math.frexp(max(abs(v) for v in m))[1] + k
    if not any(m) or abs(top) <= 42:
        assert int(y.k) == 0
    else:
        assert int(y.k) == top
        assert 0.5 <= np.max(np.abs(y.m)) < 1
    again = canonical(y)
    assert int(again.k) == int(y.k)
    np.testing.assert_array_equal(again.m, y.m)


def test_the_headroom_is_its_own_boundary(dtype):
    h = scaled.headroom(dtype)
    for top, kept in ((h, True), (h + 1, False), (-h, True), (-h - 1, False)):
        y = canonical(make([0.5, -0.3], top, dtype))
        assert (int(y.k) == 0) == kept, top


@pytest.mark.parametrize("far", [500, 6000])
def test_a_sum_of_unequal_magnitudes_rounds_to_the_larger(dtype, far):
    for big, small in ((far // 2, -far // 2), (0, -far), (far, 0)):
        x, y = make([0.75, 0.0], big, dtype), make([1.0, 2.0 ** (np.finfo(dtype).maxexp - 1)], small - 1100, dtype)
        for s in (add(x, y), add(y, x)):
            assert exact(s)[0] == exact(x)[0]
            assert exact(s)[1] in (0, exact(y)[1])  # lost below the units perhaps, but never another number


def test_zero_never_sets_the_units():
    zero, tiny = make([0.0, 0.0], 3000), make([0.5, 0.25], -3000)
    for s in (add(zero, tiny), add(tiny, zero)):
        assert exact(s) == exact(tiny)
    assert exact(add(zero, zero)) == [0, 0]
    assert int(add(zero, zero).k) == 0


def test_shapes_of_a_sum_broadcast():
    s = add(make(np.ones((3, 2)), 200), make([[1.0, 3.0]], 201))
    assert exact(s) == [Fraction(2) ** 200 * v for v in (3, 7)] * 3


@pytest.mark.parametrize("factor", [0.1, 3e38, 1e-30, np.float32(-0.3), np.float32([2.0, 0.0, 1e-9])])
@pytest.mark.parametrize("k", [0, -7, 3000])
def test_a_multiple_is_that_of_the_value_from_either_side(factor, k):
    x = canonical(make([1.5, -3e4, 7e-3], k))
    for ours in (scaled.times(x, factor), factor * x, x * factor, jnp.asarray(factor) * x):
        assert all(
            abs(a - Fraction(float(f)) * b) <= Fraction(1, 2**21) * abs(Fraction(float(f)) * b)
            for a, b, f in zip(exact(ours), exact(x), np.broadcast_to(np.float32(factor), 3), strict=True)
        )
        assert exact(canonical(ours)) == exact(ours)
        assert int(canonical(ours).k) == int(ours.k)


def test_a_multiple_by_inf_is_nan_and_its_cotangent_is_that_of_the_value():
    assert np.isnan(scaled.times(make([1.0, 2.0], 5), np.float32([np.inf, np.nan])).m).all()
    m = np.float32([1.0, 2.0])
    value = lambda m: jnp.sum(scaled.times(scaled.lift(m), 1e20).m)  # noqa: E731
    np.testing.assert_allclose(jax.grad(value)(m), [1e20, 1e20], rtol=1e-6)


def test_nan_stays_nan_and_in_its_own_entry():
    s = jax.device_get(add(make([np.nan, 1.0], 0), make([1.0, 1.0], 0)))
    assert np.isnan(s.m[0])
    assert exact(make(s.m[1:], s.k)) == [2]
    assert np.isnan(np.asarray(canonical(make([np.nan, 1.0], 700)).m)[0])


def test_lift_makes_nan_of_inf_and_keeps_the_rest(dtype):
    x = np.array([np.inf, -np.inf, np.nan, 1.5, -1e30, 0.0], dtype)
    y = jax.device_get(jax.jit(scaled.lift)(x))
    assert np.isnan(y.m[:3]).all()
    assert exact(make(y.m[3:], y.k, dtype)) == [Fraction(float(v)) for v in x[3:]]
    assert y.k.dtype == np.int32


@jax.jit
def cotangents(x, y, c):
    def run(mx, my):
        z = scaled.add(scaled.canonical(Scaled(mx, x.k)), Scaled(my, y.k))
        return scaled.shift(z.m, jnp.int32(17)), z.k

    _, vjp, _ = jax.vjp(run, x.m, y.m, has_aux=True)
    return vjp(c)


@pytest.mark.parametrize("k", [-3000, -100, 0, 100, 3000])
def test_the_cotangent_is_that_of_the_value(k):
    """add and canonical are the identity in x and y to autodiff, whatever units they choose; entries of a row [1, N] add up."""
    rng = np.random.default_rng(4)
    x, y = make(rng.normal(size=(3, 4)), k), make(rng.normal(size=(1, 4)), k - 60)
    c = rng.normal(size=(3, 4)).astype(np.float32)

    cx, cy = cotangents(x, y, c)
    np.testing.assert_array_equal(cx, c)
    np.testing.assert_allclose(cy, c.sum(0, keepdims=True), rtol=1e-5)


@jax.jit
@partial(jax.grad, argnums=(0, 1))
def by_scaled(x, y, w):
    s = scaled.lift(x) + scaled.lift(y)
    return jnp.sum(w * scaled.shift(s.m, s.k) * x)


@pytest.mark.parametrize("size", [1.0, 1e14, 1e-14])
def test_grad_through_scaled_numbers_equals_grad_of_the_value(size):
    """J = sum(w (x + y) x) with x + y by scaled numbers; at 1e±14 these have other units than 1."""
    rng = np.random.default_rng(5)
    x, y, w = (rng.normal(size=(3, 4)).astype(np.float32) for _ in range(3))
    x, y = np.float32(size) * x, np.float32(size) * y

    by_hand = w * (2 * x + y), w * x
    for a, b in zip(by_scaled(x, y, w), by_hand, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * size)  # same maths, two routes


def test_vmap_equals_loop_and_jit_equals_no_jit():
    m = np.random.default_rng(6).normal(size=(2, 3, 4)).astype(np.float32)
    k = np.array([-70, 2000], np.int32)
    both = lambda x, y: (scaled.add(x, y), scaled.norm(x))  # noqa: E731
    lanes = jax.device_get(jax.jit(jax.vmap(both))(make(m, k), make(m[::-1], k + 3)))
    for i in range(2):
        alone = both(make(m[i], k[i]), make(m[1 - i], k[i] + 3))
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a, i=i: a[i], lanes), alone)
