"""Every fact in the registry against mpmath, dense grids in float64 and the printed formula."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mpmath import mp

from vgrad import activations
from vgrad.activations import REGISTRY

NAMES = list(REGISTRY)
SELU = mpmath.mpf("1.0507009873554804934193349852946"), mpmath.mpf("1.6732632423543772848170429916717")
REFERENCE = {
    "identity": lambda z: z,
    "sigmoid": lambda z: 1 / (1 + mp.exp(-z)),
    "tanh": lambda z: (1 - mp.exp(-2 * z)) / (1 + mp.exp(-2 * z)),
    "relu": lambda z: z if z > 0 else 0 * z,
    "leaky_relu": lambda z: z if z > 0 else z / 100,
    "erf": lambda z: 1 - mp.erfc(z),
    "sin": mp.sin,
    "hard_tanh": lambda z: z if abs(z) < 1 else mp.sign(z),
    "elu": lambda z: z if z > 0 else mp.exp(z) - 1,
    "selu": lambda z: SELU[0] * (z if z > 0 else SELU[1] * (mp.exp(z) - 1)),
    "softplus": lambda z: mp.log(1 + mp.exp(z)),
    "gelu": lambda z: z * mp.ncdf(z),
    "gelu_tanh": lambda z: z / (1 + mp.exp(-2 * mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3))),
    "silu": lambda z: z / (1 + mp.exp(-z)),
}
CENTRE = np.array([-4.0, -2.5, -1.25, -0.75, -0.1, -1e-3, 1e-3, 0.1, 0.5, 0.875, 1.5, 3.0, 4.5])
TAILS = np.array([-80.0, -40.0, -25.0, -18.0, -9.5, -6.0, 6.0, 9.5, 18.0, 25.0, 40.0, 80.0])


def reference(name, z, order):
    """phi or a derivative of it at the entries of z, rounded to float64."""
    f = REFERENCE[name]

    def at(v):
        with mpmath.workdps(350 if name == "erf" and 10 < abs(v) < 30 else 130):  # 1 - erf(25) is 1e-273, 1 - erf(40) is 1e-697
            return float(mp.diff(f, mp.mpf(v), order, h=mp.mpf(10) ** -25) if order else f(mp.mpf(v)))

    return np.array([at(float(v)) for v in z])


STEP = 1e-3
GRID = (np.arange(-60_000, 60_000) + 0.5) * STEP  # no kink falls on it
FAR = np.concatenate([[-1e-9, 1e-9], *(s * np.logspace(2, 10, 9) for s in (-1, 1))])
SHORT = np.concatenate([CENTRE, TAILS, [0.0, -0.0], [-(2.0**42), 2.0**42]])


@functools.cache
def orders(name, double):
    """phi, phi' and phi'' at SHORT, and in float64 at SHORT, FAR and GRID. One program for all tests."""
    phi = REGISTRY[name].phi
    with jax.enable_x64(double):
        z = np.concatenate([SHORT, FAR, GRID]) if double else SHORT.astype(np.float32)
        found = jax.jit(lambda z: [jax.vmap(f)(z) for f in (phi, jax.grad(phi), jax.grad(jax.grad(phi)))])(z)
    assert all(a.dtype == z.dtype for a in found)
    return [np.asarray(a) for a in found]


@pytest.mark.parametrize("name", NAMES)
def test_value_and_derivatives_against_mpmath(name):
    expected = [[reference(name, z, n) for n in range(3)] for z in (CENTRE, TAILS)]
    for double, rtol, atol in ((False, 3e-5, 2e-6), (True, 1e-12, 1e-14)):
        ours = orders(name, double)
        for order in range(3):
            # z is rounded to float32 with a relative error of eps: near the centre that is an absolute one.
            np.testing.assert_allclose(ours[order][: CENTRE.size], expected[0][order], rtol, atol)
        # In the tails a small derivative is a reading. A float32 exponential of z^2 has a relative error of z^2 eps.
        floor = atol if name == "sin" else float(np.finfo(ours[0].dtype).tiny)
        for order in range(2):
            far = ours[order][CENTRE.size : CENTRE.size + TAILS.size]
            np.testing.assert_allclose(far, expected[1][order], 20 * rtol, floor)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_finite_at_zero(name):
    y, slope, _ = (a[CENTRE.size + TAILS.size :][:2] for a in orders(name, False))
    low, high = REGISTRY[name].slope_range
    assert np.isfinite(y).all()
    assert np.all((low <= slope) & (slope <= high * (1 + 1e-6)))


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_finite_at_any_argument(name):
    """As far out as float32 reaches, where a cube or an exponential on the way has long overflowed."""
    z, act = np.float32([-3e38, -1e30, -1e14, 1e14, 1e30, 3e38]), REGISTRY[name]
    y, slope = jax.jit(jax.vmap(jax.value_and_grad(act.phi)))(z)
    assert np.isfinite(y).all()
    if name == "sin":
        assert np.all(abs(slope) <= 1)
    else:
        np.testing.assert_allclose(slope, np.repeat(act.slopes, 3), rtol=1e-6)


