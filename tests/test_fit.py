"""Rates and their errors, against draws whose distribution is known."""

import numpy as np
import pytest

from vgrad import fit
from vgrad.base import Estimate


def ramp(rates, depth, offset=0.0):
    """log_delta [P=1, S, D=1, L] of networks that change by `rates` [S, L-2] per hidden step toward the input."""
    up = np.concatenate([np.cumsum(rates[:, ::-1], axis=1)[:, ::-1], np.zeros((len(rates), 1))], axis=1)
    return np.concatenate([up + offset, np.full((len(rates), 1), 99.0)], axis=1)[None, :, None]


def test_recovers_a_constant_rate_exactly_and_leaves_the_readout_out():
    rate = fit.decay_rate(ramp(np.full((4, 8), -0.7), 10, offset=-1e6), [10])
    for mean in rate:
        np.testing.assert_allclose(mean.value, -0.7, rtol=1e-9)
        np.testing.assert_allclose(mean.stderr, 0, atol=1e-9)


def test_both_means_and_errors_against_a_lognormal():
    """ln ||delta_1|| ~ N(mu, s^2), so ln(E ||delta||^2) / 2 = mu + s^2: closed form."""
    rng, mu, s, steps = np.random.default_rng(0), -3.0, 0.4, 5
    draws = rng.normal(mu, s, (500, 400))  # points play the part of repeated experiments with 400 seeds
    log_delta = np.zeros((500, 400, 1, steps + 2))
    log_delta[:, :, 0, 0] = draws
    rate = fit.decay_rate(log_delta, [steps + 2])
    for mean, expected in ((rate.mean_log, mu), (rate.log_mean_sq, mu + s**2)):
        value, stderr = mean.value[:, 0] * steps, mean.stderr[:, 0] * steps
        assert abs(value.mean() - expected) < 4 * value.std() / np.sqrt(500) + 2 * s**4 / 400  # the jackknifed mean's own bias
        np.testing.assert_allclose(stderr.mean(), value.std(), rtol=0.1)  # the errors are as large as the scatter they predict


def test_layers_can_be_left_out():
    rates = np.full((3, 8), -0.5)
    rates[:, :2] = 7.0  # a transient at the input
    log_delta = ramp(rates, 10)
    np.testing.assert_allclose(fit.decay_rate(log_delta, [10], first=3).mean_log.value, -0.5)
    np.testing.assert_allclose(fit.decay_rate(log_delta, [10], first=1, last=3).mean_log.value, 7.0)


def test_zero_nan_and_one_seed():
    log_norm = np.array([[0.0, -np.inf], [0.0, np.nan], [1.0, 2.0]])  # [P, S]
    typical, mean_sq = fit.mean_log(log_norm), fit.log_mean_sq(log_norm)
    assert typical.value[0] == -np.inf
    np.testing.assert_allclose(mean_sq.value[0], 0.5 * np.log(0.5))
    assert np.isnan(typical.value[1])
    assert np.isnan(mean_sq.value[1])
    np.testing.assert_allclose(typical.stderr[2], 0.5)
    one = fit.mean_log(log_norm[:, :1])
    assert np.isnan(one.stderr).all()
    assert np.isnan(fit.log_mean_sq(log_norm[:, :1]).stderr).all()
    assert fit.log_mean_sq(np.full((1, 3), -np.inf)).value[0] == -np.inf


def test_the_mean_square_at_any_magnitude():
    log_norm = np.random.default_rng(1).normal(size=(1, 20))
    for offset in (-1e5, 1e5):
        np.testing.assert_allclose(fit.log_mean_sq(log_norm + offset).value, fit.log_mean_sq(log_norm).value + offset)
        np.testing.assert_allclose(fit.log_mean_sq(log_norm + offset).stderr, fit.log_mean_sq(log_norm).stderr, rtol=1e-6)


def test_depth_scale_is_that_of_the_squared_norm():
    scale = fit.depth_scale(Estimate(0.5 * np.log(0.9), 1e-5))
    np.testing.assert_allclose(scale.value, -1 / np.log(0.9))
    step = 1e-6
    slope = (fit.depth_scale(Estimate(-0.05 + step, 0)).value - fit.depth_scale(Estimate(-0.05 - step, 0)).value) / (2 * step)
    np.testing.assert_allclose(fit.depth_scale(Estimate(-0.05, 1e-3)).stderr, abs(slope) * 1e-3, rtol=1e-6)


@pytest.mark.parametrize(
    ("log_delta", "depths", "options", "message"),
    [
        (np.zeros((2, 3)), [3], {}, r"expected \[P, S, D, L\]"),
        (np.zeros((1, 2, 2, 5)), [5], {}, r"expected \(2,\)"),
        (np.zeros((1, 2, 1, 2)), [2], {}, "depth 2 has no step"),
        (np.zeros((1, 2, 1, 5)), [5], {"first": 4}, "leave it out"),
        (np.zeros((1, 2, 1, 5)), [5], {"last": 5}, "first < last < depth"),
    ],
)
def test_bad_input(log_delta, depths, options, message):
    with pytest.raises(ValueError, match=message):
        fit.decay_rate(log_delta, depths, **options)
