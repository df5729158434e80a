"""He et al., 2015 (arXiv:1502.01852), section 2.2: the initialization that keeps a rectifier network's gradient, and trains it.

Claims, per layer toward the input, of ln(E||delta||^2) / 2: with Xavier's n Var W = 1 it falls by ln(2) / 2 = 0.3466; with n Var W
= 2 (eq. 14), and for a leaky slope a with n Var W = 2 / (1 + a^2) (eq. 15), it stays, within four standard errors and 5 / (4 n):
so much width n leaves open, since the loss sees the same weights forward. The typical network, E ln||delta||, lies below.
And figure 3: at 30 layers plain gradient descent trains the second network and stalls on the first, at the best of several
learning rates for each. A minute on a CPU.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from vgrad import data, fit, losses, mlp, sweep


@dataclass(frozen=True)
class Config:
    width: int = 128
    depths: tuple[int, ...] = (22, 30, 100)  # the paper's two, and beyond
    num_seeds: int = 64
    trained_width: int = 64
    steps: int = 600
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    trained_seeds: int = 3


PAPER, TINY = Config(), Config(64, (22,), 16, 32, 350, (0.03,), 2)
SCHEMES = {
    "xavier": {"slope": 0.0, "sigma_w": 1.0},
    "he": {"slope": 0.0, "sigma_w": 2**0.5},
    "he, leaky 0.25": {"slope": 0.25, "sigma_w": (2 / (1 + 0.25**2)) ** 0.5},
}
EXPECTED = {"xavier": -np.log(2) / 2, "he": 0.0, "he, leaky 0.25": 0.0}


class Result(NamedTuple):
    width: int
    depths: tuple[int, ...]
    rates: dict  # scheme -> per depth: (rate of the mean square, s.e., rate of the typical network, s.e.)
    losses: dict  # "xavier", "he" -> learning rate -> cross-entropy by step, mean over seeds


def rectifier(width, point):
    return mlp(width, lambda z: jnp.where(z > 0, z, point["slope"] * z), 64, 10, sigma_w=point["sigma_w"])


def train(point, config, x, t):
    """Loss by step [learning rate, step] of plain gradient descent at depth 30, mean over seeds."""
    net = rectifier(config.trained_width, point)
    slope = jax.value_and_grad(lambda p: losses.cross_entropy(net.forward(p, x), t))

    def one(learning_rate, key):
        optimizer = optax.sgd(learning_rate)

        def step(state, _):
            loss, grads = slope(state[0])
            updates, memory = optimizer.update(grads, state[1])
            return (optax.apply_updates(state[0], updates), memory), loss

        params = net.init(key, 30)
        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=config.steps)[1]

    keys = jax.random.split(jax.random.key(1), config.trained_seeds)
    curves = jax.vmap(lambda rate: jax.vmap(lambda key: one(rate, key))(keys))(jnp.array(config.learning_rates))
    return jnp.mean(curves, axis=1)


def run(config: Config) -> Result:
    x, t = data.digits().batch(100, 0)
    options = dict(num_seeds=config.num_seeds, depths=config.depths, batch=(x, t), loss=losses.cross_entropy)
    swept = sweep(lambda point: rectifier(config.width, point), list(SCHEMES.values()), key=jax.random.key(0), **options)
    both = fit.decay_rate(swept.log_delta, config.depths)
    rows = np.stack([*both.log_mean_sq, *both.mean_log], axis=-1)
    trained = jax.jit(lambda point: train(point, config, x, t))
    curves = {scheme: trained(SCHEMES[scheme]) for scheme in ("xavier", "he")}
    table = {s: dict(zip(map(str, config.learning_rates), np.asarray(c).tolist(), strict=True)) for s, c in curves.items()}
    return Result(config.width, config.depths, dict(zip(SCHEMES, rows.tolist(), strict=True)), table)


def best(curves):
    """The learning rate with the least final loss (NaN where it diverged), and that loss."""
    return min(((rate, curve[-1]) for rate, curve in curves.items() if np.isfinite(curve[-1])), key=lambda pair: pair[1])


def check(result: Result) -> None:
    for scheme, rows in result.rates.items():
        for depth, (mean_sq, error, typical, _) in zip(result.depths, rows, strict=True):
            if depth <= 30:  # beyond, rare networks carry the mean, and a sample of seeds does not hold them
                assert abs(mean_sq - EXPECTED[scheme]) < 4 * error + 1.25 / result.width, (scheme, depth, mean_sq, error)
            assert typical < mean_sq, (scheme, depth)
    assert best(result.losses["xavier"])[1] > 2.2 > 1.5 > best(result.losses["he"])[1], [best(c) for c in result.losses.values()]


def main() -> None:
    result, folder = run(PAPER), Path("results")
    check(result)
    print(f"{__doc__}\n{'scheme':16}{'depth':>6}{'ln(E||delta||^2)/2':>22}{'expected':>10}{'E ln||delta||':>20}")
    for scheme, rows in result.rates.items():
        for depth, (mean_sq, e, typical, f) in zip(result.depths, rows, strict=True):
            print(f"{scheme:16}{depth:6}{mean_sq:+13.4f} ± {e:.4f}{EXPECTED[scheme]:+10.4f}{typical:+13.4f} ± {f:.4f}")
    print(*(f"{s}: best learning rate {best(c)[0]}, cross-entropy {best(c)[1]:.4f}" for s, c in result.losses.items()), sep="\n")
    folder.mkdir(exist_ok=True)
    (folder / "he2015_relu_depth.json").write_text(json.dumps(result._asdict(), indent=1))
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.subplots()
    for (scheme, curves), style in zip(result.losses.items(), ("--", "-"), strict=True):
        ax.plot(curves[best(curves)[0]], style, color="black", label=f"{scheme}, learning rate {best(curves)[0]}")
    ax.set(xlabel="step of gradient descent", ylabel="cross-entropy, nats", title="A relu network of 30 layers on the digits")
    ax.legend()
    figure.savefig(folder / "he2015_relu_depth.png", dpi=130)


if __name__ == "__main__":
    main()
