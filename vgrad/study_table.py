"""What a study found: a verdict for every combination of activation and initialization, and the table that is printed.

The verdict goes by the change of the signal over the hidden layers of the typical network at the greatest depth,

    ||delta_1|| / ||delta_{L-1}||  <  0.1 vanishes,   > 10 explodes,   between them it holds.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vgrad import fit

if TYPE_CHECKING:
    import xarray

__all__ = ["Row", "decimal", "table", "verdict", "verdicts"]


class Row(NamedTuple):
    """The verdict on one combination at the greatest depth.

    Attributes:
      phi, init, sigma_w: which.
      verdict: "vanishes", "holds" or "explodes", as ||delta_1|| / ||delta_{L-1}|| of the typical network lies below 0.1, between,
        or above 10; "dead" where it is exactly zero in most seeds; "no reading" where it is NaN.
      rate, stderr: per layer toward the input, in nats, E ln over seeds.
      log_ratio: ln(||delta_1|| / ||delta_{L-1}||), median over seeds.
      log_grad_w1: ln ||dJ/dW_1||, median over seeds.
      plain: the same as plain float32 reports it, median over seeds: a number, not a logarithm; NaN if it is NaN in any seed.
    """

    phi: str
    init: str
    sigma_w: float
    verdict: str
    rate: float
    stderr: float
    log_ratio: float
    log_grad_w1: float
    plain: float


def verdicts(dataset: "xarray.Dataset") -> list[Row]:
    """A verdict for every combination of a study, in its order."""
    depth = int(dataset.depth[-1])
    at_depth = dataset.isel(depth=-1)
    delta = at_depth.log_delta.transpose("phi", "init", "seed", "layer").values
    num_phi, num_init = delta.shape[:2]
    rates = fit.decay_rate(delta.reshape(-1, delta.shape[2], 1, delta.shape[3]), [depth]).mean_log
    rows = []
    for n, (i, j) in enumerate(np.ndindex(num_phi, num_init)):
        with np.errstate(invalid="ignore"):
            change = delta[i, j, :, 0] - delta[i, j, :, depth - 2]
        log_ratio = float(np.median(np.where(np.isneginf(delta[i, j, :, 0]), -np.inf, change)))
        rows.append(
            Row(
                phi=str(dataset.phi.values[i]),
                init=str(dataset.init.values[j]),
                sigma_w=float(dataset.sigma_w[i, j]),
                verdict=verdict(log_ratio),
                rate=float(rates.value[n, 0]),
                stderr=float(rates.stderr[n, 0]),
                log_ratio=log_ratio,
                log_grad_w1=float(np.median(at_depth.log_grad_w.values[i, j, :, 0])),
                plain=float(np.median(at_depth.plain_float32_grad_w1.values[i, j])),
            )
        )
    return rows


def verdict(log_ratio: float) -> str:
    """The word for a ln(||delta_1|| / ||delta_{L-1}||), with the thresholds of `Row`."""
    if math.isnan(log_ratio):
        return "no reading"
    if math.isinf(log_ratio):
        return "dead"
    return "vanishes" if log_ratio < -math.log(10) else "explodes" if log_ratio > math.log(10) else "holds"


def table(dataset: "xarray.Dataset") -> str:
    """The verdicts as a table to print."""
    depth = int(dataset.depth[-1])
    head = ["phi", "init", "sigma_w", "gradient", "rate per layer", "first/last hidden", "||dW_1||", "plain float32 says"]
    rows = [
        [r.phi, r.init, f"{r.sigma_w:.3g}", r.verdict, f"{r.rate:+.3f} ± {r.stderr:.3f}", decimal(r.log_ratio),
         decimal(r.log_grad_w1), _plain(r)] for r in verdicts(dataset)
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    title = f"Depth {depth}, {dataset.sizes['seed']} seeds; rate: change of ln ||delta|| per layer toward the input ± s.e."
    return "\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:]])


def decimal(ln: float) -> str:
    """e^ln in decimal notation, however large or small: -1000 is 5.1e-435."""
    if not math.isfinite(ln):
        return "0" if ln < 0 else str(ln)
    exponent = math.floor(ln / math.log(10))
    mantissa, carry = f"{math.exp(ln - exponent * math.log(10)):.1e}".split("e")
    return f"{mantissa}e{exponent + int(carry):+d}"


def _plain(row):
    if math.isnan(row.plain):
        return "nan"
    if row.plain == 0 or math.isinf(row.plain):
        return f"{row.plain:.0f}"
    off = math.log(row.plain) - row.log_grad_w1
    return f"{decimal(math.log(row.plain))}" + ("" if abs(off) < 0.01 else f" (off by {math.expm1(off):+.0%})")