def test_the_derivatives_are_positive_far_out_in_the_tails():
    """Why tanh, sigmoid and elu are not those of jax: with jax 0.10's a saturated float32 network reads exactly zero."""
    for name, z in (("tanh", 40.0), ("sigmoid", 40.0), ("elu", -40.0)):
        assert orders(name, False)[1][z == SHORT] > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_ranges_hold_and_are_tight(name):
    a = REGISTRY[name]
    for (low, high), values in zip((a.range, a.slope_range), orders(name, True)[:2], strict=True):
        least, most = np.min(values), np.max(values)
        assert low - 1e-12 <= least  # to rounding
        assert most <= high + 1e-12
        # The points come within 1e-6 of an end: their spacing is 1e-3, and an extremum is flat.
        assert least < -1e7 if low == -math.inf else least - low < 1e-6
        assert most > 1e7 if high == math.inf else high - most < 1e-6


@pytest.mark.parametrize(("name", "lowest", "slopes"), [("gelu", -0.75, 1.4), ("gelu_tanh", -0.75, 1.4), ("silu", -1.3, 2.4)])
def test_the_humps_to_ten_digits(name, lowest, slopes):
    with mpmath.workdps(40):
        f, a = REFERENCE[name], REGISTRY[name]
        minimum = f(mp.findroot(lambda z: mp.diff(f, z), lowest))
        ends = [mp.diff(f, mp.findroot(lambda z: mp.diff(f, z, 2), s * slopes)) for s in (-1, 1)]
        assert abs(a.range[0] - minimum) < 1e-10
        assert abs(a.slope_range[0] - ends[0]) < 1e-10
        assert abs(a.slope_range[1] - ends[1]) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_slopes_at_large_z(name):
    z = SHORT[-2:]  # ±2^42, the headroom of float32
    for double, atol in ((False, 1e-6), (True, 1e-12)):
        y, slope, _ = (a[SHORT.size - 2 : SHORT.size] for a in orders(name, double))
        np.testing.assert_allclose(y / z, REGISTRY[name].slopes, atol=atol)
        if name != "sin":  # whose derivative has no limit
            np.testing.assert_allclose(slope, REGISTRY[name].slopes, atol=atol)


@pytest.mark.parametrize("name", NAMES)
def test_kinks_are_at_the_breakpoints_and_nowhere_else(name):
    jumps = np.max([np.abs(np.diff(v[-GRID.size :])) for v in orders(name, True)], axis=0)
    # In a smooth phi of the registry the second derivative has a slope below 5: nothing moves by more than 5e-3 in a step.
    np.testing.assert_allclose(GRID[:-1][jumps > 0.02] + STEP / 2, REGISTRY[name].breakpoints, atol=STEP)


