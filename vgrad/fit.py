"""Decay rates, with standard errors from seeds.

The rate of a network is the mean change of ln ||delta|| per layer on the way to the input, over its hidden layers,

    rate = (ln ||delta_1|| - ln ||delta_{L-1}||) / (L - 2),        negative = vanishing.

The readout step is left out: its width differs. Over seeds there are two means, and they answer different questions:
`mean_log`, E ln ||delta||, is the typical network; `log_mean_sq`, ln(E ||delta||^2) / 2, is what theory predicts, and rare large
gradients rule it. They differ by O(L/N). Errors come from seeds alone, since the layers of one network are correlated.

Everything here runs on the host, in NumPy float64, on the results of `vgrad.sweep`.
"""

from typing import Any, NamedTuple

import numpy as np

from vgrad.base import Estimate

__all__ = ["Rate", "decay_rate", "depth_scale", "log_mean_sq", "mean_log"]

_SEEDS = 1  # the axis of [P, S, D, L], and of [P, S, ...] in general


class Rate(NamedTuple):
    """Change of ln ||delta|| per layer toward the input, in both means; each an `Estimate` of arrays [P, D].

    Attributes:
      mean_log: of the typical network, E ln ||delta||. -inf where any seed's gradient died exactly.
      log_mean_sq: of the mean square, ln(E ||delta||^2) / 2.
    """

    mean_log: Estimate
    log_mean_sq: Estimate


def decay_rate(log_delta, depths, *, first: int = 1, last: int | None = None) -> Rate:
    """The rate of every point and depth, in nats per layer.

    Args:
      log_delta: as from `vgrad.sweep`. Shape [P, S, D, L].
      depths: the D depths of the sweep, each at least 3: depth 2 has no hidden step.
      first, last: which layers the steps are taken between, counted from 1, to leave out transients. Default: 1 and depth - 1.
    Returns:
      `Rate`. NaN where a seed's reading is NaN, or zero at both ends; standard errors are NaN for a single seed.
    Raises:
      ValueError: a shape other than [P, S, D, L], depths that do not match it, or fewer than two layers between first and last.
    """
    log_delta = _four_axes(log_delta)
    depths = np.asarray(depths)
    if depths.shape != log_delta.shape[2:3]:
        raise ValueError(f"depths has shape {depths.shape}, expected {log_delta.shape[2:3]}: one per entry of the axis D.")
    ends = []
    for i, depth in enumerate(depths):
        top = depth - 1 if last is None else last
        if not 1 <= first < top < depth:
            raise ValueError(
                f"depth {depth} has no step between layers {first} and {top}, expected 1 <= first < last < depth: leave it out."
            )
        ends.append(log_delta[:, :, i, [first - 1, top - 1]])
    ends = np.stack(ends, axis=2)  # [P, S, D, 2]
    steps = (depths - 1 if last is None else np.full_like(depths, last)) - first
    with np.errstate(invalid="ignore"):
        typical = mean_log((ends[..., 0] - ends[..., 1]) / steps)
        mean_sq = _jackknife(ends, lambda e: (e[..., 0] - e[..., 1]) / steps)
    return Rate(typical, mean_sq)


def depth_scale(rate: Estimate) -> Estimate:
    """xi = -1 / (2 rate), in layers: the squared gradient changes by a factor e in so many. Negative where it grows.

    The convention of Schoenholz et al., 2017 (arXiv:1611.01232): xi_grad = -1 / ln chi_1, with chi_1 multiplying the squared norm,
    so rate = ln(chi_1) / 2. The error is that of the linearised map and means little once the rate's exceeds half the rate.
    """
    value, stderr = np.asarray(rate.value), np.asarray(rate.stderr)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Estimate(-0.5 / value, 0.5 * stderr / np.square(value))


def mean_log(log_norm) -> Estimate:
    """E ln ||g|| over seeds: the typical network. [P, S, ...] -> `Estimate` [P, ...]; -inf where a seed is exactly zero."""
    log_norm = np.asarray(log_norm, np.float64)
    num = log_norm.shape[_SEEDS]
    with np.errstate(invalid="ignore", divide="ignore"):
        value = log_norm.mean(_SEEDS)
        spread = np.square(log_norm - np.expand_dims(value, _SEEDS)).sum(_SEEDS)
        return Estimate(value, np.sqrt(spread / np.float64(num * (num - 1))) if num > 1 else np.full_like(value, np.nan))


def log_mean_sq(log_norm) -> Estimate:
    """ln(E ||g||^2) / 2 over seeds: what theory predicts. [P, S, ...] -> `Estimate` [P, ...], with jackknife errors.

    A mean of exponentials is ruled by the largest few: with a spread of ln ||g|| over seeds above about 1, neither the value nor
    its error can be trusted, and `mean_log` is the better description.
    """
    return _jackknife(np.asarray(log_norm, np.float64), lambda v: v)


def _jackknife(log_norm, statistic) -> Estimate:
    """statistic(ln(E ||g||^2) / 2) with its error from leaving out each seed in turn. Efron & Stein, 1981, eq. 1.4."""
    num = log_norm.shape[_SEEDS]
    with np.errstate(divide="ignore", invalid="ignore"):
        top = log_norm.max(_SEEDS, keepdims=True)
        square = np.exp(2 * np.where(np.isneginf(log_norm), -np.inf, log_norm - top))
        total = square.sum(_SEEDS, keepdims=True)
        value = statistic(_log_root(total / num, top).squeeze(_SEEDS))
        if num < 2:
            return Estimate(value, np.full_like(value, np.nan))
        # The rest is summed without the one left out: a difference from the total would cancel where one seed holds nearly all.
        rest = np.stack([np.delete(square, s, _SEEDS).sum(_SEEDS) for s in range(num)], _SEEDS) / (num - 1)
        without = np.moveaxis(_log_root(rest, top), _SEEDS, 0)
        without = np.stack([statistic(w) for w in without])
        error: Any = np.sqrt((num - 1) / num * np.square(without - without.mean(0)).sum(0))
    return Estimate(value, error)


def _log_root(mean_sq, top):
    return 0.5 * np.log(mean_sq) + top


def _four_axes(log_norm):
    log_norm = np.asarray(log_norm, np.float64)
    if log_norm.ndim != 4:
        raise ValueError(f"log_delta has shape {log_norm.shape}, expected [P, S, D, L] as vgrad.sweep gives it.")
    return log_norm
