"""Hayou, Doucet & Rousseau, 2019 (arXiv:1902.06853): the edge of chaos of eight activations, and what it is worth to each.

The edge is where chi_1 = sigma_w^2 E phi'^2 = 1; for relu the one point sigma_w = sqrt 2, sigma_b = 0. Claim 1: at the sigma_w that
`critical_points` gives for a sigma_b, ln||delta|| keeps its value over the layers, to 0.01 per layer; at 0.9 and 1.1 of it, it
vanishes and explodes. The rate is the mean of ln(chi_1) / 2 over the lengths that layers go through, to 4 s.e. + 2 / N: so also
for relu, gelu and silu at 1.1, whose length grows without bound.

Claim 2 (section 3): on the edge two inputs grow alike as a power of depth. It decides whether phi' jumps. With p the density of
N(0, q), and a jump J at each b,

    without jumps  1 - c_l ~ 2 / (sigma_w^2 q E phi''^2 l),
    with jumps     1 - c_l ~ (2 / (kappa l))^2,    kappa = (2/3) sigma_w^2 sum J^2 p(b) sqrt(q / pi):

9 pi^2 / (2 l^2) for relu, the paper's constant. The theory's maps, iterated 1000 times, have come within 0.15 of the exponent and
within 12 per cent of the constant (the next order is l^-1/2 for elu, ln l / l for the rest). So tanh, erf, elu, gelu and silu carry
information deeper than relu, selu and hard_tanh. Two minutes on a CPU.
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

from vgrad import activations, fit, gaussian, losses, meanfield, mlp, sweep

# sigma_b of each: for gelu and silu such that the length on the edge attracts, which it does not at small ones.
SIGMA_B = {"relu": 0.0, "hard_tanh": 0.3, "selu": 0.2, "tanh": 0.3, "erf": 0.3, "elu": 0.2, "gelu": 0.6, "silu": 1.0}
FACTORS = (0.9, 1.0, 1.1)


@dataclass(frozen=True)
class Config:
    phi: tuple[str, ...] = tuple(SIGMA_B)
    width: int = 256
    depth: int = 40
    num_seeds: int = 32
    steps: int = 1000  # of the maps


PAPER, TINY = Config(), Config(("relu", "tanh"), 64, 16, 16)


class Row(NamedTuple):
    """One activation; rates: (measured, s.e., ln(chi_1) / 2) at each factor of the critical sigma_w."""

    phi: str
    sigma_b: float
    sigma_w: float
    q: float
    chi_par: float
    rates: list
    power: tuple[float, float]  # of 1 - c_l: by iterating the map, and by the claim
    constant: tuple[float, float]  # l^power (1 - c_l), likewise
    width: int


def jumps(phi):
    """(J^2, b) wherever phi' jumps."""
    facts = activations.facts(phi)
    slope = lambda z: float(jax.grad(facts.phi)(z))  # noqa: E731
    squares = [((slope(b + 1e-9) - slope(b - 1e-9)) ** 2, b) for b in facts.breakpoints]
    return [(square, b) for square, b in squares if square > 1e-12]


