"""Hanin, 2018 (arXiv:1801.03744), and Hanin & Nica, 2019 (arXiv:1812.05994): depth over width rules the spread of gradients.

Claims, for relu networks with He's initialization, hidden widths n_l and beta = sum_l 1 / n_l, of X = ||dJ/dW_1||^2 per unit of
||dJ/dy||^2 and ||x||^2, over seeds. Var ln X = 5 beta to first order, so that of two networks of the same depth the wider has less
of it, and networks of the same beta have the same whatever their depth: |Var ln X - 5 beta| < 4 s.e. + 30 beta / n (the next order
is 18.5 beta / n). The mean does not move, |ln E X| < 4 s.e. for beta <= 1/4 (beyond, rare networks carry it); the typical network
falls by half the variance, |E ln X + 5 beta / 2| < 4 s.e. + 6 beta / n. The exact law of vgrad.finite_width is met within 4 s.e.
alone. Half a minute on a CPU.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vgrad import finite_width, fit, losses, mlp, sweep


@dataclass(frozen=True)
class Config:
    widths: tuple[int, ...] = (32, 64, 128)
    betas: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)  # hidden layers over width
    num_seeds: int = 4000


PAPER, TINY = Config(), Config((16, 32), (1 / 8, 1 / 4, 1 / 2), 300)


class Row(NamedTuple):
    """One shape of network; estimates with their standard errors."""

    width: int
    hidden: int
    variance: tuple[float, float]
    mean_log: tuple[float, float]
    log_mean: tuple[float, float]
    exact: tuple[float, float]  # Var ln X and E ln X by theory


def measure(width, config):
    hidden = [round(beta * width) for beta in config.betas]
    depths = [h + 1 for h in hidden]
    # With two classes dJ/dy always has the direction (1, -1): it does not look at the weights.
    x, t = jax.random.normal(jax.random.key(1), (1, 16)), jnp.array([0])
    swept = sweep(
        lambda point: mlp(width, "relu", 16, 2, sigma_w=point["sigma_w"]), {"sigma_w": [2**0.5]},
        key=jax.random.key(0), num_seeds=config.num_seeds, depths=depths, batch=(x, t), loss=losses.cross_entropy,
    )  # fmt: skip
    top = np.stack([swept.log_delta[:, :, i, d - 1] for i, d in enumerate(depths)], axis=-1)
    log_norm = swept.log_grad_w[..., 0] - top - 0.5 * np.log(np.sum(np.square(x)))  # [1, S, D]
    typical, mean = (np.stack(e)[:, 0] * 2 for e in (fit.mean_log(log_norm), fit.log_mean_sq(log_norm)))
    log_square = 2 * log_norm[0]
    deviation = np.square(log_square - log_square.mean(0))
    variance = np.stack([log_square.var(0, ddof=1), deviation.std(0) / config.num_seeds**0.5])
    step = finite_width.relu_step(width, sigma_w=2**0.5)
    exact = np.outer(hidden, [step.variance, step.mean_log])
    rows = (variance.T, typical.T, mean.T, exact)
    return [Row(width, h, *(tuple(r[i].tolist()) for r in rows)) for i, h in enumerate(hidden)]


def run(config: Config) -> list[Row]:
    return [row for width in config.widths for row in measure(width, config)]


def check(result: list[Row]) -> None:
    for row in result:
        beta = row.hidden / row.width
        (variance, error), (typical, its_error), (mean, mean_error) = row.variance, row.mean_log, row.log_mean
        assert abs(variance - row.exact[0]) < 4 * error, row
        assert abs(variance - 5 * beta) < 4 * error + 30 * beta / row.width, row
        assert abs(typical - row.exact[1]) < 4 * its_error, row
        assert abs(typical + 5 * beta / 2) < 4 * its_error + 6 * beta / row.width, row
        assert beta > 1 / 4 or abs(mean) < 4 * mean_error, row
        for other in result:
            if other.hidden == row.hidden and other.width > row.width:
                assert other.variance[0] < variance, (row, other)


def main() -> None:
    result, folder = run(PAPER), Path("results")
    check(result)
    print(f"{__doc__}\n{'width':>5}{'hidden':>7}{'beta':>8}{'Var ln X':>18}{'exact':>8}{'5 beta':>8}", end="")
    print(f"{'E ln X':>18}{'exact':>9}{'ln E X':>18}")
    for width, hidden, (v, e), (m, f), (mean, g), (exact_v, exact_m) in result:
        beta = hidden / width
        print(f"{width:5}{hidden:7}{beta:8.4f}{v:9.3f} ± {e:.3f} {exact_v:8.3f}{5 * beta:8.3f}", end="")
        print(f"{m:+10.3f} ± {f:.3f}{exact_m:+9.3f}{mean:+10.3f} ± {g:.3f}")
    folder.mkdir(exist_ok=True)
    (folder / "hanin2018_width_fluctuations.json").write_text(json.dumps([row._asdict() for row in result], indent=1))
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    depth, beta, mean = figure.subplots(1, 3)
    for width, marker, shade in zip(PAPER.widths, ("o", "s", "^"), ("0.0", "0.4", "0.65"), strict=True):
        rows = [row for row in result if row.width == width]
        hidden, betas = [row.hidden for row in rows], [row.hidden / width for row in rows]
        style = dict(marker=marker, color=shade, label=f"width {width}", linestyle="none", capsize=2, markersize=5)
        for ax, at, field in ((depth, hidden, "variance"), (beta, betas, "variance"), (mean, betas, "mean_log")):
            ax.errorbar(at, *np.transpose([getattr(row, field) for row in rows]), **style)
        depth.plot(hidden, [row.exact[0] for row in rows], "-", color=shade, linewidth=1)
        style |= {"markerfacecolor": "white", "label": None}
        mean.errorbar(betas, *np.transpose([row.log_mean for row in rows]), **style)
    line = np.array([0, max(PAPER.betas)])
    beta.plot(line, 5 * line, "--", color="black", label="5 beta")
    mean.plot(line, -2.5 * line, "--", color="black", label="-5 beta / 2")
    mean.plot(line, 0 * line, ":", color="black", label="no change")
    depth.set(xlabel="hidden layers", ylabel="variance of ln X, nats²", title="Wider is calmer (lines: exact law)")
    beta.set(xlabel="beta = hidden layers / width", ylabel="variance of ln X, nats²", title="Only beta matters (bars: one s.e.)")
    mean.set(xlabel="beta = hidden layers / width", ylabel="nats", title="E ln X (full) falls, ln E X (open) stays")
    depth.legend()
    beta.legend()
    mean.legend(loc="lower left")
    figure.savefig(folder / "hanin2018_width_fluctuations.png", dpi=130)


if __name__ == "__main__":
    main()
