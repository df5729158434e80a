"""Blocks on scaled numbers against the same formulas on plain arrays, zero taps and mpmath."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mpmath import mp

from vgrad import layers
from vgrad.activations import REGISTRY
from vgrad.base import Affine, Block
from vgrad.lanes import linearise
from vgrad.layers import Probed
from vgrad.scaled import Scaled, lift

BATCH = 4
RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
FIELDS = ("delta", "grad_w", "grad_b", "delta_in", "h")


def normal(*shape) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def scrambled(h):
    """A function of whole rows, which only `plain` can carry."""
    return jnp.sin(h) * jnp.cumsum(h, axis=-1)


def with_plain(fan_in, fan_out, *, phi, **options):
    init, apply = layers.linear(fan_in, fan_out, **options)
    return Block(init, lambda p, z: apply(p, layers.plain(scrambled)(layers.activate(phi, z))))


def standardise(h):
    centred = h - h.mean(1, keepdims=True)
    return centred / jnp.sqrt((centred * centred).mean(1, keepdims=True) + 1e-5)


# name: (constructor, h as a function of z, what is added to h W + b), the second and third written out by hand.
BLOCKS = {
    "linear": (lambda n, m, phi, **o: layers.linear(n, m, **o), lambda z: z, lambda z: 0),
    "dense": (layers.dense, jnp.tanh, lambda z: 0),
    "residual": (layers.residual, jnp.tanh, lambda z: z),
    "layernorm_dense": (layers.layernorm_dense, lambda z: jnp.tanh(standardise(z)), lambda z: 0),
    "plain": (with_plain, lambda z: scrambled(jnp.tanh(z)), lambda z: 0),
}
WIDTHS = {"gram": 6, "direct": 3}  # the Gram route where the batch is smaller than the fan-in


def case(name, width):
    make, *by_hand = BLOCKS[name]
    return make(width, width, phi=jnp.tanh), drawn(width), *by_hand


def drawn(width):
    return Affine(np.float32(1.3 / width**0.5) * normal(width, width), np.float32(0.4) * normal(width))


def parts(x: Any):
    return x.m, x.k


def linearised(block, params, z: Scaled):
    """The block's output, and its vjp with respect to z and the probe."""

    def run(m, probe):
        return parts(block.apply(layers.with_probe(params, probe), Scaled(m, z.k)))

    m, vjp, k = jax.vjp(run, z.m, jnp.zeros((5, 2), z.m.dtype), has_aux=True)
    return Scaled(m, k), vjp


def ln(norms):
    """ln of the five norms [..., 5, 2], in float64."""
    norms = np.asarray(norms, np.float64)
    with np.errstate(divide="ignore"):
        return 0.5 * np.log(norms[..., 0]) + math.log(2) * norms[..., 1]


def ln_norm(a):
    with np.errstate(divide="ignore"):
        return np.log(np.linalg.norm(np.asarray(a, np.float64)))


@pytest.mark.parametrize(("name", "width"), [*((name, 6) for name in BLOCKS), ("layernorm_dense", 3)])
def test_the_probe_reads_what_zero_taps_read(name, width):
    """J = sum(c z'), z' = h W + b + skip, with arrays of zeros added to h and to z'. Their gradients are W^T delta and delta."""
    block, params, hidden, skip = case(name, width)
    z, c = normal(BATCH, width), normal(BATCH, width)

    @jax.jit
    def by_taps(params, z, c):
        def J(z, p, tap_h, tap_z):
            return jnp.sum(c * (jnp.dot(hidden(z) + tap_h, p.w, precision="highest") + p.b[None] + tap_z + skip(z)))

        grads = jax.grad(J, (0, 1, 2, 3))(z, params, jnp.zeros_like(z), jnp.zeros_like(c))
        return grads, hidden(z), jnp.dot(hidden(z), params.w, precision="highest") + params.b[None] + skip(z)

    @jax.jit
    def by_probe(params, z, c):
        out, vjp = linearised(block, params, lift(z))
        return out, vjp(c), block.apply(params, z)

    (grad_z, grad_p, delta_in, delta), h, expected = by_taps(params, z, c)
    out, (c_in, norms), plain = by_probe(params, z, c)
    assert int(out.k) == 0
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.m, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(c_in, grad_z, rtol=1e-5, atol=1e-5)
    for field, ours, theirs in zip(FIELDS, ln(norms), (delta, grad_p.w, grad_p.b, delta_in, h), strict=True):
        assert abs(ours - ln_norm(theirs)) < 1e-5, field  # same maths, two routes


