"""Monitors against norms recomputed by hand in float64, wherever an optimizer may hold one."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vgrad
from vgrad.monitor import GradientMonitorState, UpdateMonitorState

pytestmark = pytest.mark.xdist_group("monitor")  # its fixtures are costly: one process for all

DECAY = 0.9
PARAMS = {"dense": {"b": np.float32([0, 0, 0]), "w": np.float32([[1, 2, 3], [4, 5, 6]])}, "out": np.float32([0.6, -0.8])}
# Steps of every kind: ordinary, far out of the range of squares, exactly zero, not a number, infinite.
SIZES = np.array([1.0, 1e-30, 0.0, math.nan, 1e30, math.inf, 2.0], np.float32)


@pytest.fixture(scope="module")
def grads():
    """Gradients of len(SIZES) steps, stacked. Only `dense/w` takes the odd sizes."""
    draws = jax.tree.map(lambda p: np.random.default_rng(p.size).normal(size=(len(SIZES), *p.shape)).astype(np.float32), PARAMS)
    draws["dense"]["w"] *= SIZES[:, None, None]
    return draws


@pytest.fixture(scope="module")
def optimizer():
    return optax.chain(vgrad.monitor(decay=DECAY), optax.sgd(0.5), vgrad.monitor("update", decay=DECAY))


@pytest.fixture(scope="module")
def trained(optimizer, grads):
    """The states after every step, [T, ...], from one compiled scan that never applies the updates."""

    def step(state, g):
        _, state = optimizer.update(g, state, PARAMS)
        return state, state

    return jax.jit(lambda g: jax.lax.scan(step, optimizer.init(PARAMS), g)[1])(grads)


def log_norms(stacked):
    """ln of the norms of the rows, in long double."""
    with np.errstate(all="ignore"):
        rows = np.asarray(stacked, np.longdouble).reshape(len(stacked), -1)
        norms = np.log(np.sqrt(np.sum(rows**2, axis=1))).astype(float)
    return np.where(np.isfinite(np.asarray(stacked, float)).reshape(len(stacked), -1).all(axis=1), norms, np.nan)


def history(readings):
    """average, least, most, number not finite, number zero after each reading, from the definitions."""
    for t in range(1, len(readings) + 1):
        counted = readings[:t][np.isfinite(readings[:t])]
        weights = DECAY ** np.arange(len(counted))[::-1]
        yield (
            np.sum(weights * counted) / np.sum(weights), counted.min(), counted.max(),
            np.isnan(readings[:t]).sum(), np.isneginf(readings[:t]).sum(),
        )  # fmt: skip


@pytest.mark.parametrize("of", ["grad", "update"])
@pytest.mark.parametrize("leaf", [("dense", "w"), ("dense", "b"), ("out",)])
def test_every_field_at_every_step_is_that_computed_by_hand(trained, grads, of, leaf):
    def at(tree):
        for k in leaf:
            tree = tree[k]
        return np.asarray(tree)

    readings = log_norms(at(grads) * (1 if of == "grad" else np.float32(-0.5)))
    names = [f"log_{of}_norm", f"log_{of}_average", f"log_{of}_min", f"log_{of}_max", f"num_nonfinite_{of}s", f"num_zero_{of}s"]
    got = [at(optax.tree.get(trained, name)) for name in names]
    np.testing.assert_allclose(got[0], readings, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.stack(got[1:], axis=1), [*history(readings)], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(optax.tree.get(trained, f"{of}_steps"), np.arange(1, len(SIZES) + 1))
    weights = log_norms(at(PARAMS)[None])
    if of == "grad":
        expected = np.repeat(weights, len(SIZES))
        np.testing.assert_allclose(at(optax.tree.get(trained, "log_param_norm")), expected, rtol=1e-6, atol=1e-6)
    else:  # inf for the bias, which is zero
        ratio = at(optax.tree.get(trained, "log_update_ratio"))
        np.testing.assert_allclose(ratio, readings - weights, rtol=1e-6, atol=1e-5)


def test_updates_pass_through_as_they_are(grads):
    g = jax.tree.map(lambda v: v[0], grads)
    for of in ("gradient", "update"):
        monitor = vgrad.monitor(of)
        compiled = jax.jit(lambda g: monitor.update(g, monitor.init(PARAMS), PARAMS)[0])
        chex.assert_trees_all_equal(compiled(g), g)
        assert monitor.update({}, monitor.init({}), {})[0] == {}

    def look(g):
        out, _ = vgrad.monitor().update(g, vgrad.monitor().init(PARAMS), PARAMS)
        assert all(a is b for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(g), strict=True))

    jax.eval_shape(look, g)


def test_one_structure_from_init_on_and_one_compilation(optimizer, grads):
    step = jax.jit(chex.assert_max_traces(lambda g, s: optimizer.update(g, s, PARAMS)[1], n=1))
    first = state = optimizer.init(PARAMS)
    for t in range(3):
        state = step(jax.tree.map(lambda v, t=t: v[t], grads), state)
        chex.assert_trees_all_equal_shapes_and_dtypes(first, state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "complex64"])
def test_every_dtype_over_its_whole_range(dtype, x64):
    f = jnp.finfo(dtype)
    read = jax.jit(lambda g: optimizer.update({"w": g}, optimizer.init({"w": g}), {"w": g})[1])
    optimizer = vgrad.monitor()
    for size in (float(f.tiny) * 4, 1.0, float(f.max) / 4):
        g = (np.array([[1.0, -0.5], [0.25, 0.75]]) * size).astype(dtype)
        g = g * np.array([[1, 1j], [-1j, 1]], dtype) if dtype == "complex64" else g
        state = read(g)
        wide = np.abs(g.astype(complex if dtype == "complex64" else np.longdouble)).astype(np.longdouble)
        expected = float(np.log(wide.max()) + np.log(np.sum((wide / wide.max()) ** 2)) / 2)
        assert state.log_grad_norm["w"].dtype == ("float64" if dtype == "float64" else "float32")
        np.testing.assert_allclose(state.log_grad_norm["w"], expected, rtol=3e-7, atol=2e-7)
        np.testing.assert_allclose(state.log_param_norm["w"], expected, rtol=3e-7, atol=2e-7)


_norm_of = jax.jit(lambda g: vgrad.monitor().update(g, vgrad.monitor().init(g), g)[1].log_grad_norm)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0.5, 1), st.integers(-120, 120)), min_size=6, max_size=6))
def test_entries_of_any_magnitudes_together(entries):
    g = np.array([math.ldexp(m, e) for m, e in entries], np.float32)
    np.testing.assert_allclose(_norm_of(g), log_norms(g[None])[0], rtol=1e-6, atol=1e-6)


def test_every_third_step_is_read(grads):
    sparse, dense = vgrad.monitor(decay=DECAY, every=3), vgrad.monitor(decay=DECAY)

    def run(monitor, g):
        return jax.lax.scan(lambda s, g: (monitor.update(g, s, PARAMS)[1], None), monitor.init(PARAMS), g)[0]

    got = jax.jit(partial(run, sparse))(grads)
    expected = jax.jit(partial(run, dense))(jax.tree.map(lambda v: v[::3], grads))
    assert int(got.grad_steps) == len(SIZES)
    chex.assert_trees_all_close(got[1:], expected[1:], rtol=1e-6, atol=1e-7)  # two programs, which round differently


def test_rows_of_a_stacked_leaf_are_leaves_of_their_own():
    w = np.random.default_rng(0).standard_normal((3, 4, 4), np.float32) * np.float32([1e-25, 1.0, 0.0])[:, None, None]
    together = {"hidden": w, "rest": w[0]}
    apart = {"hidden": list(w), "rest": w[0]}
    stacked, flat = vgrad.monitor(stacked={"hidden": True, "rest": False}), vgrad.monitor()
    run = jax.jit(lambda p, q: (stacked.update(p, stacked.init(p), p)[1], flat.update(q, flat.init(q), q)[1]))
    got, expected = jax.device_get(run(together, apart))
    assert got.log_grad_norm["rest"].shape == ()
    for a, b in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a["hidden"], np.stack(b["hidden"]), rtol=1e-6)
    empty = {"hidden": w[:0], "rest": w[0]}
    assert jax.eval_shape(lambda p: stacked.update(p, stacked.init(p), p)[1], empty).log_grad_norm["hidden"].shape == (0,)


def test_inside_multisteps_masked_and_multi_transform(grads):
    """MultiSteps hands on the mean of two gradients every second step; a mask leaves its leaves out."""
    inner = optax.chain(vgrad.monitor(), optax.sgd(0.1))
    frozen = optax.multi_transform(
        {"train": inner, "freeze": optax.set_to_zero()}, {"dense": {"b": "freeze", "w": "freeze"}, "out": "train"}
    )
    every_second = optax.MultiSteps(inner, 2)

    @jax.jit
    def both(g):
        def step(states, g):
            return tuple(o.update(g, s, PARAMS)[1] for o, s in zip((every_second, frozen), states, strict=True)), None

        return jax.lax.scan(step, (every_second.init(PARAMS), frozen.init(PARAMS)), g)[0]

    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by an integer
        by_two, masked = both(jax.tree.map(lambda v: v[[0, 6, 0, 6]], grads))
    assert int(optax.tree.get(by_two, "grad_steps")) == 2
    of_mean = log_norms(np.mean(grads["dense"]["w"][[0, 6]], axis=0, keepdims=True))
    np.testing.assert_allclose(optax.tree.get(by_two, "log_grad_norm")["dense"]["w"], of_mean[0], rtol=1e-6, atol=1e-6)
    assert vgrad.monitor_summary(masked).name == ("out",)
    assert vgrad.monitor_summary(masked).log_grad_norm[0] == pytest.approx(log_norms(grads["out"][6:])[0], abs=1e-6)


def test_seeds_by_vmap_are_seeds_one_by_one(grads):
    optimizer = vgrad.monitor()
    one = jax.jit(lambda g: optimizer.update(g, optimizer.init(g), g)[1])
    together = jax.device_get(jax.jit(jax.vmap(lambda g: optimizer.update(g, optimizer.init(g), g)[1]))(grads))
    for t in (0, 1, 2, 3):
        alone = one(jax.tree.map(lambda v, t=t: v[t], grads))
        chex.assert_trees_all_close(jax.tree.map(lambda v, t=t: v[t], together), alone, rtol=1e-6)
    summary = vgrad.monitor_summary(together)
    assert summary.name[:2] == ("dense/b[0]", "dense/b[1]")
    assert [bool(words) for words in summary.flags[7:14]] == [False, True, True, True, True, True, False]


def test_a_derivative_through_training_does_not_meet_the_logarithms():
    """d(loss after three steps)/d(learning rate) is the same with monitors, and finite though a gradient is exactly zero."""

    def after(rate, monitors):
        inner = optax.sgd(rate)
        optimizer = optax.chain(vgrad.monitor(), inner, vgrad.monitor("update")) if monitors else inner
        params = {"used": jnp.ones(2), "unused": jnp.zeros(2)}
        loss = lambda p: jnp.sum(jnp.square(p["used"]) * jnp.array([1.0, 3.0]))  # noqa: E731

        def step(carry, _):
            p, s = carry
            u, s = optimizer.update(jax.grad(loss)(p), s, p)
            return (optax.apply_updates(p, u), s), None

        return loss(jax.lax.scan(step, (params, optimizer.init(params)), None, length=3)[0][0])

    with_them, without = jax.jit(lambda rate: [jax.grad(partial(after, monitors=m))(rate) for m in (True, False)])(0.05)
    assert float(with_them) == pytest.approx(float(without), rel=1e-6)
    assert float(without) == pytest.approx(sum(-2 * 3 * 2 * a * a * (1 - 2 * 0.05 * a) ** 5 for a in (1.0, 3.0)), rel=1e-5)


def test_the_state_can_be_donated(grads):
    """It could not, if init gave two of its leaves one buffer."""
    optimizer = vgrad.monitor()
    step = jax.jit(lambda s, g: optimizer.update(g, s, PARAMS)[1], donate_argnums=0)
    g = jax.tree.map(lambda v: v[0], grads)
    assert int(step(step(optimizer.init(PARAMS), g), g).grad_steps) == 2


def test_no_parameters_are_no_error():
    optimizer = optax.chain(vgrad.monitor(), vgrad.monitor("update"))
    _, state = optimizer.update({}, optimizer.init({}), {})
    summary = vgrad.monitor_summary(state)
    assert summary.name == ()
    assert "parameter" in summary.table()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: vgrad.monitor("grad"), ValueError, "of is 'grad'"),
        (lambda: vgrad.monitor(decay=1.0), ValueError, "decay is 1.0"),
        (lambda: vgrad.monitor(every=0), ValueError, "every is 0"),
        (lambda: vgrad.monitor().init({"n": jnp.arange(3)}), TypeError, r"\['n'\] has dtype int32.*optax.masked"),
        (lambda: vgrad.monitor(stacked=True).init({"a": jnp.ones(())}), ValueError, r"\['a'\] is a scalar"),
        (lambda: vgrad.monitor(stacked={"b": True}).init({"a": jnp.ones(2)}), ValueError, "stacked is"),
        (lambda: vgrad.monitor().update(PARAMS, vgrad.monitor().init(PARAMS)), ValueError, r"no params: call .*, params\)"),
        (lambda: vgrad.monitor().update({}, vgrad.monitor().init(PARAMS), PARAMS), ValueError, "the updates form the tree"),
        (lambda: vgrad.monitor_summary(optax.adam(1.0).init(PARAMS)), ValueError, "no monitor"),
        (lambda: jax.jit(vgrad.monitor_summary)(vgrad.monitor().init(PARAMS)), TypeError, "outside jit"),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_the_summary_labels_pairs_and_flags(trained):
    last = jax.tree.map(lambda v: v[-1], trained)
    summary = vgrad.monitor_summary({"training state": [last]})
    assert summary.name == ("dense/b", "dense/w", "out")
    assert summary.steps.tolist() == [7, 7, 7]
    assert summary.monitor.tolist() == [0, 0, 0]
    assert summary.num_nonfinite_grads.tolist() == [0, 2, 0]
    assert summary.flags == ((), ("non-finite", "exploding"), ())
    row = next(line for line in str(summary).splitlines() if line.startswith("dense/w"))
    assert f"{summary.log_grad_norm[1]:.2f}" in row
    assert f"{summary.log_update_ratio[1]:.2f}" in row
    assert "non-finite" in row


def _state(log_norm, *, zero=0, ratio=-7.0):
    """A pair of monitors as after four steps with these readings."""
    tree = lambda v: {"a": jnp.float32(v), "top": jnp.float32(0.0)}  # noqa: E731
    count = {"a": jnp.int32(zero), "top": jnp.int32(0)}
    none = {"a": jnp.int32(0), "top": jnp.int32(0)}
    four, low = jnp.int32(4), tree(log_norm)
    return (
        GradientMonitorState(four, tree(-math.inf if zero else log_norm), low, low, low, none, count, tree(0.0)),
        UpdateMonitorState(four, low, low, low, low, none, none, tree(ratio)),
    )


@pytest.mark.parametrize(
    ("readings", "flags"),
    [
        (dict(log_norm=-9.3), ("vanishing",)), (dict(log_norm=-9.1), ()), (dict(log_norm=6.8), ()),
        (dict(log_norm=7.0), ("exploding",)), (dict(log_norm=0.0, zero=1), ("dead",)),
        (dict(log_norm=0.0, ratio=-16.2), ("stalled",)), (dict(log_norm=0.0, ratio=-16.0), ()),
    ],
)  # fmt: skip
def test_flags_at_their_thresholds(readings, flags):
    """ln 1e-4 = -9.21, ln 1e3 = 6.91, ln 1e-7 = -16.12; the other leaf is well throughout."""
    assert vgrad.monitor_summary(_state(**readings)).flags == (flags, ())


def test_thresholds_can_be_moved():
    assert vgrad.monitor_summary(_state(-9.3), vanishing=1e-5).flags[0] == ()
    assert vgrad.monitor_summary(_state(0.0), stalled=2e-3).flags[0] == ("stalled",)
    assert vgrad.monitor_summary(_state(5.0), exploding=100).flags[0] == ("exploding",)


def test_two_gradient_monitors_are_told_apart_and_nothing_is_flagged_before_a_step():
    optimizer = optax.chain(vgrad.monitor(), optax.clip_by_global_norm(1.0), vgrad.monitor(), vgrad.monitor("update"))
    state = optimizer.init(PARAMS)
    assert not any(vgrad.monitor_summary(state).flags)
    g = jax.tree.map(lambda p: 10 * np.ones_like(p), PARAMS)
    summary = vgrad.monitor_summary(jax.jit(lambda s: optimizer.update(g, s, PARAMS)[1])(state))
    assert summary.monitor.tolist() == [0, 0, 0, 1, 1, 1]
    norm = lambda rows: np.sqrt(np.sum(np.exp(2 * summary.log_grad_norm[rows])))  # noqa: E731
    assert norm(slice(0, 3)) == pytest.approx(10 * math.sqrt(11), rel=1e-5)
    assert norm(slice(3, 6)) == pytest.approx(1.0, rel=1e-5)
    assert np.isnan(summary.log_update_norm).tolist() == [True] * 3 + [False] * 3
    assert "1: dense/w" in str(summary)
