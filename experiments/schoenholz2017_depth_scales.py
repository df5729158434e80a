"""Schoenholz et al., 2017 (arXiv:1611.01232), figures 2 to 4: how many layers a difference lives, and how fast gradients change.

For tanh, sigma_b^2 = 0.05, on both sides of the critical sigma_w^2, here 1.7610 (the paper says 1.76). Two inputs of lengths above
and below q*, or of correlations with a third above and below c* (below 1 and 1, where c* = 1), approach each other as e^(-l / xi):
xi_q = -1 / ln chi_par and xi_c = -1 / ln chi(c*). The squared norm of the gradient changes by chi_1 per layer.

Claims, at every sigma_w, the measured scale taken over the layers in which theory's difference falls to e^-1.2:
|ln(measured xi / xi)| < 4 s.e. + 2 / N + what the maps' own curvature makes of it at this distance, which iterating them tells;
|rate of ln||delta|| - ln(chi_1) / 2| < 4 s.e. + 2 / N; the rate is negative below the critical point and positive above; and xi_c
grows toward it from both sides. xi_q has no peak there: it stays below 3 layers. Two minutes on a CPU.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vgrad import fit, losses, meanfield, mlp, sweep

SIGMA_B, COPIES = 0.05**0.5, 16


@dataclass(frozen=True)
class Config:
    sigma_w_sq: tuple[float, ...] = (0.6, 1.0, 1.3, 1.5, 1.6, 1.95, 2.1, 2.5, 3.0, 4.0)
    width: int = 300  # the paper's
    num_seeds: int = 120
    layers: int = 30
    depth: int = 50  # of the networks whose gradient is measured
    gradient_seeds: int = 32


PAPER, TINY = Config(), Config((1.0, 1.5, 2.3), 64, 50, 12, 24, 16)


class Result(NamedTuple):
    """Per sigma_w^2: (measured, its s.e.; by iterating the maps; asymptotic) of ln xi_q, ln xi_c; (rate, s.e., theory); and N."""

    sigma_w_sq: tuple[float, ...]
    log_xi_q: list
    log_xi_c: list
    rate: list
    critical: float
    width: int


def theory(config, sigma_w):
    """The fixed points, the starts, and the differences of the two lengths and of the two correlations by layer, [2, L]."""
    sigmas = dict(sigma_w=sigma_w, sigma_b=SIGMA_B)
    star = meanfield.asymptotics("tanh", **sigmas)
    q = star.q_star * jnp.array([0.75, 1.25])
    apart = jnp.where(star.c_star < 1, jnp.minimum(0.15, (1 - star.c_star) / 4), 0.01)
    c = star.c_star + apart * jnp.where(star.c_star < 1, jnp.array([-1.0, 1.0]), jnp.array([-1.0, 0.0]))

    def step(state, _):
        q, c = state
        mapped = (
            jax.vmap(lambda q: meanfield.q_map("tanh", q, **sigmas))(q),
            jax.vmap(lambda c: meanfield.c_map("tanh", c, star.q_star, **sigmas))(c),
        )
        return mapped, jnp.stack([q[1] - q[0], c[1] - c[0]])

    return star, q, c, jax.lax.scan(step, (q, c), None, length=config.layers)[1].T


def measured(config, sigma_w, q_star, q, c):
    """The same differences in random networks. Shape [S, 2, L]."""
    net = mlp(config.width, "tanh", 2 * COPIES, 1, sigma_w=sigma_w, sigma_b=SIGMA_B)
    size = lambda q: jnp.sqrt(2 * COPIES * (q - SIGMA_B**2)) / sigma_w  # noqa: E731  of the input that makes z_1 of length q
    cosine = (c * q_star - SIGMA_B**2) / (q_star - SIGMA_B**2)
    sine = jnp.sqrt(jnp.maximum(1 - cosine**2, 0))
    first, second = jnp.split(jnp.eye(2 * COPIES), 2)
    kinds = [size(q[0]) * first, size(q[1]) * first, size(q_star) * first]
    x = jnp.concatenate(kinds + [size(q_star) * (cosine[i] * first + sine[i] * second) for i in range(2)])

    def one(seed):
        params = net.init(jax.random.fold_in(jax.random.key(0), seed), config.layers + 1)
        z = net.embed.apply(params.embed, x)
        z = jnp.concatenate([z[None], jax.lax.scan(lambda z, p: (net.block.apply(p, z),) * 2, z, params.hidden)[1]])
        short, long, u, low, high = jnp.split(z, 5, axis=1)
        square = lambda z: jnp.mean(z * z, axis=-1)  # noqa: E731  over units: [L, copies]
        cosine = lambda z: jnp.mean(z * u, axis=-1) / jnp.sqrt(square(z) * square(u))  # noqa: E731
        return jnp.stack([square(long) - square(short), cosine(high) - cosine(low)]).mean(axis=-1)

    return jax.lax.map(one, jnp.arange(config.num_seeds))


def log_scale(samples, line, xi):
    """ln xi over the layers in which theory's `line` [L] falls to e^-1.2: of samples [S, L], its s.e., of the line; and ln xi."""
    last = max(1, int(np.sum(line > line[0] * np.exp(-1.2))))
    last = min(last, len(line) - 1)
    scale = lambda d: np.log(last / np.log(d[..., 0] / d[..., last]))  # noqa: E731
    without = scale((samples.sum(axis=0) - samples) / (len(samples) - 1))  # the jackknife
    error = without.std() * (len(samples) - 1) ** 0.5
    return tuple(float(v) for v in (scale(samples.mean(axis=0)), error, scale(line), np.log(xi)))


