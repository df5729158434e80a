"""Klambauer et al., 2017 (arXiv:1706.02515): self-normalizing networks keep their activations, but not quite their gradients.

With selu and Var W = 1 / n (sigma_w = 1, sigma_b = 0), mean 0 and variance 1 are a fixed point of the layers that attracts (theorem
1): here |q* - 1| < 1e-6, |E selu| < 1e-6 and chi_par = 0.7826 < 1, so that lengths return to 1 with a depth scale of 4.1 layers.
But at that point

    chi_1 = E selu'(u)^2 = lambda^2 (1 / 2 + alpha^2 e^2 Phi(-2)) = 1.0716 > 1:

gradients explode slowly, ln(chi_1) / 2 = +0.0346 per layer, a factor e in 29 layers. Claims: the measured rate is that, to 4 s.e.
+ 1.5 / N; the length stays, |ln q_l| < 4 s.e. + 4 / N from layer 20 on, whether it starts at 1/4 or 4. At the
critical sigma_w for sigma_b = 0.2, 0.9375, the gradient stays too. The gain 3/4 that PyTorch gives for selu leads to a length of
0.023 and chi_1 = 1.0037: calm, because the signal has shrunk to where selu is nearly linear. Half a minute on a CPU.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vgrad import activations, fit, gaussian, losses, meanfield, mlp, sweep


@dataclass(frozen=True)
class Config:
    width: int = 256
    depth: int = 100
    num_seeds: int = 48


PAPER, TINY = Config(), Config(64, 32, 24)
POINTS = {"self-normalizing": (1.0, 0.0), "critical": (0.9374756, 0.2), "gain 3/4": (0.75, 0.0)}  # sigma_w, sigma_b
STARTS = (0.25, 4.0)


class Result(NamedTuple):
    """theory: q*, chi_1, chi_par by point; rates: (measured, s.e., theory); log_q and log_delta: (value, s.e.) by layer [L, 2]."""

    theory: dict
    mean: float  # E selu at q = 1
    closed_form: float  # of chi_1
    rates: dict
    log_q: list  # of "self-normalizing", from each of the two starts
    log_delta: dict
    width: int


def run(config: Config) -> Result:
    with jax.enable_x64(True):
        ends = jax.jit(jax.vmap(lambda s: meanfield.asymptotics("selu", sigma_w=s[0], sigma_b=s[1])))(jnp.array([*POINTS.values()]))
        theory = {name: [float(v[i]) for v in (ends.q_star, ends.chi_1, ends.chi_par)] for i, name in enumerate(POINTS)}
        selu = activations.get("selu")
        mean = float(jax.jit(lambda q: gaussian.expect(selu, q, breakpoints=(0.0,)))(1.0))
        at_plus, at_minus = (float(jax.grad(selu)(z)) for z in (1.0, -1e-12))  # lambda, lambda alpha
    closed_form = at_plus**2 / 2 + at_minus**2 * math.e**2 * 0.5 * math.erfc(2**0.5)
    x = jax.random.normal(jax.random.key(1), (8, 32))
    x = x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True))  # of length 1
    swept = sweep(
        lambda point: mlp(config.width, "selu", 32, 4, **point), [{"sigma_w": w, "sigma_b": b} for w, b in POINTS.values()],
        key=jax.random.key(0), num_seeds=config.num_seeds, depths=[config.depth], batch=(x, jnp.arange(8) % 4),
        loss=losses.cross_entropy,
    )  # fmt: skip
    rate = fit.decay_rate(swept.log_delta, [config.depth], first=config.depth // 3, last=config.depth - 3).log_mean_sq
    rates = {n: (*(float(v[i, 0]) for v in rate), math.log(theory[n][1]) / 2) for i, n in enumerate(POINTS)}
    lines = np.stack(fit.log_mean_sq(swept.log_delta[:, :, 0]), axis=-1)
    log_delta = {name: line.tolist() for name, line in zip(POINTS, lines, strict=True)}
    return Result(theory, mean, closed_form, rates, lengths(config, x), log_delta, config.width)


def lengths(config, x):
    """ln of the mean length over networks, with s.e., by layer, for inputs that make z_1 of the length of each start."""
    net = mlp(config.width, "selu", 32, 4)

    @jax.jit
    def measured(keys):
        def one(key):
            params = net.init(key, config.depth)
            z = net.embed.apply(params.embed, jnp.concatenate([start**0.5 * x for start in STARTS]))
            z = jnp.concatenate([z[None], jax.lax.scan(lambda z, p: (net.block.apply(p, z),) * 2, z, params.hidden)[1]])
            return jnp.mean(z.reshape(len(z), len(STARTS), -1) ** 2, axis=-1).T

        return jax.lax.map(one, keys)

    q = np.asarray(measured(jax.random.split(jax.random.key(2), config.num_seeds)), float)
    mean, error = q.mean(axis=0), q.std(axis=0, ddof=1) / config.num_seeds**0.5
    return np.stack([np.log(mean), error / mean], axis=-1).tolist()


def check(result: Result) -> None:
    q, chi_1, chi_par = result.theory["self-normalizing"]
    assert abs(q - 1) < 1e-6, q
    assert abs(result.mean) < 1e-6, result.mean
    assert abs(chi_1 - result.closed_form) < 1e-6, (chi_1, result.closed_form)
    assert abs(chi_1 - 1.07157) < 1e-5, chi_1
    assert chi_par < 0.79, chi_par
    assert abs(result.theory["critical"][1] - 1) < 1e-6, result.theory
    assert abs(result.theory["gain 3/4"][0] - 0.02303) < 1e-5, result.theory
    for rate, error, theory in result.rates.values():
        assert abs(rate - theory) < 4 * error + 1.5 / result.width, result.rates
    rate, error, _ = result.rates["self-normalizing"]
    assert rate > 4 * error, result.rates
    for line in result.log_q:
        value, its_error = np.transpose(line)[:, 20:]
        assert (np.abs(value) < 4 * its_error + 4 / result.width).all(), (value, its_error)


def main() -> None:
    result, folder = run(PAPER), Path("results")
    check(result)
    print(f"{__doc__}\n{'':18}{'q*':>9}{'chi_1':>9}{'chi_par':>9}{'rate per layer':>22}{'ln(chi_1)/2':>13}")
    for name, (rate, error, theory) in result.rates.items():
        q, chi_1, chi_par = result.theory[name]
        print(f"{name:18}{q:9.4f}{chi_1:9.5f}{chi_par:9.4f}{rate:+13.4f} ± {error:.4f}{theory:+13.4f}")
    folder.mkdir(exist_ok=True)
    (folder / "klambauer2017_selu.json").write_text(json.dumps(result._asdict(), indent=1))
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    forward, backward = figure.subplots(1, 2)
    for start, line, style in zip(STARTS, result.log_q, ("-", "--"), strict=True):
        value, error = np.transpose(line)
        forward.errorbar(range(1, len(value) + 1), value, error, linestyle=style, color="black", label=f"from length {start:g}")
    forward.set(xlabel="layer $l$", ylabel=r"$\ln q_l$, nats", title="sigma_w = 1: the length returns to 1 and stays")
    for (name, line), style, shade in zip(result.log_delta.items(), ("-", "--", ":"), ("0.0", "0.3", "0.5"), strict=True):
        value = np.transpose(line)[0]
        layer = np.arange(1, len(value))
        backward.plot(layer, value[:-1] - value[-2], style, color=shade, linewidth=1.6, label=name)
    theory = (layer[-1] - layer) * result.rates["self-normalizing"][2]
    backward.plot(layer, theory, color="0.7", linewidth=4, zorder=0, label="ln(chi_1) / 2 per layer, sigma_w = 1")
    backward.set(xlabel="layer $l$", ylabel=r"$\ln(E\|\delta_l\|^2)/2$, nats (last hidden layer: 0)")
    backward.set_title("Toward the input the gradient grows")
    forward.legend()
    backward.legend(loc="upper right", fontsize=9, bbox_to_anchor=(1, 0.9))
    figure.savefig(folder / "klambauer2017_selu.png", dpi=130)


if __name__ == "__main__":
    main()
