"""Sweeps: what comes out does not depend on what else was asked for."""

import chex
import jax
import numpy as np
import pytest

import vgrad
from vgrad import losses
from vgrad.sweep import grid_points, sweep

pytestmark = pytest.mark.xdist_group("sweep")  # its fixtures are costly: one process for all

X = np.random.default_rng(9).standard_normal((6, 4), np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2])
OPTIONS = dict(key=jax.random.key(0), batch=(X, LABELS), loss=losses.cross_entropy)
DEPTHS = [2, 4, 7]


def family(point):
    return vgrad.mlp(8, "tanh", 4, 3, sigma_w=point["sigma_w"], sigma_b=point.get("sigma_b", 0.1))


GRID = {"sigma_w": [0.5, 2.0, 1.0]}


@pytest.fixture(scope="module")
def swept():
    return sweep(family, GRID, num_seeds=3, depths=DEPTHS, **OPTIONS)


def test_equals_profile_of_each_network(swept):
    net, p, s = family({"sigma_w": 2.0}), 1, 2
    params = jax.jit(net.init, static_argnums=1)(jax.random.fold_in(jax.random.key(0), s), 7)
    prof = vgrad.profile(net, params, (X, LABELS), loss=losses.cross_entropy, depths=DEPTHS)
    for ours, theirs in zip(swept, prof, strict=True):
        assert ours.dtype == np.float64
        assert ours.shape == (3, 3, 3, 7)
        np.testing.assert_allclose(ours[p, s], theirs, atol=1e-5)  # same maths, two routes


def test_more_points_seeds_and_depths_leave_earlier_results_unchanged(swept):
    more = sweep(family, {"sigma_w": [0.5, 2.0, 1.0, 3.0]}, num_seeds=5, depths=[2, 3, 4, 7, 8], batch_size=4, **OPTIONS)
    for a, b in zip(swept, more, strict=True):
        np.testing.assert_allclose(a, b[:3, :3][:, :, [0, 2, 3], :7], atol=1e-5)


def test_seeds_can_be_measured_in_parts(swept):
    part = sweep(family, GRID, num_seeds=3, first_seed=2, depths=DEPTHS, **OPTIONS)
    first, last = (jax.tree.map(lambda a, s=s: a[:, s], of) for of, s in ((part, 0), (swept, 2)))
    chex.assert_trees_all_close(first, last, atol=1e-5)


def test_a_sequence_of_points_is_the_grid_written_out(swept):
    points = sweep(family, [{"sigma_w": 0.5}, {"sigma_w": 2.0}, {"sigma_w": 1.0}], num_seeds=3, depths=DEPTHS, **OPTIONS)
    chex.assert_trees_all_equal(points, swept)


def test_the_product_of_a_grid_runs_fastest_in_its_last_name():
    points = grid_points({"a": [1, 2], "b": [5, 6, 7]})
    assert [(p["a"], p["b"]) for p in points] == [(1, 5), (1, 6), (1, 7), (2, 5), (2, 6), (2, 7)]


def test_independent_networks_are_the_draws_of_their_own_keys():
    depths, net = [2, 7], family({"sigma_w": 2.0})
    swept, init = sweep(family, GRID, num_seeds=2, depths=depths, nested=False, **OPTIONS), jax.jit(net.init, static_argnums=1)
    for i, depth in enumerate(depths):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), depth)
        prof = vgrad.profile(net, init(key, depth), (X, LABELS), loss=losses.cross_entropy)
        for ours, theirs in zip(swept, prof, strict=True):
            np.testing.assert_allclose(ours[1, 1, i, :depth], theirs[0], atol=1e-5)
            assert np.isnan(ours[1, 1, i, depth:]).all()


def test_compiles_once_for_all_values():
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def traced_once(point):
        return vgrad.mlp(5, "relu", 4, 3, sigma_w=point["sigma_w"])

    for values in ([0.5, 1.0], [1.5, 2.0], [3.0, 0.1]):
        sweep(traced_once, {"sigma_w": values}, num_seeds=2, depths=[2, 3], **OPTIONS)
    with pytest.raises(AssertionError, match="traced > 1 times"):  # another shape is another program, and chex counts
        sweep(traced_once, {"sigma_w": [0.5]}, num_seeds=2, depths=[2, 3], **OPTIONS)


def test_a_bad_point_does_not_poison_the_others():
    """An activation that overflows at one point of the grid reads NaN there and only there."""

    def cubic(z):
        return z * z * z

    swept = sweep(
        lambda point: vgrad.mlp(8, cubic, 4, 3, sigma_w=point["sigma_w"]),
        {"sigma_w": [0.5, 1e12]},
        num_seeds=2,
        depths=[4],
        **OPTIONS,
    )
    assert np.isfinite(swept.log_delta[0]).all()
    assert np.isnan(swept.log_delta[1, :, 0, 0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grid={}), "the grid is empty"),
        (dict(grid={"sigma_w": []}), "the grid is empty"),
        (dict(grid=[]), "the grid is empty"),
        (dict(grid=[{"sigma_w": 1.0}, {"sigma": 1.0}]), "the same ones everywhere"),
        (dict(grid={"sigma_w": [1.0, -1.0]}), "sigma_w is -1.0, expected a finite number >= 0"),
        (dict(num_seeds=0), "num_seeds is 0, expected an integer of at least 1"),
        (dict(num_seeds=2.5), "num_seeds is 2.5"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(depths=[]), "depths is empty"),
        (dict(depths=[1, 2]), "depth is 1, expected at least 2"),
        (dict(depths=[4, 2]), "increasing"),
        (dict(depths=[2, 2]), "without repeats"),
        (dict(batch=(X, LABELS + 1)), "labels contain 3, expected 0..2"),
        (dict(batch=(X[:, :3], LABELS)), r"x has shape \(6, 3\), expected \[B, 4\]"),
        (dict(batch=(X[0], LABELS)), "a batch of rows"),
        (dict(loss=lambda y, t: y), "expected a scalar"),
    ],
)
def test_bad_input_is_an_error_before_anything_is_traced(change, message):
    options = dict(grid=GRID, num_seeds=2, depths=[2, 3], **OPTIONS) | change
    with pytest.raises(ValueError, match=message):
        sweep(family, options.pop("grid"), **options)


def test_depths_that_are_no_integers_are_a_type_error():
    with pytest.raises(TypeError, match="expected an integer"):
        sweep(family, GRID, num_seeds=1, depths=[2.0, 3.0], **OPTIONS)


def test_a_family_must_return_a_network():
    with pytest.raises(TypeError, match=r"expected a vgrad\.Network"):
        sweep(lambda point: point, GRID, num_seeds=1, depths=[2], **OPTIONS)
