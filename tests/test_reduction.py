"""Statistics over seeds, chunk by chunk: against NumPy and `vgrad.fit` on the raw profiles of the same networks."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vgrad
from vgrad import fit, losses
from vgrad.reduction import QUANTILES

pytestmark = pytest.mark.xdist_group("reduction")  # its fixtures are costly: one process for all

X, TARGET = np.random.default_rng(1).standard_normal((4, 3), np.float32), np.zeros((4, 2), np.float32)
DEPTHS, SEEDS, CHUNK = [2, 4, 9], 61, 21  # two chunks of 21 and one of 19


def relu(point):
    """Narrow, so that some networks die."""
    return vgrad.mlp(4, "relu", 3, 2, sigma_w=point["sigma_w"])


OPTIONS = dict(key=jax.random.key(0), num_seeds=SEEDS, depths=DEPTHS, batch=(X, TARGET), loss=losses.squared_error)
GRID = {"sigma_w": [1.4, 1e12]}


@pytest.fixture(scope="module")
def both():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return vgrad.sweep(relu, GRID, **OPTIONS), vgrad.sweep_statistics(relu, GRID, chunk=25, **OPTIONS)


quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of a reference that has NaN and inf in it


@quiet
@pytest.mark.parametrize("name", vgrad.Profile._fields)
def test_the_moments_are_those_of_the_raw_profiles(both, name):
    raw, stats = getattr(both[0], name), both[1]
    get = lambda field: getattr(getattr(stats, field), name)  # noqa: E731
    inside = ~np.isnan(raw).all(axis=1)
    np.testing.assert_array_equal(np.isnan(get("num")), ~inside)
    np.testing.assert_array_equal(get("num_zero")[inside], np.isneginf(raw).sum(axis=1)[inside])
    np.testing.assert_array_equal(get("num")[inside], (~np.isnan(raw)).sum(axis=1)[inside])
    finite = np.where(np.isfinite(raw), raw, np.nan)
    np.testing.assert_allclose(get("variance")[inside], np.nanvar(finite, axis=1, ddof=1)[inside], rtol=2e-4, atol=1e-9)
    alive = inside & (get("num_nan") == 0)
    for theirs, field in ((fit.mean_log(raw), "mean_log"), (fit.log_mean_sq(raw), "log_mean_sq")):
        np.testing.assert_allclose(get(field).value[alive], theirs.value[alive], rtol=1e-6, atol=1e-5)
    typical = alive & (get("num_zero") == 0)
    np.testing.assert_allclose(get("mean_log").stderr[typical], fit.mean_log(raw).stderr[typical], rtol=2e-4, atol=1e-8)


def test_the_error_of_the_mean_square_is_that_of_the_jackknife(both):
    """To first order: the linearised error and that of leaving one out differ by a tenth where n_eff is 30."""
    theirs, ours = fit.log_mean_sq(both[0].log_h), both[1].log_mean_sq.log_h
    many = both[1].effective.log_h > 30
    assert many.sum() > 3
    np.testing.assert_allclose(ours.stderr[many], theirs.stderr[many], rtol=0.15)


def test_the_effective_number_of_networks(both):
    weight = np.exp(2 * (both[0].log_h - both[0].log_h.max(axis=1, keepdims=True)))
    np.testing.assert_allclose(both[1].effective.log_h, weight.sum(1) ** 2 / np.square(weight).sum(1), rtol=1e-4)


@quiet
def test_quantiles_within_a_bin(both):
    """A fifth of the spread of the first chunk, beside the gap between neighbours in a sample of 61."""
    raw, got = both[0].log_h, np.asarray(both[1].quantiles.log_h)
    inside, dead = np.isfinite(raw).all(axis=1), np.isneginf(raw).mean(axis=1)
    std = raw[:, :CHUNK].std(axis=1)
    assert inside.sum() > 4
    assert (dead > 0.05).any()
    for q, p in zip(got, QUANTILES, strict=True):
        ordered = np.sort(raw, axis=1)
        below, above = (ordered[:, int(np.clip(round(p * SEEDS) + way, 0, SEEDS - 1))] for way in (-2, 1))
        assert (q >= below - std / 5)[inside].all()
        assert (q <= above + std / 5)[inside].all()
        np.testing.assert_array_equal(np.isneginf(q)[dead > 0], (dead >= p)[dead > 0])


def test_chunks_change_nothing_but_rounding(both):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        whole = vgrad.sweep_statistics(relu, GRID, chunk=1000, **OPTIONS)
    for field in ("num", "num_zero", "mean_log", "variance", "log_mean_sq", "effective"):
        for ours, theirs in zip(*(jax.tree.leaves(getattr(s, field)) for s in (both[1], whole)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_nan_seed_is_counted_and_left_out():
    """In chunks that do not come out even: eight of eight, the last of which is not full, and one program for all."""
    traced = []

    def family(point):
        traced.append(isinstance(point["one"], jax.core.Tracer))
        net = vgrad.mlp(4, "tanh", 3, 2)
        bad = lambda key: jax.random.key_data(key)[-1] % 4 == 0  # noqa: E731  some of the draws
        init = lambda key, depth: jax.tree.map(lambda a: a + jnp.where(bad(key), jnp.nan, 0), net.init(key, depth))  # noqa: E731
        return net._replace(init=init)

    options = OPTIONS | {"depths": [4]}
    raw = vgrad.sweep(family, {"one": [1.0]}, **options).log_delta[:, :, :, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        stats = vgrad.sweep_statistics(family, {"one": [1.0]}, chunk=8, **options)
    assert sum(traced) == 2  # of the sweep and of the statistics
    num_nan = np.isnan(raw).sum()
    assert 0 < num_nan < SEEDS
    assert stats.num_nan.log_delta[0, 0, 0] == num_nan
    assert stats.num.log_delta[0, 0, 0] == SEEDS - num_nan
    np.testing.assert_allclose(stats.mean_log.log_delta.value[0, 0, 0], np.nanmean(raw), rtol=1e-5)


def test_a_mean_that_few_networks_carry_is_said_to_be_so():
    with pytest.warns(RuntimeWarning, match="fewer than 10 effective networks"):
        vgrad.sweep_statistics(relu, {"sigma_w": [1.4]}, **OPTIONS | {"depths": [40]})


def test_bad_input():
    with pytest.raises(ValueError, match="chunk is 0"):
        vgrad.sweep_statistics(relu, GRID, chunk=0, **OPTIONS)
    with pytest.raises(ValueError, match="the grid is empty"):
        vgrad.sweep_statistics(relu, {}, **OPTIONS)