@pytest.mark.parametrize("batch", [4, 7])  # by Gram matrices and by dJ/dW
def test_of_data_no_cotangent_is_computed(batch):
    """Data may be far wider than the network: W_1^T delta_1 would be the dearest product of all, and is nobody's gradient."""
    wide, (_, apply) = 23, layers.linear(23, 6)
    params, x, c = Affine(normal(wide, 6), normal(6)), normal(batch, wide), normal(batch, 6)

    def back(data):
        return lambda p, x, c: linearise(Block(None, apply), p, lift(x), data=data)[1](c)

    def products(data):
        eqns = jax.make_jaxpr(back(data))(params, x, c).jaxpr.eqns
        return [e.outvars[0].aval.shape for e in eqns if e.primitive.name == "dot_general"]

    assert (batch, wide) in products(data=False)
    assert (batch, wide) not in products(data=True)
    (whole, c_in), (norms,) = (jax.jit(back(data))(params, x, c) for data in (False, True))
    assert c_in.shape == x.shape
    np.testing.assert_allclose(np.delete(norms, 3, axis=0), np.delete(whole, 3, axis=0), rtol=1e-5)
    assert float(norms[3, 0]) == 0


@pytest.mark.parametrize("name", ["residual", "plain"])
def test_lanes_and_seeds_by_vmap_equal_a_loop(name):
    block, first, *_ = case(name, 6)
    seeds = [first, drawn(6)]
    params = jax.tree.map(lambda *a: np.stack(a), *seeds)
    z, c = normal(2, BATCH, 6), normal(2, 3, BATCH, 6)  # [S, B, N] and [S, D, B, N]

    def of_seed(p, z):
        return linearised(block, p, lift(z))[1]

    alone = jax.jit(lambda p, z, c: of_seed(p, z)(c))
    loop = [[alone(seeds[s], z[s], c[s, d]) for d in range(3)] for s in range(2)]
    both = jax.jit(jax.vmap(lambda p, z, c: jax.vmap(of_seed(p, z))(c)))(params, z, c)
    of_one_seed = jax.jit(lambda p, z, c: jax.vmap(of_seed(p, z))(c))(first, z[0], c[0])  # lanes alone, which take a branch
    loop, both, of_one_seed = jax.device_get((loop, both, of_one_seed))
    for s in range(2):
        for d in range(3):
            c_in, norms = loop[s][d]
            np.testing.assert_allclose(both[0][s, d], c_in, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(ln(both[1][s, d]), ln(norms), atol=1e-5)
            if s == 0:
                np.testing.assert_allclose(of_one_seed[0][d], c_in, rtol=1e-5, atol=1e-5)
                np.testing.assert_allclose(ln(of_one_seed[1][d]), ln(norms), atol=1e-5)


@jax.jit
def linear_probe(m, k, w, c):
    """ln of what the probe on the linear layer m 2^k @ w reads under the cotangent c."""
    block = layers.linear(*w.shape)
    return linearised(block, Affine(w, jnp.zeros(w.shape[1])), Scaled(m, k))[1](c)[1]


def tapped(m, w, c):
    """The same arrays in float64, of which the norms are taken: delta, dW, db, W^T delta, h."""
    m, w, c = (np.asarray(a, np.float64) for a in (m, w, c))
    return np.array([ln_norm(a) for a in (c, m.T @ c, c.sum(0), c @ w.T, m)])


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_the_probe_at_any_magnitude_of_h_and_of_the_weights(width):
    """A linear layer is homogeneous: h 2^k changes ||dW|| and ||h|| by k ln 2 and nothing else; so W 2^j with ||W^T delta||."""
    m, c, w = normal(BATCH, width), normal(BATCH, width), normal(width, width)
    for k, j in ((0, 0), (3000, 0), (-3000, 0), (200, 60), (0, -60), (0, 100), (0, -100)):
        expected = tapped(m, w, c) + math.log(2) * np.array([0, k, 0, j, k])
        np.testing.assert_allclose(ln(linear_probe(m, np.int32(k), np.ldexp(w, j), c)), expected, atol=1e-5)


@pytest.mark.parametrize("e", [0, -40, -80, -95, -115])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_the_probe_reads_small_cotangents(width, e):
    """A saturated tanh has phi'(40) = 2^-113, which is a normal float32 and so must be a reading, though its square is none."""
    m, c, w = normal(BATCH, width), normal(BATCH, width), normal(width, width)
    c = np.ldexp(c, e)
    lost = 2.0 ** (-126 - e)  # what is below the smallest normal float32 may count as zero
    np.testing.assert_allclose(ln(linear_probe(m, np.int32(0), w, c)), tapped(m, w, c), atol=1e-5 + lost)


def test_a_zero_cotangent_reads_zero():
    for width in WIDTHS.values():
        norms = linear_probe(normal(BATCH, width), np.int32(0), normal(width, width), np.zeros((BATCH, width), np.float32))
        np.testing.assert_array_equal(ln(norms)[:4], -np.inf)


def test_a_gram_sum_lost_in_rounding_is_nan_and_the_direct_one_a_reading():
    """dW = sum_b h_b delta_b of samples that agree, with cotangents that cancel: what remains of the Gram sum is rounding noise."""
    for width, lost in ((6, True), (3, False)):
        h = np.ones((BATCH, 1), np.float32) * normal(1, width)
        h[0] *= np.float32(1 + 2**-16)
        c = np.array([[1.0], [-1.0], [2.0], [-2.0]], np.float32) * normal(1, width)
        w = normal(width, width)
        norms = ln(linear_probe(h, np.int32(0), w, c))
        if lost:
            assert np.isnan(norms[1])
        else:
            assert abs(norms[1] - tapped(h, w, c)[1]) < 1e-2
        assert np.isfinite(norms[[0, 3, 4]]).all()


@pytest.mark.parametrize("sums_to_zero", [False, True])
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-4, 1e-6, 0.0])
def test_what_like_samples_leave_of_a_gradient_is_right_or_nan(apart, sums_to_zero):
    """dW = H^T D with rows of H that differ by little from their mean, and rows of D that may sum to nothing."""
    h = normal(1, 6) + np.float32(apart) * normal(BATCH, 6)
    c = normal(BATCH, 6)
    if sums_to_zero:
        c[2:] = -c[:2]
    ours = ln(linear_probe(h, np.int32(0), normal(6, 6), c))[1]
    exact = ln_norm(np.float64(h).T @ np.float64(c))
    if sums_to_zero and apart < 1e-5:
        assert np.isnan(ours)
    else:
        assert abs(ours - exact) < (0.02 if sums_to_zero and apart < 1e-3 else 1e-5)