@functools.cache
def at_nan():
    return jax.device_get(jax.jit(lambda z: {name: REGISTRY[name].phi(z) for name in NAMES})(np.float32([np.nan, 0.5])))


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_nan_out(name):
    y = at_nan()[name]
    assert np.isnan(y[0])
    assert np.isfinite(y[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_formula_is_the_function(name):
    code = REGISTRY[name].formula.replace("^", "**").replace("sqrt 2", "sqrt(2)")
    code = re.sub(r"([\d)]|\bz) (?=[z(])", r"\1 * ", code)
    names = {n: getattr(math, n) for n in ("exp", "tanh", "sin", "erf", "sqrt", "pi")} | {"ln": math.log, "max": max, "min": min}
    expected = [eval(code, names | {"z": float(z)}) for z in CENTRE]
    np.testing.assert_allclose(orders(name, False)[0][: CENTRE.size], expected, rtol=1e-4, atol=1e-6)


def test_softmax():
    z = np.array([[0.3, -1.0, 2.0], [1000.0, 1001.0, 0.0]], np.float32)
    y = jax.jit(activations.softmax)(z)
    e = np.exp(z.astype(np.float64) - z.max(1, keepdims=True))
    np.testing.assert_allclose(y, e / e.sum(1, keepdims=True), rtol=1e-5, atol=1e-7)


def test_the_table_says_what_the_registry_says():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in activations.table().splitlines()]
    cells = {row[0]: row[1:] for row in rows[2:]}
    assert all(len(row) == len(rows[0]) for row in rows)
    assert set(cells) == {f"`{name}`" for name in NAMES} | {"`softmax` (output)"}
    for name, a in REGISTRY.items():
        formula, *ranges, left, right = cells[f"`{name}`"]
        assert formula == a.formula
        for text, (low, high) in zip(ranges, (a.range, a.slope_range), strict=True):
            ends = [float(v) for v in text.strip("(){}").split(", ")]
            np.testing.assert_allclose(ends, [low, high] if low != high else [low], rtol=1e-4)
        np.testing.assert_allclose([float(left), float(right)], a.slopes, rtol=1e-4)


def test_the_softmax_row_of_the_table():
    row = activations.table().splitlines()[-1].split("|")
    (low, high), (low_slope, high_slope) = ([float(v) for v in re.findall(r"-?[\d.]+", cell)] for cell in row[3:5])
    rng = np.random.default_rng(0)
    z = np.float32(rng.normal(size=(4000, 3)) * 40 * rng.uniform(size=(4000, 1)))
    y, slopes = jax.device_get(jax.jit(lambda z: (activations.softmax(z), jax.vmap(jax.jacobian(activations.softmax))(z)))(z))
    assert low <= y.min() < low + 1e-3 < high - 1e-3 < y.max() <= high
    assert low_slope <= slopes.min() < low_slope + 1e-2 < high_slope - 1e-2 < slopes.max() <= high_slope


def test_get_returns_the_function():
    assert activations.get("tanh") is REGISTRY["tanh"].phi
    for phi in (jnp.tanh, lambda z: z * z, jax.jit(jnp.sin)):
        assert activations.get(phi) is phi


@pytest.mark.parametrize(
    ("typed", "meant"), [("tahn", "tanh"), ("sigmod", "sigmoid"), ("Relu", "relu"), ("TanH", "tanh"), ("leakyrelu", "leaky_relu")]
)
def test_an_unknown_name_gets_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=f"unknown activation '{typed}', did you mean '{meant}'"):
        activations.get(typed)


def test_an_unknown_name_near_none_gets_the_list():
    with pytest.raises(ValueError, match=r"unknown activation 'qqqq'. Known: identity, .*silu"):
        activations.get("qqqq")


def numpy_tanh(z):
    return np.tanh(z)


@pytest.mark.parametrize(
    ("phi", "error", "message"),
    [
        ("softmax", ValueError, "softmax is not elementwise"),
        (jax.nn.softmax, ValueError, "phi=softmax is not elementwise"),
        (lambda z: z - jnp.mean(z), ValueError, "not elementwise"),
        (lambda z: jnp.cumsum(z, axis=0), ValueError, "not elementwise"),
        (lambda z: z[..., ::-1], ValueError, "not elementwise"),
        (lambda z: z[:, :1], ValueError, r"maps float32\[2, 2\] to float32\[2, 1\]"),
        (jnp.sum, ValueError, r"to float32\[\], expected the same shape"),
        (lambda z: z.astype(jnp.float16), ValueError, r"to float16\[2, 2\]"),
        (lambda z: z > 0, ValueError, r"to bool\[2, 2\]"),
        (lambda z: 0.0, TypeError, "returned float, expected a jax array"),
        (lambda z: None, TypeError, "returned NoneType"),
        (lambda z: (z, z), TypeError, "returned tuple"),
        (numpy_tanh, TypeError, "phi=numpy_tanh returned ndarray, expected a jax array"),
        (3, TypeError, "phi is int, expected a name"),
        (None, TypeError, "phi is NoneType"),
    ],
)
def test_bad_phi_is_an_error(phi, error, message):
    with pytest.raises(error, match=message):
        activations.get(phi)


def test_bad_phi_is_found_inside_a_trace_too():
    def build(z):
        return activations.get(lambda z: z - jnp.mean(z))(z)

    with pytest.raises(ValueError, match="not elementwise"):
        jax.jit(build)(np.ones(3, np.float32))


def test_phi_may_have_a_traced_parameter():
    """A slope that is swept: phi is built inside a trace, so that there are no values to look at."""
    slopes = np.float32([0.1, 0.5])
    y = jax.jit(jax.vmap(lambda a: activations.get(lambda z: jnp.where(z > 0, z, a * z))(jnp.array([-2.0, 3.0]))))(slopes)
    np.testing.assert_allclose(y, [[-0.2, 3.0], [-1.0, 3.0]], rtol=1e-6)
    with pytest.raises(ValueError, match="expected the same shape"):
        jax.vmap(lambda a: activations.get(lambda z: a * z[:1])(np.ones(2, np.float32)))(slopes)
