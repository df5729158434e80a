"""PyTorch's default Linear layer, rebuilt: W and b ~ U[-1, 1] / sqrt(fan_in), and what that does to a deep relu network.

The layer calls `kaiming_uniform_` with a = sqrt(5), which is often read as "He initialization, so gradients keep". It is not:
U[-1, 1] / sqrt(n) has n Var W = 1/3, a sixth of He's 2 (He et al., 2015, eq. 10), so sigma_w = 1/sqrt(3) and

    chi_1 = sigma_w^2 / 2 = 1/6:  ln(E||delta||^2) / 2 falls by ln(6) / 2 = 0.896 per layer,    q* = (1/(3n)) / (1 - 1/6) = 0.4 / n.

Claims: delta falls at that rate, within 4 standard errors and 5 / (4 n): 7 decades in 20 layers, where He's stays. The biases,
usually left out of the argument, keep the forward signal up at q*; so ||dJ/dW|| falls with delta, and the loss shows nothing.
Without biases the signal dies forward at the same rate and ||dJ/dW_l|| is the same in all layers: a look at weight gradients
alone would find a small gradient, not a vanishing one. And the biases are the same for every sample: what tells two inputs apart
falls as delta does, 0.9 per layer, and beyond some 20 layers float32 cannot tell any two inputs apart. Twenty seconds on a CPU.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vgrad import Affine, Block, data, fit, layers, losses, stack, sweep


@dataclass(frozen=True)
class Config:
    width: int = 256
    depths: tuple[int, ...] = (10, 20, 50)
    num_seeds: int = 32
    batch: int = 64


PAPER, TINY = Config(), Config(64, (20,), 16, 32)
SCHEMES = {"default": {"weight": 1.0, "bias": 1.0}, "without biases": {"weight": 1.0, "bias": 0.0},
           "He": {"weight": 6**0.5, "bias": 0.0}}  # fmt: skip
RATES = {"default": -np.log(6) / 2, "without biases": -np.log(6) / 2, "He": 0.0}


class Result(NamedTuple):
    width: int
    batch: int
    depths: tuple[int, ...]
    rates: dict  # scheme -> per depth: (rate of the mean square of delta, its s.e.)
    profiles: dict  # scheme -> "delta", "grad_w", "h", "apart" -> by layer at the greatest depth, root mean square over seeds


def linear(fan_in, fan_out, point, phi=None) -> Block:
    """torch.nn.Linear(fan_in, fan_out) on phi(z), its bounds multiplied by the point's `weight` and `bias`."""

    def init(key):
        draw = lambda key, shape: jax.random.uniform(key, shape, minval=-1, maxval=1) / fan_in**0.5  # noqa: E731
        key_w, key_b = jax.random.split(key)
        return Affine(point["weight"] * draw(key_w, (fan_in, fan_out)), point["bias"] * draw(key_b, (fan_out,)))

    return Block(init, lambda p, z: layers.affine(p, z if phi is None else layers.activate(phi, z)))


def network(config, point):
    n = config.width
    return stack(linear(64, n, point), linear(n, n, point, jax.nn.relu), linear(n, 10, point, jax.nn.relu))


def apart(config, x):
    """ln of the root mean square over seeds of what is left of h_l once the mean over the samples is taken away. [scheme, layer]"""

    def one(point, seed):
        net = network(config, point)
        params = net.init(jax.random.fold_in(jax.random.key(0), seed), max(config.depths))
        z = net.embed.apply(params.embed, x)
        _, zs = jax.lax.scan(lambda z, p: (z := net.block.apply(p, z), z), z, params.hidden)
        h = jax.nn.relu(jnp.concatenate([z[None], zs]))
        return jnp.sum(jnp.square(h - h.mean(axis=1, keepdims=True)), axis=(1, 2))

    points = jax.tree.map(lambda *values: jnp.array(values), *SCHEMES.values())
    over_seeds = lambda point: jax.lax.map(lambda seed: one(point, seed), jnp.arange(config.num_seeds)).mean(axis=0)  # noqa: E731
    return np.log(jax.jit(lambda: jax.lax.map(over_seeds, points))()) / 2