def test_affine_at_any_magnitude():
    m, w, b = normal(BATCH, 6), normal(6, 5), normal(5)
    run = jax.jit(lambda k: layers.affine(Probed(w, b, jnp.zeros((5, 2))), Scaled(m, k)))
    for k in (-300, -43, 0, 20, 43, 300):
        z = run(np.int32(k))
        ours = np.ldexp(np.asarray(z.m, np.float64), int(z.k))
        expected = np.ldexp(m.astype(np.float64) @ w, k) + b
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6 * np.max(np.abs(expected)))


def asymptote(name):
    """phi for mpmath, written so that its arguments may be enormous."""
    return {
        "identity": lambda z: z,
        "sigmoid": lambda z: 1 / (1 + mp.exp(-z)),
        "tanh": mp.tanh,
        "relu": lambda z: max(z, mp.mpf(0)),
        "leaky_relu": lambda z: max(z, z / 100),
        "erf": mp.erf,
        "hard_tanh": lambda z: min(max(z, mp.mpf(-1)), mp.mpf(1)),
        "elu": lambda z: z if z > 0 else mp.expm1(z),
        "selu": lambda z: mp.mpf("1.0507009873554805") * (z if z > 0 else mp.mpf("1.6732632423543772") * mp.expm1(z)),
        "softplus": lambda z: mp.log(1 + mp.exp(z)) if z < 1000 else z,
        "gelu": lambda z: z * mp.ncdf(z),
        "gelu_tanh": lambda z: z / (1 + mp.exp(-2 * mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3))),
        "silu": lambda z: z / (1 + mp.exp(-z)),
        "sin": mp.sin,
    }[name]


ENTRIES = {
    "mixed": [0.75, -0.625, 0.5 + 2.0**-20, -0.999],
    "negative": [-0.75, -0.625, -(2.0**-3), -0.999],
    "spread": [0.75, -(2.0**-50), 2.0**-61, -(2.0**-9)],
    "zero": [0.75, 0.0, -0.0, -0.5],
}


