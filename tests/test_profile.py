"""The instrument: against `jax.grad` where float32 suffices, against 60-digit arithmetic where nothing plain does."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import vgrad
from vgrad import Params, layers, losses
from vgrad.profile import read
from vgrad.scaled import Scaled, lift

BATCH = 16
X = np.random.default_rng(9).standard_normal((BATCH, 7), np.float32)
LABELS = np.random.default_rng(1).integers(0, 5, BATCH)
KEY = jax.random.key(0)


def draw(net, depth, key=KEY):
    """The parameters as NumPy arrays: what tests do to them then compiles nothing."""
    return jax.device_get(jax.jit(net.init, static_argnums=1)(key, depth))


def ln_norms(params, part):
    """ln of the Frobenius norm of the `part` (w or b) of every layer, by NumPy in float64."""
    rows = [getattr(layers.affine_of(p), part) for p in params]
    rows = [rows[0][None], rows[1], rows[2][None]]
    return np.concatenate([np.log([np.linalg.norm(np.asarray(a, np.float64)) for a in r]) for r in rows if len(r)])


@pytest.mark.parametrize(
    ("hidden", "phi", "width"),
    [
        (layers.dense, "tanh", 24),  # width above the batch: dJ/dW by Gram matrices
        (layers.dense, "gelu", 12),  # below: dJ/dW itself
        (layers.residual, "relu", 24),
        (layers.layernorm_dense, "silu", 24),
    ],
)
def test_equals_grad_at_every_depth(hidden, phi, width):
    net, depths = vgrad.mlp(width, phi, 7, 5, sigma_w=1.3, sigma_b=0.1, hidden=hidden), [2, 3, 6]
    params = draw(net, 6)
    prof = jax.device_get(vgrad.profile(net, params, (X, LABELS), loss=losses.cross_entropy, depths=depths))
    grad = jax.jit(jax.grad(lambda p: losses.cross_entropy(net.forward(p, X), LABELS)))
    for i, d in enumerate(depths):
        grads = grad(params._replace(hidden=jax.tree.map(lambda p, d=d: p[: d - 2], params.hidden)))
        np.testing.assert_allclose(prof.log_grad_w[i, :d], ln_norms(grads, "w"), atol=1e-5)  # same maths, two routes
        np.testing.assert_allclose(prof.log_grad_b[i, :d], ln_norms(grads, "b"), atol=1e-5)
        assert all(np.isnan(f[i, d:]).all() for f in prof)
        assert all(np.isfinite(f[i, : d - 1]).all() for f in prof)


def test_float64(x64):
    x = np.float64(X)
    net = vgrad.mlp(12, "tanh", 7, 5, sigma_w=1.3, sigma_b=0.1)
    params = draw(net, 5)
    prof = vgrad.profile(net, params, (x, LABELS), loss=losses.cross_entropy)
    grads = jax.jit(jax.grad(lambda p: losses.cross_entropy(net.forward(p, x), LABELS)))(params)
    np.testing.assert_allclose(prof.log_grad_w[0], ln_norms(grads, "w"), atol=1e-13)


# 60 digits and no exponent limit: the same networks in arithmetic that needs no rescaling. Arrays of mpmath numbers.

MP_PHI = {
    "identity": (lambda z: z, lambda z: mpmath.mpf(1)),
    "leaky_relu": (lambda z: z if z > 0 else z / 100, lambda z: mpmath.mpf(1) if z > 0 else mpmath.mpf(1) / 100),
    "tanh": (mpmath.tanh, lambda z: mpmath.sech(z) ** 2),
    "sigmoid": (lambda z: 1 / (1 + mpmath.exp(-z)), lambda z: 1 / (2 + mpmath.exp(z) + mpmath.exp(-z))),
}


def exact_profile(params, x, t, phi, skip):
    """ln of the norms of (delta, dJ/dW, dJ/db, h) by layer, for J = sum (y - t)^2 / (2 B).

    `skip`: z + W phi(z) + b from layer 2 on.
    """
    mp = np.vectorize(lambda v: mpmath.mpf(float(v)), otypes=[object])
    f, slope = (np.vectorize(g, otypes=[object]) for g in MP_PHI[phi])
    ws = [mp(w) for w in [params.embed.w, *params.hidden.w, params.readout.w]]
    bs = [mp(b) for b in [params.embed.b, *params.hidden.b, params.readout.b]]
    hs, zs = [mp(x)], []
    for l, (w, b) in enumerate(zip(ws, bs, strict=True)):
        zs.append(hs[-1] @ w + b + (zs[-1] if skip and l else 0))
        hs.append(f(zs[-1]))
    delta, rows = (zs[-1] - mp(t)) / len(x), []
    ln = lambda a: float(mpmath.log(mpmath.fsum(v * v for v in a.flat)) / 2)  # noqa: E731
    for l in range(len(ws) - 1, -1, -1):
        rows.append([ln(delta), ln(hs[l].T @ delta), ln(delta.sum(axis=0)), ln(hs[l + 1] if l < len(ws) - 1 else zs[l])])
        if l:
            delta = (delta @ ws[l].T) * slope(zs[l - 1]) + (delta if skip else 0)
    return np.array(rows[::-1]).T


@functools.cache  # cases that differ in numbers alone share a network, and so its programs
def drawn(phi, hidden, sizes, depth, key):
    """(network, its parameters), with sigma_w = 1."""
    net = vgrad.mlp(*sizes[:1], phi, *sizes[1:], hidden=hidden)
    return net, draw(net, depth, jax.random.key(key))


def scaled(params, sigma_w, bias=0.0):
    return Params(*(p._replace(w=np.float32(sigma_w) * p.w, b=p.b + np.float32(bias)) for p in params))


@pytest.mark.parametrize(
    ("phi", "sigma_w", "bias", "skip", "beyond"),
    [
        ("sigmoid", 1.0, 0.0, False, -150),
        ("leaky_relu", 12.0, 0.1, False, 150),
        ("identity", 1e-3, 0.0, False, -900),
        ("identity", 1e30, 0.0, False, 8000),  # one layer's gain leaves the range of the square
        ("identity", 1e-30, 0.0, False, -8000),
        ("tanh", 0.5, 30.0, False, -5000),  # phi' = 3.5e-26 in every layer: two in a row are below float32
        ("identity", 4.0, 0.0, True, 150),
    ],
)
def test_against_60_digits(phi, sigma_w, bias, skip, beyond):
    net, params = drawn(phi, layers.residual if skip else layers.dense, (6, 3, 6), 120, 2)
    params = scaled(params, sigma_w, bias)
    x, t = np.float32([[0.5, -1.0, 0.25], [1.0, 0.75, -0.5]]), np.zeros((2, 6), np.float32)
    prof = vgrad.profile(net, params, (x, t), loss=losses.squared_error)
    with mpmath.workdps(60):
        exact = exact_profile(params, x, t, phi, skip)
    assert (exact[0, 0] < beyond) if beyond < 0 else (exact[0, 0] > beyond)  # far out of the range of float32, or the test is idle
    for ours, theirs in zip((prof.log_delta, prof.log_grad_w, prof.log_grad_b, prof.log_h), exact, strict=True):
        # float32 logarithms near 1e3 are good to 1e-4; rounding in 120 layers of a chaotic product adds about as much.
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-6, atol=2e-3)


@pytest.mark.parametrize(("phi", "sigma_w", "rate"), [("sigmoid", 1.0, -1.44), ("relu", 4.0, 1.04), ("relu", 0.01, -4.95)])
def test_depth_10000_is_a_reading(phi, sigma_w, rate):
    net, params = drawn(phi, layers.dense, (32, 7, 5), 10_000, 0)
    prof = vgrad.profile(net, scaled(params, sigma_w), (X, np.ones((BATCH, 5), np.float32)), loss=losses.squared_error)
    assert all(np.isfinite(f[0, :-1]).all() for f in prof)
    # Independent of the depth: the same rate, layer by layer, as between any two layers of it.
    delta = np.asarray(prof.log_delta[0], np.float64)
    assert (delta[0] - delta[9000]) / 9000 == pytest.approx(rate, abs=0.05)
    assert (delta[0] - delta[500]) / 500 == pytest.approx(rate, abs=0.1)


def affine(*shape):
    """By NumPy, since what stands in a module is drawn in every process."""
    rng = np.random.default_rng(shape)
    w, b = (rng.standard_normal(s, np.float32) for s in (shape, shape[:-2] + shape[-1:]))
    return vgrad.Affine(np.float32(1.3 / shape[-2] ** 0.5) * w, np.float32(0.1) * b)


NET = vgrad.mlp(8, "tanh", 7, 5, sigma_w=1.3, sigma_b=0.1)
PARAMS = Params(affine(7, 8), affine(5, 8, 8), affine(8, 5))
DEPTHS = [2, 4, 7]


def measured(params=PARAMS, x=X, t=LABELS, net=NET, depths=DEPTHS):
    return vgrad.profile(net, params, (x, t), loss=losses.cross_entropy, depths=depths)


def read_off(*args, **kwargs):
    return jax.device_get(measured(*args, **kwargs))


def changed(a, at, value):
    """A copy of an array with another entry."""
    a = np.array(a)
    a[at] = value
    return a


def test_the_attribution_adds_up():
    prof = read_off()
    change = -np.diff(np.asarray(prof.log_delta))
    for i, d in enumerate(DEPTHS):
        np.testing.assert_allclose((prof.log_gain_w + prof.log_gain_phi)[i, : d - 1], change[i, : d - 1], atol=1e-5)
        assert np.isnan(prof.log_gain_w[i, d - 1])


# What stands behind the affine map, and a tap t [B, N] on what the map takes in: blocks of one's own, as functions of both.
BLOCKS = {
    "branch": lambda p, z, t: z + 0.1 * layers.affine(p, layers.activate(jnp.tanh, z) + t),
    "gain of each unit": lambda p, z, t: layers.affine(p, layers.activate(jnp.tanh, z) + t) * np.float32([np.r_[0.1, 1:8]]),
    "normalised": lambda p, z, t: layers.normalise(z + layers.affine(p, layers.activate(jnp.tanh, z) + t)),
    "activated": lambda p, z, t: layers.activate(jnp.tanh, layers.affine(p, z + t)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_delta_is_that_of_the_output_of_the_layer_whatever_it_does_behind_its_weights(name):
    """dJ/dz_l and dJ/dh_l, through the weights alone, by `jax.grad` of what stands above."""
    tapped, none = BLOCKS[name], np.zeros((BATCH, 8), np.float32)
    own = lambda p, z: tapped(p, z, lift(none) if isinstance(z, Scaled) else none)  # noqa: E731
    net = vgrad.stack(NET.embed, NET.block._replace(apply=own), NET.readout)
    prof = read_off(net=net, depths=None)

    @jax.jit
    def by_grad(params):
        """Norms of dJ/dz_l, l = 1..6, and of dJ by what layers 2..6 take in."""
        zs, hidden = [net.embed.apply(params.embed, X)], [jax.tree.map(lambda p, i=i: p[i], params.hidden) for i in range(5)]
        for p in hidden:
            zs.append(own(p, zs[-1]))

        def J(z, t, i):
            for p in hidden[i:]:
                z, t = tapped(p, z, t), none
            return losses.cross_entropy(net.readout.apply(params.readout, z), LABELS)

        size = lambda g: jnp.log(jnp.linalg.norm(g))  # noqa: E731
        delta = [size(jax.grad(J)(z, none, i)) for i, z in enumerate(zs)]
        return jnp.array(delta), jnp.array([size(jax.grad(J, 1)(z, none, i)) for i, z in enumerate(zs[:5])])

    delta, delta_in = map(np.asarray, by_grad(PARAMS))
    np.testing.assert_allclose(prof.log_delta[0, :6], delta, atol=1e-5)
    np.testing.assert_allclose(prof.log_gain_w[0, :5], delta_in - delta[1:], atol=1e-5)
    np.testing.assert_allclose(prof.log_gain_phi[0, :5], delta[:5] - delta_in, atol=1e-5)


def test_depths_in_one_pass_equal_separate_networks():
    together = read_off()
    for i, d in enumerate(DEPTHS):
        alone = read_off(PARAMS._replace(hidden=jax.tree.map(lambda p, d=d: p[: d - 2], PARAMS.hidden)), depths=None)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a[0], b[i, :d], atol=1e-5)


def test_permuting_the_neurons_changes_nothing():
    p = np.random.default_rng(0).permutation(8)
    embed, hidden, readout = PARAMS
    moved = Params(
        embed._replace(w=embed.w[:, p], b=embed.b[p]),
        hidden._replace(w=hidden.w[:, p][:, :, p], b=hidden.b[:, p]),
        readout._replace(w=readout.w[p]),
    )
    for a, b in zip(read_off(moved), read_off(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # sums in another order


@jax.jit
def times(factor):
    """The readings for `factor` times the loss."""
    loss = lambda y, t: factor * losses.cross_entropy(y, t)  # noqa: E731
    return read(NET, PARAMS, (X, LABELS), loss=loss, depths=np.array(DEPTHS))


@pytest.mark.parametrize("k", [20, -20, 90, -90])
def test_rescaling_is_exact(k):
    """A loss 2^k times as large, far beyond what the square of a float32 holds, gives the same bits times 2^k."""
    value = lambda n: np.asarray(n.sumsq, np.float64) * 4.0 ** np.asarray(n.exponent, np.float64)  # noqa: E731
    plain, larger = times(1.0), times(2.0**k)
    for name in ("delta", "grad_w", "grad_b", "delta_in"):
        np.testing.assert_array_equal(value(getattr(larger, name)), 4.0**k * value(getattr(plain, name)))


@pytest.fixture(scope="module")
def three():
    """The parameters of three seeds."""
    return jax.device_get(jax.jit(jax.vmap(lambda s: NET.init(jax.random.fold_in(KEY, s), 7)))(np.arange(3)))


over_seeds = jax.jit(jax.vmap(measured))


def test_vmap_equals_loop_and_jit_equals_no_jit(three):
    together, jitted = jax.device_get(over_seeds(three)), jax.jit(measured)
    for i in range(3):
        own = jax.tree.map(lambda p, i=i: p[i], three)
        for a, b, c in zip(together, jitted(own), measured(own), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-5)
            np.testing.assert_allclose(b, c, atol=1e-5)


def test_one_compilation_for_one_network():
    from vgrad.profile import _compiled

    measured()
    before = _compiled._cache_size()
    measured(jax.tree.map(lambda p: 2 * p, PARAMS))
    assert _compiled._cache_size() == before
    # One for all that differ in their draws, too, and for no other.
    measured(net=vgrad.mlp(8, "tanh", 7, 5, sigma_w=2.0, weights="orthogonal"))
    assert _compiled._cache_size() == before
    for other in (dict(phi="relu"), dict(phi="tanh", precision="default"), dict(phi="tanh", hidden=layers.residual)):
        assert vgrad.mlp(8, in_dim=7, out_dim=5, **other).block.apply != NET.block.apply


def test_a_phi_that_has_no_hash_is_equal_to_itself_alone():
    class Twice:
        __hash__ = None  # as of a dataclass, or of a module that holds arrays

        def __call__(self, z):
            return 2 * jnp.tanh(z)

    phi = Twice()
    ours, other = (vgrad.mlp(8, phi, 7, 5) for _ in range(2))
    assert ours.block.apply == ours.block.apply != other.block.apply
    theirs = vgrad.mlp(8, lambda z: 2 * jnp.tanh(z), 7, 5)
    for a, b in zip(read_off(net=ours, depths=[3]), read_off(net=theirs, depths=[3]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_nan_in_a_layer_stays_with_the_networks_that_have_it():
    bad = PARAMS._replace(hidden=PARAMS.hidden._replace(w=changed(PARAMS.hidden.w, (3, 0, 0), np.nan)))  # layer 5
    prof, clean = read_off(bad), read_off()
    for a, b in zip(prof, clean, strict=True):
        np.testing.assert_allclose(a[:2], b[:2], rtol=1e-6, atol=1e-6)  # depths 2 and 4, which go down beside the NaN
    assert np.isnan(prof.log_delta[2]).all()
    assert np.isnan(prof.log_grad_w[2]).all()
    np.testing.assert_array_equal(prof.log_h[2, :4], clean.log_h[2, :4])  # below it, the forward signal is what it was
    assert np.isnan(prof.log_h[2, 4:]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_input_is_never_a_plausible_number(value):
    prof = measured(x=changed(X, (3, 2), value))
    assert all(np.isnan(f).all() for f in prof)
    wild = read_off(PARAMS._replace(readout=PARAMS.readout._replace(w=changed(PARAMS.readout.w, (0, 0), value))))
    assert np.isnan(wild.log_delta).all()
    np.testing.assert_array_equal(wild.log_h[2, :6], read_off().log_h[2, :6])


def test_one_bad_seed_leaves_the_others_alone(three):
    bad = three._replace(embed=three.embed._replace(b=changed(three.embed.b, (1, 0), np.inf)))
    clean, hurt = (jax.device_get(over_seeds(p)) for p in (three, bad))
    for a, b in zip(clean, hurt, strict=True):
        np.testing.assert_allclose(a[::2], b[::2], rtol=1e-6, atol=1e-6)
        assert np.isnan(b[1]).all()


def test_a_dead_network_reads_exactly_zero():
    net = vgrad.mlp(8, "relu", 7, 5)
    params = draw(net, 6)
    biases = changed(changed(params.hidden.b, 2, -1000.0), 3, 1.0)  # layer 4 is dead, layer 5 lives on its biases
    dead = params._replace(hidden=params.hidden._replace(b=biases))
    prof = jax.device_get(vgrad.profile(net, dead, (X, LABELS), loss=losses.cross_entropy))
    assert np.isneginf(prof.log_delta[0, :4]).all()
    assert np.isneginf(prof.log_grad_w[0, :5]).all()  # the gradient of layer 5 is delta_5 times h_4 = 0
    assert np.isfinite(prof.log_delta[0, 4:]).all()
    assert np.isneginf(prof.log_h[0, 3])
    assert np.isneginf(prof.log_gain_phi[0, 3])
    assert np.isfinite(prof.log_gain_w[0, 3])


def test_a_loss_that_is_already_minimal_is_an_exact_zero():
    net = vgrad.mlp(8, "identity", 7, 5)
    params = draw(net, 3)
    prof = vgrad.profile(net, params, (X, jax.jit(net.forward)(params, X)), loss=lambda y, t: jnp.sum(y * 0.0) + 0.0 * jnp.sum(t))
    assert np.isneginf(prof.log_delta).all()


def test_any_loss_and_any_targets():
    pair = {"up": np.ones((BATCH, 5), np.float32), "power": 3}
    prof = vgrad.profile(NET, PARAMS, (X, pair), loss=lambda y, t: jnp.mean(jnp.abs(y - t["up"]) ** t["power"]))
    grads = jax.jit(jax.grad(lambda p: jnp.mean(jnp.abs(NET.forward(p, X) - 1.0) ** 3)))(PARAMS)
    np.testing.assert_allclose(prof.log_grad_w[0], ln_norms(grads, "w"), atol=1e-5)


@pytest.mark.parametrize(
    ("depths", "error", "message"),
    [
        ([], ValueError, "depths is empty"),
        ([1, 2], ValueError, "depth is 1, expected at least 2"),
        ([3, 2], ValueError, r"depths are \(3, 2\), expected increasing"),
        ([2, 2], ValueError, r"depths are \(2, 2\), expected increasing"),
        ([2, 8], ValueError, "depths go up to 8, but the parameters have depth 7"),
        ([2.0], TypeError, "depth is 2.0, expected an integer"),
        ([True], TypeError, "depth is True, expected an integer"),
    ],
)
def test_bad_depths(depths, error, message):
    with pytest.raises(error, match=message):
        measured(depths=depths)


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"x has shape \(7,\), expected \[B, 7\]"):
        measured(x=X[0])
    with pytest.raises(ValueError, match=r"labels contain 9, expected 0\.\.4"):
        measured(t=LABELS + 5 * (LABELS == 4))
    with pytest.raises(ValueError, match=r"loss returned \(16,\), expected a scalar: take the mean"):
        vgrad.profile(NET, PARAMS, (X, LABELS), loss=lambda y, t: y[:, 0])


def test_a_block_of_plain_operations_says_how_to_be_one():
    foreign = vgrad.Block(NET.block.init, lambda p, z: jnp.tanh(z) @ p.w)
    net = vgrad.stack(NET.embed, foreign, NET.readout)
    with pytest.raises(TypeError) as caught:
        vgrad.profile(net, PARAMS, (X, LABELS), loss=losses.cross_entropy)
    assert "vgrad.layers" in "".join(caught.value.__notes__)


def test_bfloat16_reads_what_bfloat16_can_tell():
    net = vgrad.mlp(8, "tanh", 4, 3, sigma_w=1.5)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), jax.jit(net.init, static_argnums=1)(jax.random.key(0), 5))
    x, labels = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.bfloat16), np.array([0, 1, 2])
    read = vgrad.profile(net, params, (x, labels), loss=losses.cross_entropy).log_grad_w[0]
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    exact = jax.grad(lambda p: losses.cross_entropy(net.forward(p, wide[1]), labels))(wide[0])
    exact = [exact.embed.w, *exact.hidden.w, exact.readout.w]
    np.testing.assert_allclose(read.astype(np.float32), [np.log(np.linalg.norm(g)) for g in exact], atol=0.05)


def test_a_loss_of_differences_behind_samples_that_saturation_made_equal():
    """Cotangents of two samples cancel, and so does the greatest part of each dJ/dW."""
    net = vgrad.mlp(64, "sigmoid", 7, 5)
    params = jax.jit(net.init, static_argnums=1)(jax.random.key(0), 8)
    x = np.random.default_rng(0).standard_normal((2, 7), np.float32)
    read = vgrad.profile(net, params, (x, 0), loss=lambda y, t: jnp.mean((y[0] - y[1]) ** 2))
    exact = jax.grad(lambda p: jnp.mean(jnp.square(jnp.diff(net.forward(p, x), axis=0))))(params)
    exact = [exact.embed.w, *exact.hidden.w, exact.readout.w]
    # In float32 the samples differ by few bits at the top.
    np.testing.assert_allclose(read.log_grad_w[0], np.log([np.linalg.norm(g) for g in exact]), atol=0.02)
    assert read.log_grad_w[0, -1] < read.log_delta[0, -1] + read.log_h[0, -2] - 5  # or nothing has cancelled