def run(config: Config) -> Result:
    x, t = data.digits().batch(config.batch, 0)
    options = dict(num_seeds=config.num_seeds, depths=config.depths, batch=(x, t), loss=losses.cross_entropy)
    swept = sweep(lambda point: network(config, point), list(SCHEMES.values()), key=jax.random.key(0), **options)
    rate = fit.decay_rate(swept.log_delta, config.depths).log_mean_sq
    rates, profiles, left = {}, {}, apart(config, x)
    for p, scheme in enumerate(SCHEMES):
        rates[scheme] = [(float(v), float(e)) for v, e in zip(rate.value[p], rate.stderr[p], strict=True)]
        fields = {"delta": swept.log_delta, "grad_w": swept.log_grad_w, "h": swept.log_h}
        means = {k: fit.log_mean_sq(v[:, :, -1])[0][p][:-1] for k, v in fields.items()} | {"apart": left[p]}
        profiles[scheme] = {k: v.tolist() for k, v in means.items()}
    return Result(config.width, config.batch, config.depths, rates, profiles)


def check(result: Result) -> None:
    for scheme, rows in result.rates.items():
        for depth, (rate, error) in zip(result.depths, rows, strict=True):
            if depth <= 20:  # beyond, rare networks carry the mean square, and a sample of seeds does not hold them
                assert abs(rate - RATES[scheme]) < 4 * error + 1.25 / result.width, (scheme, depth, rate, error)
    inner = slice(5, 18)  # past the transient of the forward signal, and within depth 20
    slope = lambda scheme, name: np.polyfit(np.arange(13), result.profiles[scheme][name][inner], 1)[0]  # noqa: E731
    loss = np.log(6) / 2
    assert abs(slope("default", "h")) < 0.05, slope("default", "h")
    level = np.mean(result.profiles["default"]["h"][inner]) - np.log(0.2 * result.batch) / 2  # E||h||^2 = B n q* / 2
    assert abs(level) < 0.1, level
    assert abs(slope("without biases", "h") + loss) < 0.1, slope("without biases", "h")
    assert abs(slope("default", "grad_w") - loss) < 0.1, slope("default", "grad_w")
    assert abs(slope("without biases", "grad_w")) < 0.1, slope("without biases", "grad_w")
    assert slope("default", "apart") < -0.8 * loss, slope("default", "apart")


def main() -> None:
    result, folder = run(PAPER), Path("results")
    check(result)
    print(f"{__doc__}\n{'scheme':16}{'depth':>6}{'ln(E||delta||^2)/2 per layer':>32}{'expected':>10}")
    for scheme, rows in result.rates.items():
        for depth, (rate, error) in zip(result.depths, rows, strict=True):
            print(f"{scheme:16}{depth:6}{rate:+23.4f} ± {error:.4f}{RATES[scheme]:+10.4f}")
    folder.mkdir(exist_ok=True)
    (folder / "pytorch_default_init.json").write_text(json.dumps(result._asdict(), indent=1))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    titles = {"delta": r"$\ln\,\|\delta_l\|$", "grad_w": r"$\ln\,\|\partial J/\partial W_l\|$", "h": r"$\ln\,\|h_l\|$",
              "apart": r"$\ln\,\|h_l - \overline{h_l}\|$"}  # fmt: skip
    for ax, (name, title) in zip(figure.subplots(1, 4, sharex=True), titles.items(), strict=True):
        for scheme, style in zip(SCHEMES, ("-", "--", ":"), strict=True):
            line = result.profiles[scheme][name]
            ax.plot(range(1, len(line) + 1), line, style, label=scheme, linewidth=1.6)
        ax.set(xlabel="layer (1 = nearest the input)", title=title)
    ax.legend(fontsize=8)
    figure.axes[0].set_ylabel("nats")
    figure.suptitle(f"PyTorch's default Linear in a relu network of depth {result.depths[-1]}, width {result.width}")
    figure.savefig(folder / "pytorch_default_init.png", dpi=130)


if __name__ == "__main__":
    main()