@pytest.mark.parametrize("name", REGISTRY)
def test_activate_beyond_the_headroom_against_mpmath(name):
    phi = REGISTRY[name].phi

    @jax.jit
    def run(m, k):
        h, vjp, k = jax.vjp(lambda m: parts(layers.activate(phi, Scaled(m, k))), m, has_aux=True)
        return h, k, vjp(jnp.ones_like(m))[0]

    exact, tiny = asymptote(name), float(np.finfo(np.float32).tiny)
    for entries in ENTRIES.values():
        m = np.array(entries, np.float32)
        for k in (-3000, -200, -43, 0, 43, 60, 200):
            if name == "sin" and k > 0:
                continue  # bounded: nothing is lost, but the phase of so large a number means nothing
            h, h_k, slope = jax.device_get(run(m, np.int32(k)))
            with mpmath.workdps(1000 if k == -3000 else 100):
                z = [mp.mpf(float(v)) * mp.mpf(2) ** k for v in m]
                expected = [exact(v) for v in z]
                largest = max(abs(v) for v in expected)
                ours = [mp.mpf(float(v)) * mp.mpf(2) ** int(h_k) for v in h]
                for a, b in zip(ours, expected, strict=True):
                    # To rounding of the entry, or far below the rounding of the largest one.
                    floor = mp.mpf(2) ** -80 * largest + (tiny if k > 0 else 0)
                    assert abs(a - b) <= 2e-6 * abs(b) + floor, (name, k, entries)
                if k:
                    near = mp.mpf(2) ** -60
                    slopes = [(exact(v * (1 + near)) - exact(v * (1 - near))) / (2 * near * v) for v in z if v]
                    np.testing.assert_allclose(slope[m != 0], [float(s) for s in slopes], atol=2e-6)
            assert np.isfinite(slope).all()


def test_activate_on_a_plain_array_is_phi():
    z = normal(3, 4)
    np.testing.assert_array_equal(layers.activate(jnp.sin, z), jnp.sin(z))


def test_activate_reads_nan_where_phi_leaves_the_range():
    """z^2 is neither linear nor bounded: beyond the headroom it has no asymptote to be."""
    run = jax.jit(lambda m, k: parts(layers.activate(jnp.square, Scaled(m, k)))[0])
    m = np.array([0.75, -0.5], np.float32)
    assert np.isnan(run(m, np.int32(200))).all()
    np.testing.assert_allclose(run(m, np.int32(10)), (m * 2**10) ** 2, rtol=1e-6)


def test_nan_stays_in_its_own_entry():
    w, x = np.ones((3, 2), np.float32), np.array([[1.0, np.nan, np.inf, -2.0]], np.float32)
    w[0, 1] = np.inf

    @jax.jit
    def run(w, x):
        return (
            layers.activate(jax.nn.relu, lift(x)),
            layers.affine(Probed(w, jnp.zeros(2), jnp.zeros((5, 2))), lift(jnp.ones((2, 3)))),
        )

    h, z = run(w, x)
    np.testing.assert_array_equal(np.isnan(h.m), [[False, True, True, False]])
    np.testing.assert_array_equal(np.isnan(z.m), [[False, True]] * 2)


def test_normalise_at_any_magnitude():
    """Against float64 on the plain values, which it holds; and the cotangent against that of float64."""
    m, c = normal(BATCH, 6), normal(BATCH, 6)

    @jax.jit
    def by_scaled(m, k):
        y, vjp, k = jax.vjp(lambda m: parts(layers.normalise(Scaled(m, k))), m, has_aux=True)
        return y, k, vjp(c)[0]

    @jax.jit
    def by_hand(value, c):
        y, vjp = jax.vjp(standardise, value)
        return y, vjp(c)[0], layers.normalise(value)

    for k in (-300, -60, -8, 0, 8, 60, 100):
        y, y_k, c_in = (np.asarray(a, np.float64) for a in by_scaled(m, np.int32(k)))
        with jax.enable_x64(True):
            expected, expected_c, plain = map(np.asarray, by_hand(np.ldexp(m.astype(np.float64), k), c.astype(np.float64)))
        np.testing.assert_allclose(plain, expected, rtol=1e-12)
        for a, b in ((np.ldexp(y, int(y_k)), expected), (c_in, expected_c)):
            np.testing.assert_allclose(a / np.max(np.abs(b)), b / np.max(np.abs(b)), atol=2e-6)


def test_normalise_has_the_eps_it_is_given():
    h = normal(2, 5)
    centred = h - h.mean(1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 0.3)
    plain, scaled = jax.jit(lambda h: (layers.normalise(h, eps=0.3), layers.normalise(lift(h), eps=0.3).m))(h)
    np.testing.assert_allclose(plain, expected, rtol=1e-5)
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)


