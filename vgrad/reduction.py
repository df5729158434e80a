"""Statistics of a sweep over any number of seeds, in the memory of a few: profiles are reduced chunk by chunk on the device.

A **tally** of a chunk holds, for every field of the profile, point, depth and layer, with x = ln of the norm,

    n,  mean x,  sum (x - mean)^2,  max x,  sum e^{2(x - max)},  sum e^{4(x - max)},  a histogram,

and two tallies merge into the tally of both (Chan, Golub & LeVeque, 1983, for the second line of moments). From it come the two
means that `vgrad.fit` keeps apart, E x and ln(E e^{2x}) / 2, with standard errors from seeds. The second is a mean of exponentials,
which few networks may carry; how many, in effect, is

    n_eff = (sum e^{2x})^2 / sum e^{4x},

and where that is small neither this mean nor its error can be trusted, however many networks were measured.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vgrad.base import Array, Estimate, Profile
from vgrad.profile import Readings, check_depths
from vgrad.scaled import LogNorm, log_ratio
from vgrad.sweep import Family, by_seed, check_count, measurement

__all__ = ["QUANTILES", "Statistics", "sweep_statistics"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NUM_BINS = 64
FEW = 10  # effective networks


class Statistics(NamedTuple):
    """Statistics over seeds of a sweep. Every field is a `Profile` whose fields are arrays [P, D, L], or `Estimate`s of such.

    NaN past a network's last layer. Networks whose reading is NaN (or inf, of a gain from exactly zero) are left out and counted.

    Attributes:
      num: how many networks have a reading, zeros included.
      num_zero: how many read exactly zero.
      num_nan: how many have none.
      mean_log: `Estimate` of E ln ||g||, the typical network. -inf where one is exactly zero.
      variance: Var ln ||g|| of those that are not zero.
      log_mean_sq: `Estimate` of ln(E ||g||^2) / 2, what theory predicts.
      effective: n_eff, how many networks carry `log_mean_sq`.
      quantiles: of ln ||g||, at `QUANTILES`: arrays [5, P, D, L]. Read off a histogram, so within a fifth of the spread of the
        first chunk at worst.
    """

    num: Profile
    num_zero: Profile
    num_nan: Profile
    mean_log: Profile
    variance: Profile
    log_mean_sq: Profile
    effective: Profile
    quantiles: Profile


def sweep_statistics(
    family: Family,
    grid: Mapping[str, Sequence] | Sequence[Mapping[str, Any]],
    *,
    key: Array,
    num_seeds: int,
    depths: Sequence[int],
    batch: tuple[Any, Any],
    loss: Callable,
    first_seed: int = 0,
    chunk: int = 64,
    on_chunk: Callable[[int], None] = lambda seeds: None,
    **options: Any,
) -> Statistics:
    """`vgrad.sweep` reduced over its seeds on the fly; the raw profiles are never held.

    Args:
      family, grid, key, num_seeds, depths, batch, loss, first_seed: as for `vgrad.sweep`: the same networks.
      chunk: seeds that are measured between two reductions, at most: they are cut as evenly as can be, and one compiled program
        serves all. Bins of the quantiles are laid by the first chunk: not below 8 or so.
      on_chunk: called after each chunk with its number of seeds.
      options: nested, batch_size and mesh, as for `vgrad.sweep`.
    Returns:
      `Statistics`. A RuntimeWarning says where fewer than ten effective networks carry `log_mean_sq`.
    Raises:
      ValueError, TypeError: as `vgrad.sweep`; chunk below 1.
    """
    check_count("num_seeds", num_seeds)
    check_count("chunk", chunk)
    measure, shape = measurement(family, grid, key=key, depths=depths, batch=batch, loss=loss, **options)
    chunk = math.ceil(num_seeds / math.ceil(num_seeds / chunk))
    total = bins = waiting = None
    for start in range(0, num_seeds, chunk):
        seeds = first_seed + np.arange(start, min(start + chunk, num_seeds))
        readings = measure(seeds, room=chunk)
        bins = _bins(readings, len(seeds), shape) if bins is None else bins
        tally = _tally(readings, len(seeds), shape, bins)
        # The device works on this chunk while the host adds up the last.
        total, waiting = _with(total, waiting), tally
        on_chunk(len(seeds))
    bins = jax.tree.map(lambda a: np.asarray(a, np.float64), jax.device_get(bins))
    statistics = _finish(_with(total, waiting), bins, check_depths(depths))
    _warn_if_few(statistics)
    return statistics


class _Bins(NamedTuple):
    """Where ln of the norms lies, from the first chunk; arrays [F, P, D, L] over the F fields of a profile.

    `reference` is in powers of two, and taken off before any logarithm: float32 is then as precise at e^-1000 as at 1.
    """

    reference: Any
    low: Any
    width: Any


class _Tally(NamedTuple):
    """Arrays [F, P, D, L], x relative to the reference; `histogram` [F, P, D, L, NUM_BINS], its first and last bin open."""

    num: Any
    num_zero: Any
    num_nan: Any
    mean: Any
    spread: Any
    least: Any
    most: Any
    first: Any  # sum e^{2(x - most)}
    second: Any  # sum e^{4(x - most)}
    histogram: Any


def _fields(readings: Readings, num_seeds, shape):
    """Fields of `Profile` as pairs of numbers whose ratio is meant, each sumsq and exponent [P, S, D, L]; a norm is over 1."""
    r = jax.tree.map(lambda a: by_seed(a, num_seeds, shape), readings)
    above = lambda n: LogNorm(*(jnp.roll(a, -1, axis=-1) for a in n))  # noqa: E731
    one = LogNorm(jnp.ones_like(r.h.sumsq), jnp.zeros_like(r.h.sumsq))
    return [
        (r.delta, one), (r.grad_w, one), (r.grad_b, one), (r.h, one),
        (above(r.delta_in), above(r.delta)), (r.delta, above(r.delta_in)),
    ]  # fmt: skip


@partial(jax.jit, static_argnums=(1, 2))
def _bins(readings, num_seeds, shape):
    exponents, values = [], []
    for top, bottom in _fields(readings, num_seeds, shape):
        exponent = jnp.where(top.sumsq > 0, top.exponent - bottom.exponent, -jnp.inf).max(axis=1)
        exponents.append(jnp.where(jnp.isfinite(exponent), exponent, 0))
        values.append(_relative(top, bottom, exponents[-1]))
    x = jnp.stack(values)
    good = jnp.isfinite(x)
    num = jnp.maximum(jnp.sum(good, axis=2), 1).astype(x.dtype)
    mean = jnp.sum(jnp.where(good, x, 0), axis=2) / num
    std = jnp.sqrt(jnp.sum(jnp.where(good, jnp.square(x - mean[:, :, None]), 0), axis=2) / num)
    width = jnp.where(num > 1, jnp.maximum(std, 1e-5), 0.5) / 5
    return _Bins(jnp.stack(exponents), mean - width * NUM_BINS / 2, width)


def _relative(top, bottom, reference):
    """ln(top / bottom) - reference ln 2, [P, S, D, L]."""
    return log_ratio(top._replace(exponent=top.exponent - reference[:, None]), bottom)


@partial(jax.jit, static_argnums=(1, 2))
def _tally(readings, num_seeds, shape, bins: _Bins) -> _Tally:
    x = jnp.stack([
        _relative(top, bottom, reference)
        for (top, bottom), reference in zip(_fields(readings, num_seeds, shape), bins.reference, strict=True)
    ])  # fmt: skip
    zero, good = jnp.isneginf(x), jnp.isfinite(x)
    nan = ~(zero | good)
    count = lambda which: jnp.sum(which, axis=2).astype(x.dtype)  # noqa: E731
    total = lambda v: jnp.sum(jnp.where(good, v, 0), axis=2)  # noqa: E731
    mean = total(x) / jnp.maximum(count(good), 1)
    most = jnp.where(good, x, -jnp.inf).max(axis=2)
    weight = jnp.exp(2 * jnp.where(good, x - most[:, :, None], -jnp.inf))
    which = jnp.clip(jnp.floor((x - bins.low[:, :, None]) / bins.width[:, :, None]), 0, NUM_BINS - 1)
    which = jnp.where(good, which, -1).astype(jnp.int32)  # -1 is in no bin

    def add(histogram, which):  # seed by seed, or the comparisons of all would have to be held
        return histogram + jax.nn.one_hot(which, NUM_BINS, dtype=x.dtype), None

    histogram, _ = jax.lax.scan(add, jnp.zeros((*mean.shape, NUM_BINS), x.dtype), jnp.moveaxis(which, 2, 0))
    return _Tally(
        count(good), count(zero), count(nan), mean, total(jnp.square(x - mean[:, :, None])),
        jnp.where(good, x, jnp.inf).min(axis=2), most, jnp.sum(weight, axis=2), jnp.sum(jnp.square(weight), axis=2), histogram,
    )  # fmt: skip


def _with(a: Any, b: Any) -> Any:
    """The tally of what is in either, on the host and in float64. The histogram, the most of it, is added to that of `a`."""
    if b is None:
        return a
    b = jax.device_get(b)
    if a is None:
        return jax.tree.map(lambda v: np.array(v, np.float64), b)
    num, most = a.num + b.num, np.maximum(a.most, b.most)
    share = b.num / np.maximum(num, 1)
    with np.errstate(invalid="ignore"):
        ours, theirs = (np.where(t.num > 0, np.exp(2 * (t.most - most)), 0) for t in (a, b))
    return _Tally(
        num, a.num_zero + b.num_zero, a.num_nan + b.num_nan, a.mean + (b.mean - a.mean) * share,
        a.spread + b.spread + np.square(b.mean - a.mean) * a.num * share, np.minimum(a.least, b.least), most,
        a.first * ours + b.first * theirs, a.second * ours**2 + b.second * theirs**2,
        np.add(a.histogram, b.histogram, out=a.histogram),
    )  # fmt: skip


def _finish(t: Any, bins: Any, depths) -> Statistics:
    raise_by, num = bins.reference * np.log(2), t.num + t.num_zero
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(t.num_zero > 0, -np.inf, t.mean + raise_by)
        variance = t.spread / (t.num - 1)
        typical = mean, np.sqrt(variance / t.num)
        share = t.first / num
        error = 0.5 * np.sqrt(np.maximum(t.second / num - np.square(share), 0) / (num - 1)) / share
        mean_sq = np.where(t.num > 0, t.most + raise_by + 0.5 * np.log(share), -np.inf), error
        effective = np.where(t.num > 0, np.square(t.first) / t.second, 0)
        quantiles = [raise_by + q for q in _quantiles(t, bins)]
    last = np.asarray(depths)[:, None] - np.array([0, 0, 0, 0, 1, 1])[:, None, None]  # the gains have no last layer
    outside = (np.arange(1, num.shape[-1] + 1) > last)[:, None]
    mask = lambda a: np.where(outside | (num == 0), np.nan, a)  # noqa: E731
    profile = Profile._make
    counts = (profile(np.where(outside, np.nan, a)) for a in (num, t.num_zero, t.num_nan))
    typical, mean_sq = (profile(map(Estimate, *map(mask, pair))) for pair in (typical, mean_sq))
    quantiles = profile(np.stack([mask(q) for q in quantiles], axis=1))
    return Statistics._make([*counts, typical, profile(mask(variance)), mean_sq, profile(mask(effective)), quantiles])


def _quantiles(t, bins):
    """[F, P, D, L] each, relative to the reference: zeros first, then the histogram, evenly filled from edge to edge."""
    upto = t.num_zero[..., None] + np.cumsum(t.histogram, axis=-1)
    edges = bins.low[..., None] + bins.width[..., None] * np.arange(NUM_BINS + 1)
    edges[..., 0], edges[..., -1] = np.minimum(t.least, edges[..., 0]), np.maximum(t.most, edges[..., -1])
    for p in QUANTILES:
        target = p * (t.num + t.num_zero)
        at = np.argmax(upto >= target[..., None], axis=-1, keepdims=True)
        pick = lambda a, at=at: np.take_along_axis(a, at, axis=-1)[..., 0]  # noqa: E731
        low, high = np.maximum(pick(edges[..., :-1]), t.least), np.minimum(pick(edges[..., 1:]), t.most)
        value = low + (high - low) * (target - (pick(upto) - pick(t.histogram))) / pick(t.histogram)
        yield np.where(target <= t.num_zero, np.where(t.num_zero > 0, -np.inf, t.least), value)


def _warn_if_few(statistics):
    few = np.stack(statistics.effective) < np.minimum(FEW, np.stack(statistics.num) / 2)
    if few.any():
        field, point, depth, layer = np.argwhere(few)[0]
        warnings.warn(
            f"log_mean_sq is carried by fewer than {FEW} effective networks at {few.sum()} places, the first of them "
            f"{Profile._fields[field]}[{point}, {depth}, {layer}]: its errors cannot be trusted there. mean_log can. "
            "For the mean of the square see vgrad.finite_width, or measure wider networks.",
            RuntimeWarning,
            stacklevel=3,
        )