def edge(phi, jumps, config):
    """The critical point; power and constant of 1 - c_l by iterating the map, and by the formulas of the claim."""
    point, sigma_b = meanfield.critical_points(phi, SIGMA_B[phi]), SIGMA_B[phi]
    at = jnp.nanargmin(point.chi_par)
    sigma_w, q, chi_par = (v[at] for v in (point.sigma_w, point.q, point.chi_par))
    a = gaussian.series(phi, q)
    covariance = lambda c: sigma_w**2 * gaussian.correlator(a, a)(c)[0] + sigma_b**2  # noqa: E731
    length = covariance(jnp.ones_like(q))
    step = lambda c, _: (covariance(c) / length,) * 2  # noqa: E731
    apart = 1 - jax.lax.scan(step, 0.5 * jnp.ones_like(q), None, length=config.steps)[1]
    power = jnp.log(apart[config.steps // 2 - 1] / apart[-1]) / jnp.log(2.0)
    if jumps:
        density = sum(square * jnp.exp(-(b**2) / (2 * q)) for square, b in jumps) / jnp.sqrt(2 * jnp.pi * q)
        law = 2, 9 / (sigma_w**2 * density * jnp.sqrt(q / jnp.pi)) ** 2
    else:
        bend = lambda z: jax.vmap(jax.grad(jax.grad(activations.get(phi))))(z) ** 2  # noqa: E731
        law = 1, 2 / (sigma_w**2 * q * gaussian.expect(bend, q, **gaussian.rule_options(phi)))
    return sigma_w, q, chi_par, (power, law[0]), (apart[-1] * float(config.steps) ** law[0], law[1])


def gradients(config, sigmas):
    """(rate, s.e.) per activation and factor. Shape [P, 3]."""
    phis, biases = [activations.get(phi) for phi in config.phi], jnp.array([SIGMA_B[phi] for phi in config.phi])

    def family(point):
        which = jnp.asarray(point["phi"]).astype(jnp.int32)
        phi = lambda z: jax.lax.switch(which, phis, z)  # noqa: E731
        return mlp(config.width, phi, 32, 4, sigma_w=point["sigma_w"], sigma_b=biases[which])

    grid = [{"phi": i, "sigma_w": factor * sigma_w} for i, sigma_w in enumerate(sigmas) for factor in FACTORS]
    x = jax.random.normal(jax.random.key(1), (8, 32))
    batch = (x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True)), jnp.arange(8) % 4)
    swept = sweep(family, grid, key=jax.random.key(0), num_seeds=config.num_seeds, depths=[config.depth], batch=batch,
                  loss=losses.cross_entropy)  # fmt: skip
    rate = fit.decay_rate(swept.log_delta, [config.depth], first=config.depth // 4, last=config.depth - 3).log_mean_sq
    return np.stack([rate.value[:, 0], rate.stderr[:, 0]], axis=-1).reshape(len(sigmas), len(FACTORS), 2).tolist()


def growth(phi, sigma_w, depth):
    """Mean of ln(chi_1) / 2 over the layers between which the rate is taken, along the lengths that an input of length 1 has."""
    sigmas = dict(sigma_w=sigma_w, sigma_b=SIGMA_B[phi])

    def up(q, _):
        return meanfield.q_map(phi, q, **sigmas), meanfield.chi_1(phi, q=q, **sigmas)

    chi = jax.lax.scan(up, sigma_w**2 + SIGMA_B[phi] ** 2, None, length=depth - 4)[1]
    return 0.5 * jnp.mean(jnp.log(chi[depth // 4 - 1 :]))


def run(config: Config) -> list[Row]:
    with jax.enable_x64(True):
        edges = [jax.tree.map(float, jax.jit(partial(edge, phi, jumps(phi), config))()) for phi in config.phi]
    rows = []
    for phi, found, rates in zip(config.phi, edges, gradients(config, [e[0] for e in edges]), strict=True):
        expected = jax.jit(jax.vmap(lambda s: growth(phi, s, config.depth)))(found[0] * jnp.array(FACTORS)).tolist()
        rates = [(*rate, theory) for rate, theory in zip(rates, expected, strict=True)]
        rows.append(Row(phi, SIGMA_B[phi], *found[:3], rates, *found[3:], config.width))
    return rows


def check(result: list[Row]) -> None:
    for row in result:
        for rate, error, theory in row.rates:
            assert abs(rate - theory) < 4 * error + 2 / row.width, row
        (down, *_), (_, _, nothing), (up, *_) = row.rates
        assert abs(nothing) < 0.01, row
        assert down < 0 < up, row
        assert row.chi_par < 1 + 1e-9, row
        assert abs(row.power[0] - row.power[1]) < 0.15, row
        assert abs(row.constant[0] / row.constant[1] - 1) < 0.12, row
        assert row.phi != "relu" or abs(row.constant[1] - 4.5 * np.pi**2) < 1e-6, row


def main() -> None:
    result, folder = run(PAPER), Path("results")
    check(result)
    print(f"{__doc__}\n{'phi':10}{'sigma_b':>8}{'sigma_w':>9}{'q':>8}{'chi_par':>9}", end="")
    print(f"{'rate at 0.9, 1, 1.1 sigma_w (theory)':>62}{'1 - c_l ~':>22}")
    for row in result:
        rates = "  ".join(f"{r:+.4f} ± {e:.4f} ({t:+.4f})" for r, e, t in row.rates)
        print(f"{row.phi:10}{row.sigma_b:8.2f}{row.sigma_w:9.5f}{row.q:8.4f}{row.chi_par:9.4f}  {rates}", end="")
        print(f"{row.constant[1]:12.3f} / l^{row.power[1]:.0f}")
    folder.mkdir(exist_ok=True)
    (folder / "hayou2019_edge_of_chaos.json").write_text(json.dumps([row._asdict() for row in result], indent=1))
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    lengths = jnp.geomspace(1e-4, 400, 300)
    for i, row in enumerate(result):
        line = jax.jit(jax.vmap(lambda q, phi=row.phi: meanfield.critical_line(phi, q)))(lengths)
        style = dict(color=f"C{i}", linestyle=["-", "--", "-.", ":"][i % 4], linewidth=1.6)
        ax.plot(line.sigma_b, line.sigma_w, marker="o" if row.phi == "relu" else None, label=row.phi, **style)
        ax.plot(row.sigma_b, row.sigma_w, marker="osD^v<>P"[i], markersize=7, color=f"C{i}")
    ax.set(xlabel=r"$\sigma_b$", ylabel=r"critical $\sigma_w$", xlim=(-0.02, 1.5), ylim=(0.6, 2.6))
    ax.set(title="The edge of chaos; marks: where gradients were measured")
    ax.legend(ncols=2)
    figure.savefig(folder / "hayou2019_edge_of_chaos.png", dpi=130)


if __name__ == "__main__":
    main()
