"""The assertions against spreads, fractions and sizes computed by hand, on both sides of the line."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vgrad
from vgrad import testing

X = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)


def draw(sizes, seed=1):
    """Four layers of 8 units whose weights are multiplied by `sizes`."""
    rng = np.random.default_rng(seed)
    return {f"layer{i}": {"w": (s * rng.normal(size=(8, 8)) / 8**0.5).astype(np.float32), "b": np.zeros(8, np.float32)}
            for i, s in enumerate(sizes)}  # fmt: skip


def apply_fn(params, x, taps=None, phi=jax.nn.soft_sign):
    """Hidden layers with phi, and a linear readout. `taps` are added to every z; all z are returned too."""
    zs = []
    for i, p in enumerate(params.values()):
        z = (phi(x) if i else x) @ p["w"] + jnp.broadcast_to(p["b"], x.shape)
        x = z if taps is None else z + taps[i]
        zs.append(x)
    return x, zs


def loss_fn(params, x):
    return jnp.sum(jnp.square(apply_fn(params, x)[0]))


@pytest.fixture(scope="module")
def params():
    return draw([1.0, 0.5, 0.1, 2.0])


def test_gradients_flow_up_to_the_spread_of_delta_by_hand(params):
    by_taps = jax.jit(jax.grad(lambda taps: jnp.sum(jnp.square(apply_fn(params, X, taps)[0]))))
    taps = by_taps([np.zeros((32, 8), np.float32)] * 4)
    log_delta = np.log([np.linalg.norm(t) for t in taps])
    spread, low, high = np.ptp(log_delta), np.argmin(log_delta), np.argmax(log_delta)
    testing.assert_gradients_flow(loss_fn, params, X, max_log_ratio=float(spread) + 1e-3)
    with pytest.raises(AssertionError, match=f"between layer{low}/w and layer{high}/w") as failure:
        testing.assert_gradients_flow(loss_fn, params, X, max_log_ratio=float(spread) - 1e-3)
    for i in (low, high):  # the rows that are to blame, with their numbers
        assert any(f"layer{i}/w" in line and f"{log_delta[i]:.2f}" in line for line in str(failure.value).splitlines())


def test_what_is_named_may_be_left_out(params):
    """With the readout alone left over the ratio is 1."""
    testing.assert_gradients_flow(loss_fn, params, X, max_log_ratio=0.0, ignore="layer[0-2]")


@pytest.mark.parametrize(("size", "num"), [(0.0, 2), (np.nan, 3)])
def test_a_broken_layer_is_found(size, num):
    """Weights 0 in layer 2 cut off layers 0 and 1; NaN in it reaches all but the readout, whose delta is a constant."""
    with pytest.raises(AssertionError, match=f"zero, NaN or inf at {num} of 4 sites") as failure:
        testing.assert_gradients_flow(lambda p, x: jnp.sum(apply_fn(p, x)[0]), draw([1.0, 1.0, size, 1.0]), X)
    assert "layer0/w" in str(failure.value)


def test_a_layer_of_tiny_weights_is_found():
    """Weights 1e-30 take 69.1 nats from the gradient of the layers before; the other layers take up to three."""
    with pytest.raises(AssertionError, match="differs by") as failure:
        testing.assert_gradients_flow(lambda p, x: jnp.sum(apply_fn(p, x)[0]), draw([1.0, 1.0, 1e-30, 1.0]), X)
    differs = float(re.search(r"differs by ([0-9.]+)", str(failure.value))[1])
    assert 30 * np.log(10) < differs < 30 * np.log(10) + 3


def test_a_parameter_that_is_not_used_is_found(params):
    more = params | {"lonely": jnp.ones((2, 2))}
    used = lambda p, x: loss_fn({k: v for k, v in p.items() if k != "lonely"}, x)  # noqa: E731
    with pytest.raises(AssertionError, match="does not use lonely"):
        testing.assert_gradients_flow(used, more, X)
    testing.assert_gradients_flow(used, more, X, ignore="lonely")


def test_dead_units_up_to_their_number():
    """Three of eight units of layer 1 have a bias that no sample overcomes, all others one that none loses."""
    params = draw([1.0] * 4)
    params["layer0"]["b"][:] = 100
    params["layer1"]["b"][:] = [-1e4] * 3 + [1e4] * 5
    params["layer2"]["b"][:] = 1e6
    relu = lambda p, x: jnp.sum(apply_fn(p, x, phi=jax.nn.relu)[0])  # noqa: E731
    testing.assert_no_dead_units(relu, params, X, max_fraction=3 / 8)
    with pytest.raises(AssertionError, match=r"at 1 of 3 sites") as failure:
        testing.assert_no_dead_units(relu, params, X, max_fraction=2 / 8)
    assert "layer1/w" in str(failure.value)
    assert "layer0/w" not in str(failure.value).split("\n\n")[1]
    testing.assert_no_dead_units(relu, params, X, ignore="layer1")


def test_dead_units_where_none_can_die():
    with pytest.raises(AssertionError, match="nothing was checked"):
        testing.assert_no_dead_units(lambda p, x: jnp.sum(x @ p["w"]), {"w": jnp.ones((8, 2))}, X)


def test_the_signal_keeps_its_size_up_to_the_spread_by_hand(params):
    log_rms = np.log([np.sqrt(np.mean(np.square(z))) for z in apply_fn(params, X)[1]])
    testing.assert_signal_preserved(apply_fn, params, X, max_log_ratio=float(np.ptp(log_rms)) + 1e-3)
    with pytest.raises(AssertionError, match="ln rms z differs") as failure:
        testing.assert_signal_preserved(apply_fn, params, X, max_log_ratio=float(np.ptp(log_rms)) - 1e-3)
    assert f"{log_rms.min():.2f}" in str(failure.value)


def test_a_signal_that_is_lost():
    with pytest.raises(AssertionError, match="zero, NaN or inf at 1 of 4"):
        testing.assert_signal_preserved(apply_fn, draw([1.0, 1.0, 1.0, 0.0]), X)


@settings(deadline=None, max_examples=3)
@given(st.floats(-3, 3), st.integers(2, 4))
def test_in_a_property_test(log_size, num_layers):
    """Of L rotations times c, ln ||delta|| and ln rms z differ by (L - 1) |ln c| between the ends."""
    w, _ = np.linalg.qr(np.random.default_rng(num_layers).normal(size=(8, 8)))
    params = [(np.exp(log_size) * w).astype(np.float32)] * num_layers

    def linear(params, x):
        for w in params:
            x = x @ w
        return x

    spread = (num_layers - 1) * abs(log_size)
    testing.assert_signal_preserved(linear, params, X, max_log_ratio=spread + 1e-3)
    too_little = spread - 1e-3
    with pytest.raises(AssertionError, match="differs by") if too_little > 0 else contextlib.nullcontext():
        loss = lambda p, x: jnp.sum(linear(p, x))  # noqa: E731
        testing.assert_gradients_flow(loss, params, X, max_log_ratio=too_little if too_little > 0 else 2e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: testing.assert_gradients_flow(loss_fn, p, X, max_log_ratio=-1.0), "max_log_ratio is -1.0"),
        (lambda p: testing.assert_gradients_flow(loss_fn, p, X, ignore="("), "expected a regular expression"),
        (lambda p: testing.assert_no_dead_units(loss_fn, p, X, max_fraction=1.0), "max_fraction is 1.0"),
        (lambda p: testing.assert_signal_preserved(lambda p, x: jnp.argmax(x @ p["layer0"]["w"]), p, X), "no array of floats"),
    ],
)
def test_bad_input_is_named(params, call, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        call(params)


def test_ignoring_everything_is_no_success(params):
    with pytest.raises(AssertionError, match="nothing was checked"):
        testing.assert_gradients_flow(loss_fn, params, X, ignore="layer")
    assert vgrad.testing is testing