def test_plain_sees_the_plain_value_and_loses_what_a_float_cannot_hold():
    m = normal(2, 3)

    @jax.jit
    def run(m):
        ours = layers.plain(scrambled)(Scaled(m, jnp.int32(-5))).m, layers.plain(scrambled)(m)
        return ours, (scrambled(m / 32), scrambled(m)), layers.plain(lambda h: h)(Scaled(m, jnp.int32(3000))).m

    (scaled, plain), expected, lost = run(m)
    np.testing.assert_allclose(scaled, expected[0], rtol=1e-6)
    np.testing.assert_array_equal(plain, expected[1])
    assert np.isnan(lost).all()


def test_linear_is_drawn_as_it_says():
    n = 2000
    w, b = jax.tree.map(np.asarray, jax.jit(layers.linear(50, n, sigma_w=1.7, sigma_b=0.6).init)(KEY))
    assert (w.shape, b.shape, w.dtype) == ((50, n), (n,), np.float32)
    # The relative standard error of a variance of `size` normal draws is sqrt(2 / size).
    assert abs(np.var(w) / (1.7**2 / 50) - 1) < 4 * math.sqrt(2 / w.size)
    assert abs(np.var(b) / 0.6**2 - 1) < 4 * math.sqrt(2 / n)
    assert abs(np.mean(b)) < 4 * 0.6 / math.sqrt(n)
    assert not np.any(jax.jit(layers.linear(50, 3).init)(KEY).b)


def test_sigmas_are_traceable():
    make = lambda s: layers.residual(4, 4, phi="tanh", sigma_w=s, sigma_b=s).init(KEY)  # noqa: E731
    sigmas = np.float32([0.5, 2.0])

    @jax.jit
    def run(s):
        return jax.vmap(make)(s), jax.vmap(jax.jacfwd(make))(s), [make(0.5), make(2.0)]

    lanes, slopes, alone = jax.device_get(run(sigmas))
    for i, s in enumerate((0.5, 2.0)):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), lanes, alone[i])
        jax.tree.map(lambda a, b, i=i, s=s: np.testing.assert_allclose(s * a[i], b[i], rtol=1e-5), slopes, lanes)  # linear in sigma


def test_a_residual_block_that_changes_the_width_is_dense():
    z = normal(BATCH, 6)
    a, b = (make(6, 3, phi="tanh") for make in (layers.residual, layers.dense))
    np.testing.assert_array_equal(*jax.jit(lambda: [block.apply(block.init(KEY), z) for block in (a, b)])())


@pytest.mark.parametrize("n", [0, -1, 2.0, "3", None, True])
def test_bad_widths(n):
    for widths in ((n, 3), (3, n)):
        with pytest.raises(ValueError, match=f"fan_(in|out) is {n!r}, expected an integer of at least 1"):
            layers.linear(*widths)


def test_widths_that_numpy_counted():
    assert jax.eval_shape(layers.linear(np.int64(3), np.int32(2)).init, KEY).w.shape == (3, 2)


@pytest.mark.parametrize("make", [layers.dense, layers.residual, layers.layernorm_dense])
def test_bad_options(make):
    with pytest.raises(ValueError, match=r"sigma_w is -1.0, expected a finite number >= 0"):
        make(3, 3, phi="tanh", sigma_w=-1.0)
    with pytest.raises(ValueError, match=r"sigma_b is nan, expected a finite number >= 0"):
        make(3, 3, phi="tanh", sigma_b=math.nan)
    with pytest.raises(ValueError, match="did you mean 'tanh'"):
        make(3, 3, phi="tahn")
    with pytest.raises(ValueError, match="did you mean 'uniform'"):
        make(3, 3, phi="tanh", weights="unifrom")
    with pytest.raises(TypeError, match="weights is int"):
        make(3, 3, phi="tanh", weights=2)


def test_exactly_one_affine():
    p = Affine(jnp.ones((2, 2)), jnp.zeros(2))
    for params in (p, {"gain": jnp.ones(2), "inner": (p,)}):
        assert layers.affine_of(params) is p
        probed = layers.with_probe(params, jnp.zeros((5, 2)))
        found = [q for q in jax.tree.leaves(probed, is_leaf=lambda q: isinstance(q, Probed)) if isinstance(q, Probed)]
        assert len(found) == 1
        assert found[0].w is p.w
    for params, number in (((p, p), 2), ({"gain": jnp.ones(2)}, 0)):
        with pytest.raises(ValueError, match=f"hold {number} Affine maps, expected 1"):
            layers.affine_of(params)


def test_a_scaled_input_needs_a_probe():
    with pytest.raises(TypeError, match="needs probed parameters"):
        layers.affine(Affine(normal(2, 2), normal(2)), Scaled(normal(1, 2), np.int32(0)))
