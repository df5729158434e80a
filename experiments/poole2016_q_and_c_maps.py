"""Poole et al., 2016 (arXiv:1606.05340), figures 1 and 2: length and correlation of inputs, layer by layer, in random networks.

    q_l = sigma_w^2 E phi(u)^2 + sigma_b^2,    c_l = (sigma_w^2 E phi(u1) phi(u2) + sigma_b^2) / q_l,    u of variance q_{l-1}

for tanh, sigma_b = 0.3, sigma_w = 1.3, 2.5, 4.0. Claims. **One step** is these maps at any width: the first layer is exactly
Gaussian, so the mean over networks lies within 4 standard errors, with nothing left for the width (q; for c, a ratio of two
means, 4 s.e. + 1 / N). **Many steps**, from four lengths and four correlations: |q_l - theory| < 4 s.e. + 3 q* / N and
|c_l - theory| < 4 s.e. + 3 / N, because the length of a network of width N fluctuates and the maps are curved. **Where they end**:
any two inputs grow alike at sigma_w = 1.3 (chi_1 < 1, c* = 1); at 2.5 and 4 even inputs of correlation 0.99 come apart, toward c* =
0.122 and 0.030. A minute on a CPU.
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

from vgrad import meanfield, mlp

SIGMA_B, SIGMAS_W = 0.3, (1.3, 2.5, 4.0)
LENGTHS, CORRELATIONS = (0.5, 2.0, 6.0, 14.0), (0.0, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Config:
    width: int = 1000  # the paper's
    num_seeds: int = 40
    layers: int = 20


PAPER, TINY = Config(), Config(100, 40, 12)


class Result(NamedTuple):
    """Per sigma_w: q and c by start and layer [4][L]: measured, standard error, theory; the fixed points; N."""

    q: dict
    c: dict
    q_star: dict
    c_star: dict
    width: int


def measured(config, sigma_w):
    """q [S, 4, L] from the four lengths, c [S, 4, L] from the four correlations at length q*."""
    net = mlp(config.width, "tanh", 8, 1, sigma_w=sigma_w, sigma_b=SIGMA_B)
    start = meanfield.q_star("tanh", sigma_w=sigma_w, sigma_b=SIGMA_B)
    # Inputs that make z_1 of length q: sigma_w^2 |x|^2 / 8 + sigma_b^2 = q; and of correlation c with the last one.
    size = lambda q: jnp.sqrt(8 * (q - SIGMA_B**2)) / sigma_w  # noqa: E731
    cosine = (jnp.array(CORRELATIONS) * start - SIGMA_B**2) / (start - SIGMA_B**2)
    first, second = jnp.eye(8)[:2]
    x_q = jnp.stack([size(q) * first for q in LENGTHS])
    x_c = size(start) * jnp.stack([c * first + jnp.sqrt(1 - c**2) * second for c in cosine] + [first])

    def one(seed):
        params = net.init(jax.random.fold_in(jax.random.key(0), seed), config.layers + 1)
        z = net.embed.apply(params.embed, jnp.concatenate([x_q, x_c]))
        z = jnp.concatenate([z[None], jax.lax.scan(lambda z, p: (net.block.apply(p, z),) * 2, z, params.hidden)[1]])
        mean = lambda a, b: jnp.mean(a * b, axis=-1)  # noqa: E731  over units: [L, 4]
        a, b = z[:, 4:8], jnp.broadcast_to(z[:, 8:], z[:, 4:8].shape)
        return mean(z[:, :4], z[:, :4]).T, (mean(a, b) / jnp.sqrt(mean(a, a) * mean(b, b))).T

    return jax.lax.map(one, jnp.arange(config.num_seeds))


def predicted(config, sigma_w):
    """The same without a network: q and c [4, L]."""
    sigmas = dict(sigma_w=sigma_w, sigma_b=SIGMA_B)
    start = meanfield.q_star("tanh", **sigmas)

    def orbit(step, first):
        return jax.lax.scan(lambda v, _: (step(v), v), first, None, length=config.layers)[1].T

    q = orbit(jax.vmap(lambda q: meanfield.q_map("tanh", q, **sigmas)), jnp.array(LENGTHS))
    return q, orbit(jax.vmap(lambda c: meanfield.c_map("tanh", c, start, **sigmas)), jnp.array(CORRELATIONS))


def run(config: Config) -> Result:
    q, c, q_star, c_star = {}, {}, {}, {}
    both = jax.jit(lambda sigma_w: (measured(config, sigma_w), predicted(config, sigma_w)))
    ends = jax.jit(partial(meanfield.asymptotics, "tanh", sigma_b=SIGMA_B))
    for sigma_w in SIGMAS_W:
        samples, theory = both(jnp.float32(sigma_w))
        for into, sample, line in zip((q, c), samples, theory, strict=True):
            error = np.std(sample, axis=0, ddof=1) / config.num_seeds**0.5
            into[str(sigma_w)] = [np.asarray(v, float).tolist() for v in (np.mean(sample, axis=0), error, line)]
        star = ends(sigma_w=sigma_w)
        q_star[str(sigma_w)], c_star[str(sigma_w)] = float(star.q_star), float(star.c_star)
    return Result(q, c, q_star, c_star, config.width)


def check(result: Result) -> None:
    n = result.width
    for sigma_w in map(str, SIGMAS_W):
        for name, rows, unit in (("q", result.q[sigma_w], result.q_star[sigma_w]), ("c", result.c[sigma_w], 1.0)):
            value, error, theory = (np.array(v) for v in rows)
            off, rounding = np.abs(value - theory), 1e-5 * unit
            one_step = off[:, :2] - 4 * error[:, :2] - rounding - (name == "c") / n
            assert (one_step < 0).all(), (name, sigma_w, off[:, :2], error[:, :2])
            assert (off < 4 * error + 3 * unit / n + rounding).all(), (name, sigma_w, (off - 4 * error).max() * n / unit)
    ends = {s: np.array(result.c[s][0])[:, -1] for s in map(str, SIGMAS_W)}
    assert result.c_star["1.3"] == 1
    assert (ends["1.3"] > np.array(CORRELATIONS)).all(), ends
    assert max(ends["2.5"][3], ends["4.0"][3]) < 0.8, ends
    assert abs(result.c_star["2.5"] - 0.1221) < 1e-4, result.c_star
    assert abs(result.c_star["4.0"] - 0.0297) < 1e-4, result.c_star
    assert (ends["1.3"] > ends["2.5"]).all(), ends
    assert (ends["2.5"] > ends["4.0"]).all(), ends


def main() -> None:
    result, folder = run(PAPER), Path("results")
    check(result)
    print(f"{__doc__}\n{'sigma_w':>7}{'q*':>9}{'c*':>9}   last layer, measured ± s.e.: q from the largest length, c from 0.99")
    for s in map(str, SIGMAS_W):
        (q, e), (c, f) = ([np.array(v)[3, -1] for v in field[s][:2]] for field in (result.q, result.c))
        print(f"{s:>7}{result.q_star[s]:9.4f}{result.c_star[s]:9.4f}{q:14.4f} ± {e:.4f}{c:10.4f} ± {f:.4f}")
    folder.mkdir(exist_ok=True)
    (folder / "poole2016_q_and_c_maps.json").write_text(json.dumps(result._asdict(), indent=1))
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for ax, field, label in zip(figure.subplots(1, 2), (result.q, result.c), ("length $q_l$", "correlation $c_l$"), strict=True):
        for s, fmt, shade in zip(map(str, SIGMAS_W), "os^", ("0.0", "0.4", "0.65"), strict=True):
            style = dict(fmt=fmt, color=shade, markersize=4)
            value, error, theory = (np.array(v) for v in field[s])
            layer = np.arange(1, value.shape[1] + 1)
            for i in range(4):
                ax.errorbar(layer, value[i], error[i], label=f"sigma_w {s}" if i == 0 else None, **style)
                ax.plot(layer, theory[i], "-", color=shade, linewidth=0.9)
        ax.set(xlabel="layer $l$", ylabel=label, xticks=range(0, PAPER.layers + 1, 5))
    figure.axes[0].legend(loc="center right", bbox_to_anchor=(1, 0.58))
    figure.suptitle(f"tanh, sigma_b = {SIGMA_B}, width {PAPER.width}: means over networks (marks) and theory (lines)")
    figure.savefig(folder / "poole2016_q_and_c_maps.png", dpi=130)


if __name__ == "__main__":
    main()
