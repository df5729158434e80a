"""Glorot & Bengio, 2010, figures 6 and 7: the back-propagated gradient on its way through a tanh network at initialization.

    standard heuristic  W ~ U[-1, 1] / sqrt(n): n Var W = 1/3,     normalized  W ~ U[-1, 1] sqrt(6 / (2 n)): n Var W = 1  (eq. 16)

Claims: with the heuristic ||delta_l|| falls toward the input and ||h_l|| toward the output, each by about ln(1/3) / 2 = -0.549 per
layer, and ||dJ/dW_l|| stays, because what one lost the other has (section 4.2.1, eq. 14). Normalized, all of them should stay; but
those equations are of the linear regime, and where tanh bends the gradient still falls, in the first five layers by up to 0.25 per
layer, then ever less. Five hidden layers of 1000 units are here 5, 20 and 50 of 256; data are the digits. Half a minute on a CPU.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from vgrad import data, fit, losses, mlp, sweep


@dataclass(frozen=True)
class Config:
    width: int = 256
    hidden_layers: tuple[int, ...] = (5, 20, 50)
    num_seeds: int = 16
    batch: int = 100


PAPER, TINY = Config(), Config(width=64, hidden_layers=(5, 20), num_seeds=8, batch=32)
SCHEMES = {"heuristic": 3**-0.5, "normalized": 1.0}  # sigma_w = sqrt(n Var W)


class Result(NamedTuple):
    hidden_layers: tuple[int, ...]
    rates: dict  # scheme -> per number of hidden layers: (rate of ||delta||, its s.e., of ||h|| upward, of ||dW|| toward the input)
    profiles: dict  # scheme -> "delta", "h", "grad_w" -> per number of hidden layers: E ln of the norm by hidden layer


def run(config: Config) -> Result:
    depths = [n + 1 for n in config.hidden_layers]
    family = lambda point: mlp(config.width, "tanh", 64, 10, sigma_w=point["sigma_w"], weights="uniform")  # noqa: E731
    options = dict(num_seeds=config.num_seeds, batch=data.digits().batch(config.batch, 0), loss=losses.cross_entropy)
    swept = sweep(family, {"sigma_w": list(SCHEMES.values())}, key=jax.random.key(0), depths=depths, **options)
    rate = fit.decay_rate(swept.log_delta, depths).mean_log
    rates, profiles = {}, {}
    for p, scheme in enumerate(SCHEMES):
        fields = {"delta": swept.log_delta, "h": swept.log_h, "grad_w": swept.log_grad_w}
        means = {k: [f[p, :, i, :n].mean(axis=0) for i, n in enumerate(config.hidden_layers)] for k, f in fields.items()}
        slope = lambda line: float(np.polyfit(np.arange(len(line)), line, 1)[0])  # noqa: E731
        rates[scheme] = [
            (float(rate.value[p, i]), float(rate.stderr[p, i]), slope(means["h"][i]), -slope(means["grad_w"][i][1:]))
            for i in range(len(depths))
        ]  # W_1 has another fan-in, so another gradient: dJ/dW is compared from layer 2 on
        profiles[scheme] = {k: [line.tolist() for line in lines] for k, lines in means.items()}
    return Result(config.hidden_layers, rates, profiles)


def check(result: Result) -> None:
    for rate, error, up, grad_w in result.rates["heuristic"]:
        assert abs(rate - np.log(1 / 3) / 2) < 0.06 + 4 * error, rate
        assert abs(up - np.log(1 / 3) / 2) < 0.1, up
        assert abs(grad_w) < 0.1 * abs(rate), grad_w
    normalized = result.rates["normalized"]
    assert all(-0.25 < a[0] < b[0] < 0 for a, b in pairwise(normalized)), normalized
    for old, (rate, error, up, grad_w) in zip(result.rates["heuristic"], normalized, strict=True):
        assert rate > 0.4 * old[0] + 4 * error, rate
        assert up > 0.4 * old[2], up
        assert abs(grad_w) < 0.1, grad_w


def main() -> None:
    result, folder = run(PAPER), Path("results")
    check(result)
    print(f"{__doc__}\n{'scheme':12}{'hidden layers':>14}{'rate of delta':>20}{'of h, upward':>14}{'of dW':>10}")
    for scheme, rows in result.rates.items():
        for n, (rate, error, up, grad_w) in zip(result.hidden_layers, rows, strict=True):
            print(f"{scheme:12}{n:14}{rate:+12.4f} ± {error:.4f}{up:+14.4f}{grad_w:+10.4f}")
    folder.mkdir(exist_ok=True)
    (folder / "glorot2010_gradient_profiles.json").write_text(json.dumps(result._asdict(), indent=1))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    labels = {"delta": r"\delta_l", "h": "h_l", "grad_w": "dJ/dW_l"}
    for ax, (name, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for scheme, style, colour in zip(SCHEMES, ("-o", "--s"), ("C0", "C1"), strict=True):
            for i, n in enumerate(result.hidden_layers):
                line = result.profiles[scheme][name][i]
                ax.plot(range(1, n + 1), line, style, color=colour, markersize=2.5, label=scheme if i == 0 else None)
        ax.set(xlabel="hidden layer (1 = nearest the input)", title=rf"$\ln\,\|{label}\|$")
    ax.legend()
    figure.suptitle("Gradients at initialization, tanh: standard heuristic and normalized initialization")
    figure.savefig(folder / "glorot2010_gradient_profiles.png", dpi=130)


if __name__ == "__main__":
    main()
