"""Roberts, Yaida & Hanin, 2022, The Principles of Deep Learning Theory, chapter 5: the universality classes of activations.

Critical means chi_1 = chi_par = 1. **Classes**, claimed and computed: identity, relu and leaky relu are scale-invariant; tanh, erf
and sin have K* = 0, at sigma_w = 1 / phi'(0), sigma_b = 0; sigmoid and softplus have no such point; gelu and silu are half-stable,
at K* = (3 + sqrt 17) / 2, sigma_w^2 = 1.98306, sigma_b^2 = 0.17292 and at 14.3202, 1.98800, 0.55514, to 5e-6. (For silu one can
read 0.0555: ten times too small. There the length settles at 0.12, with chi_1 = 0.55, and the gradient vanishes.)

**Scale-invariant and K* = 0**, measured: the length of relu stays, that of tanh and sin falls as 1 / (rate l), |ln(K_l / theory)| <
4 s.e. + 2 l / N, and theory is within 10 per cent of that law at layer 60; rate = 2 for tanh, 1 for sin. **Half-stable** is true,
but hardly matters: another fixed point, which attracts, lies close to K*, so that even from 0.9 and 1.1 K* the length moves by less
than 1e-5 of itself per layer, and from half and twice K* toward it. Half a minute on a CPU.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vgrad import meanfield, mlp

CLASSES = {
    "identity": "scale-invariant", "relu": "scale-invariant", "leaky_relu": "scale-invariant", "tanh": "K*=0", "erf": "K*=0",
    "sin": "K*=0", "gelu": "half-stable", "silu": "half-stable", "sigmoid": "none", "softplus": "none",
}  # fmt: skip
MEASURED = ("tanh", "sin", "relu")
NEAR = (0.5, 0.9, 1.0, 1.1, 2.0)  # in units of K*


@dataclass(frozen=True)
class Config:
    classes: tuple[str, ...] = tuple(CLASSES)
    measured: tuple[str, ...] = MEASURED
    width: int = 400
    layers: int = 60
    num_seeds: int = 60


PAPER, TINY = Config(), Config(("tanh", "gelu"), ("tanh",), 100, 60, 30)


class Result(NamedTuple):
    """By activation: the fields of `Universality`; (K_l measured, s.e., theory) [3][L]; change of the length per layer near K*."""

    found: dict
    lengths: dict
    drift: dict
    misread: tuple[float, float]  # q* and chi_1 of silu at a tenth of its sigma_b^2
    width: int


def measure(phi, at, config):
    """K_l from length 1: measured, its standard error, and by iterating the length map. Shape [3, L]."""
    net = mlp(config.width, phi, 4, 1, sigma_w=at.sigma_w, sigma_b=at.sigma_b)
    x = 2 / at.sigma_w * jnp.eye(4)[:1]

    def one(seed):
        params = net.init(jax.random.fold_in(jax.random.key(0), seed), config.layers + 1)
        z = net.embed.apply(params.embed, x)
        z = jnp.concatenate([z[None], jax.lax.scan(lambda z, p: (net.block.apply(p, z),) * 2, z, params.hidden)[1]])
        return jnp.mean(z**2, axis=(1, 2))

    def all_of():
        up = lambda q, _: (meanfield.q_map(phi, q, sigma_w=at.sigma_w, sigma_b=at.sigma_b), q)  # noqa: E731
        theory = jax.lax.scan(up, jnp.ones(()), None, length=config.layers)[1]
        return jax.lax.map(one, jnp.arange(config.num_seeds)), theory

    samples, theory = (np.asarray(v, float) for v in jax.jit(all_of)())
    return np.stack([samples.mean(0), samples.std(0, ddof=1) / config.num_seeds**0.5, theory]).tolist()


def drift(phi, at):
    """ln(q_map(q) / q) at the lengths NEAR K*."""
    move = lambda q: jnp.log(meanfield.q_map(phi, q, sigma_w=at.sigma_w, sigma_b=at.sigma_b) / q)  # noqa: E731
    return jax.jit(jax.vmap(move))(at.q * jnp.array(NEAR)).tolist()


def run(config: Config) -> Result:
    with jax.enable_x64(True):
        found = {phi: meanfield.universality(phi) for phi in config.classes}
        moves = {phi: drift(phi, at) for phi, at in found.items() if at.kind == "half-stable"}
        misread = jax.jit(lambda w, b: meanfield.asymptotics("silu", sigma_w=w, sigma_b=b))(1.98800**0.5, 0.055514**0.5)
    lengths = {phi: measure(phi, found[phi], config) for phi in config.measured}
    both = float(misread.q_star), float(misread.chi_1)
    return Result({k: u._asdict() for k, u in found.items()}, lengths, moves, both, config.width)


def check(result: Result) -> None:
    for phi, u in result.found.items():
        assert u["kind"] == CLASSES[phi], (phi, u)
        assert u["kind"] in ("none", "scale-invariant") or abs(u["chi_par"] - 1) < 1e-9, (phi, u)
    squares = {phi: (u["q"], u["sigma_w"] ** 2, u["sigma_b"] ** 2) for phi, u in result.found.items()}
    published = {"gelu": ((3 + 17**0.5) / 2, 1.98306, 0.17292), "silu": (14.32017, 1.98800, 0.55514)}
    for phi in published.keys() & squares.keys():
        assert np.allclose(squares[phi], published[phi], rtol=5e-6, atol=5e-6), (phi, squares[phi])
    assert np.allclose(result.misread, (0.120, 0.550), atol=1e-3), result.misread
    for phi, (low, near_low, at, near_high, high) in result.drift.items():
        assert abs(at) < 1e-12, (phi, at)
        assert max(abs(near_low), abs(near_high)) < 1e-5, (phi, near_low, near_high)
        assert low > 1e-4 > -1e-4 > high, (phi, low, high)
    for phi, rows in result.lengths.items():
        value, error, theory = np.array(rows)
        layer, rate = np.arange(1, len(value) + 1), result.found[phi]["rate"]
        assert (np.abs(np.log(value / theory)) < 4 * error / value + 2 * layer / result.width).all(), (phi, value, theory)
        if CLASSES[phi] == "K*=0":
            assert abs(rate - {"tanh": 2, "sin": 1}[phi]) < 2e-3, (phi, rate)
            assert abs(layer[-1] * theory[-1] * rate - 1) < 0.1, (phi, theory[-1])
        else:
            assert np.allclose(theory, 1, rtol=1e-4), theory


def main() -> None:
    result, folder = run(PAPER), Path("results")
    check(result)
    print(f"{__doc__}\n{'':12}{'class':18}{'sigma_w^2':>10}{'sigma_b^2':>10}{'K':>9}{'chi_par':>9}   K_l for large l")
    for phi, u in result.found.items():
        print(f"{phi:12}{u['kind']:18}{u['sigma_w'] ** 2:10.5f}{u['sigma_b'] ** 2:10.5f}{u['q']:9.4f}{u['chi_par']:9.4f}", end="")
        print(f"   1 / ({u['rate']:.4g} l)" if u["kind"] == "K*=0" else "")
    folder.mkdir(exist_ok=True)
    (folder / "roberts2022_criticality.json").write_text(json.dumps(result._asdict(), indent=1))
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for (phi, rows), fmt, shade in zip(result.lengths.items(), "os^", ("0.0", "0.35", "0.6"), strict=True):
        value, error, theory = np.array(rows)
        layer = np.arange(1, len(value) + 1)
        ax.errorbar(layer, value, error, fmt=fmt, color=shade, markersize=4, label=f"{phi}, measured")
        ax.plot(layer, theory, color=shade, linewidth=1, label=f"{phi}, theory")
    ax.set(xscale="log", yscale="log", xlabel="layer $l$", ylabel="length $K_l$")
    ax.set_title("At criticality: scale-invariant, and K* = 0")
    ax.legend(loc="lower left")
    figure.savefig(folder / "roberts2022_criticality.png", dpi=130)


if __name__ == "__main__":
    main()