def run(config: Config) -> Result:
    predict, measure = jax.jit(partial(theory, config)), jax.jit(partial(measured, config))
    log_xi_q, log_xi_c, chi_1 = [], [], []
    for sigma_w in np.sqrt(np.float32(config.sigma_w_sq)):
        star, q, c, lines = predict(sigma_w)
        samples = np.asarray(measure(sigma_w, star.q_star, q, c), np.float64)
        log_xi_q.append(log_scale(samples[:, 0], np.asarray(lines[0]), star.xi_q))
        log_xi_c.append(log_scale(samples[:, 1], np.asarray(lines[1]), star.xi_c))
        chi_1.append(float(star.chi_1))
    swept = sweep(
        lambda point: mlp(config.width, "tanh", 32, 4, sigma_w=point["sigma_w"], sigma_b=SIGMA_B),
        {"sigma_w": np.sqrt(config.sigma_w_sq)}, key=jax.random.key(1), num_seeds=config.gradient_seeds, depths=[config.depth],
        batch=(jax.random.normal(jax.random.key(2), (8, 32)), jnp.arange(8) % 4), loss=losses.cross_entropy,
    )  # fmt: skip
    # The first layers are on their way to q*, and the last ones feel the loss.
    rate = fit.decay_rate(swept.log_delta, [config.depth], first=8, last=config.depth - 4).log_mean_sq
    rates = [(float(v), float(e), float(np.log(x) / 2)) for (v,), (e,), x in zip(*rate, chi_1, strict=True)]
    critical = float(jax.jit(partial(meanfield.critical_sigma_w, "tanh"))(SIGMA_B)) ** 2
    return Result(config.sigma_w_sq, log_xi_q, log_xi_c, rates, critical, config.width)


def check(result: Result) -> None:
    assert abs(result.critical - 1.76095) < 1e-4, result.critical
    for at, scales_q, scales_c, (rate, error, expected) in zip(*result[:4], strict=True):
        for value, its_error, iterated, asymptotic in (scales_q, scales_c):
            assert abs(value - asymptotic) < 4 * its_error + 2 / result.width + abs(iterated - asymptotic), (at, scales_q, scales_c)
            assert abs(iterated - asymptotic) < 0.25, (at, iterated, asymptotic)
        assert abs(rate - expected) < 4 * error + 2 / result.width, (at, rate, error, expected)
        assert rate * (at - result.critical) > 0, (at, rate)
        assert np.exp(scales_q[0]) < 3, (at, scales_q)
    below = [s[0] for at, s in zip(result.sigma_w_sq, result.log_xi_c, strict=True) if at < result.critical]
    above = [s[0] for at, s in zip(result.sigma_w_sq, result.log_xi_c, strict=True) if at > result.critical]
    assert sorted(below) == below, below
    assert sorted(above, reverse=True) == above, above


def main() -> None:
    result, folder = run(PAPER), Path("results")
    check(result)
    print(f"{__doc__}\ncritical sigma_w^2 {result.critical:.5f}\n{'sigma_w^2':>9}", end="")
    print(f"{'xi_q measured':>18}{'theory':>9}{'xi_c measured':>18}{'theory':>9}{'rate of ln||delta||':>22}{'ln(chi_1)/2':>13}")
    for at, q, c, (rate, error, expected) in zip(*result[:4], strict=True):
        print(f"{at:9.2f}", end="")
        print(*(f"{np.exp(s[0]):10.3f} ± {np.exp(s[0]) * s[1]:5.3f}{np.exp(s[3]):9.3f}" for s in (q, c)), end="", sep="")
        print(f"{rate:+13.4f} ± {error:.4f}{expected:+13.4f}")
    folder.mkdir(exist_ok=True)
    (folder / "schoenholz2017_depth_scales.json").write_text(json.dumps(result._asdict(), indent=1))
    grid = np.linspace(0.4, 4.2, 191)
    lines = jax.jit(jax.vmap(lambda v: meanfield.asymptotics("tanh", sigma_w=jnp.sqrt(v), sigma_b=SIGMA_B)))(grid)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    scales, gradient = figure.subplots(1, 2)
    for name, rows, line, marker, shade in (
        ("xi_q", result.log_xi_q, lines.xi_q, "s", "0.5"), ("xi_c", result.log_xi_c, lines.xi_c, "o", "0.0")
    ):  # fmt: skip
        value, error = np.transpose(rows)[:2]
        bars = np.exp(value) * error
        scales.errorbar(result.sigma_w_sq, np.exp(value), bars, fmt=marker, color=shade, markersize=5, label=f"{name}, measured")
        scales.plot(grid, line, color=shade, linewidth=1, label=f"{name}, theory")
    scales.set(yscale="log", ylim=(0.3, 300), ylabel="layers", title="Depth scales of length and correlation")
    value, error, _ = np.transpose(result.rate)
    gradient.errorbar(result.sigma_w_sq, value, error, fmt="o", color="black", markersize=5, label="measured")
    gradient.plot(grid, np.log(lines.chi_1) / 2, color="black", linewidth=1, label="ln(chi_1) / 2")
    gradient.set(ylabel="nats per layer", title=r"Change of $\ln\|\delta\|$ toward the input")
    for ax in (scales, gradient):
        ax.axvline(result.critical, linestyle=":", color="0.4", label="critical")
        ax.set(xlabel=r"$\sigma_w^2$   (tanh, $\sigma_b^2 = 0.05$)")
        ax.legend()
    figure.savefig(folder / "schoenholz2017_depth_scales.png", dpi=130)


if __name__ == "__main__":
    main()
