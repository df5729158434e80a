"""Two relu networks on the digits, alike but for the learning rate of Adam, watched by `vgrad.monitor`: one lives and one dies.

Claims. At rate 0.003 the network learns (cross-entropy below 0.1), and no gradient is ever exactly zero. At 0.3 a few steps throw
the parameters so far that no sample activates one of the layers; within half of the run the gradient of all weights up to it is
exactly zero for good, since nothing they could change reaches the loss. Lu et al., 2019 (arXiv:1903.06733) hold that training
leaves a dead relu network the constant it is. Of plain gradient descent that is so; Adam's momentum goes on moving a dead layer
for some steps, and in the small configuration it wakes up once before it dies for good. The loss then is that of the best
constant, the entropy of the label frequencies, and looks like that of a network that learns slowly. The monitor has the step, the
layers and the cause: in the three steps before, ||g|| stood at more than 10 times its first value. Its summary flags "dead" at a
run of layers that begins at the input in the one network, and nothing in the other. Ten seconds on a CPU.
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

from vgrad import Params, data, losses, mlp, monitor, monitor_summary


@dataclass(frozen=True)
class Config:
    width: int = 64
    depth: int = 8
    batch: int = 128
    steps: int = 400
    rates: tuple[float, float] = (0.003, 0.3)  # of the network that lives, and of the one that dies


PAPER, TINY = Config(), Config(width=32, steps=200)
NAMES = ("lives", "dies")


class Result(NamedTuple):
    rates: tuple[float, float]
    entropy: float  # of the label frequencies
    loss: dict  # name -> cross-entropy by step
    log_grad_norm: dict  # name -> ln ||dJ/dW_l||, [step, layer]
    flags: dict  # name -> parameter -> flags at the end
    tables: dict  # name -> the summary as text


def train(config, rate):
    """The loss and ln ||dJ/dW_l|| at every step [T], [T, L], and the optimizer's last state."""
    x, t = (jnp.asarray(a) for a in data.digits().batch(config.batch, 0))
    net = mlp(config.width, "relu", 64, 10, sigma_w=2**0.5)
    by_layer = Params(embed=False, hidden=True, readout=False)
    optimizer = optax.chain(monitor(stacked=by_layer), optax.adam(rate), monitor("update", stacked=by_layer))

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: losses.cross_entropy(net.forward(p, x), t))(params)
        updates, state = optimizer.update(grads, state, params)
        seen = optax.tree.get(state, "log_grad_norm")
        layers = jnp.concatenate([seen.embed.w[None], seen.hidden.w, seen.readout.w[None]])
        return (optax.apply_updates(params, updates), state), (loss, layers)

    def whole(key):
        params = net.init(key, config.depth)
        (_, state), seen = jax.lax.scan(step, (params, optimizer.init(params)), None, length=config.steps)
        return state, seen

    with jax.numpy_dtype_promotion("standard"):  # Adam raises a float to the power of a count
        return jax.jit(whole)(jax.random.key(0))


def run(config: Config) -> Result:
    loss, norms, flags, tables = {}, {}, {}, {}
    for name, rate in zip(NAMES, config.rates, strict=True):
        state, (curve, layers) = train(config, rate)
        summary = monitor_summary(state)
        loss[name], norms[name] = np.asarray(curve).tolist(), np.asarray(layers).tolist()
        flags[name], tables[name] = dict(zip(summary.name, summary.flags, strict=True)), summary.table()
    counts = np.bincount(data.digits().batch(config.batch, 0)[1]) / config.batch
    entropy = -float(np.sum(counts * np.log(counts, where=counts > 0, out=np.zeros_like(counts))))
    return Result(config.rates, entropy, loss, norms, flags, tables)


def death(norms) -> int:
    """The first step from which on the gradient of the first layer is exactly zero; the number of steps if there is none."""
    alive = np.flatnonzero(np.isfinite(np.asarray(norms)[:, 0]))
    return int(alive[-1]) + 1


def check(result: Result) -> None:
    lives, dies = (np.array(result.log_grad_norm[name]) for name in NAMES)
    assert result.loss["lives"][-1] < 0.1, result.loss["lives"][-1]
    assert np.isfinite(lives).all()
    assert not any(result.flags["lives"].values()), result.flags["lives"]
    at = death(dies)
    assert at < len(dies) // 2, at
    assert abs(result.loss["dies"][-1] - result.entropy) < 0.02, (result.loss["dies"][-1], result.entropy)
    assert np.max(dies[max(0, at - 3) : at]) > np.max(dies[0]) + np.log(10), (np.max(dies[0]), dies[max(0, at - 3) : at])
    dead = np.isneginf(dies[-1])
    assert dead.sum() >= 2, dead
    assert dead[: dead.sum()].all(), dead
    flagged = sum("dead" in words for name, words in result.flags["dies"].items() if "/w" in name)
    assert flagged == dead.sum(), result.flags["dies"]


def main() -> None:
    result, folder = run(PAPER), Path("results")
    check(result)
    print(__doc__)
    for name, rate in zip(NAMES, result.rates, strict=True):
        print(f"Learning rate {rate}, {name}. Cross-entropy at the end {result.loss[name][-1]:.3f}\n\n{result.tables[name]}\n")
    folder.mkdir(exist_ok=True)
    (folder / "monitor_training.json").write_text(json.dumps(result._asdict(), indent=1))
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for column, (name, rate) in enumerate(zip(NAMES, result.rates, strict=True)):
        norms = np.array(result.log_grad_norm[name])
        for layer in range(norms.shape[1]):
            shade = str(0.75 * layer / (norms.shape[1] - 1))
            label = {0: "layer 1", norms.shape[1] - 1: f"layer {norms.shape[1]}"}.get(layer)
            line = np.where(np.isfinite(norms[:, layer]), norms[:, layer], np.nan)
            axes[0, column].plot(line, color=shade, linewidth=1, label=label)
        at = death(norms)
        if at < len(norms):
            axes[0, column].axvline(at, linestyle=":", color="C3", label=f"layer 1 exactly zero from step {at} on")
        axes[1, column].semilogy(np.array(result.loss[name]), color="black")
        axes[0, column].set_title(f"{name}: learning rate {rate}")
        axes[1, column].set_xlabel("step of Adam")
        axes[0, column].legend(fontsize=8)
    axes[0, 0].set_ylabel(r"$\ln\,\|\partial J/\partial W_l\|$, nats")
    axes[1, 0].set_ylabel("cross-entropy, nats")
    figure.suptitle("What a monitor in the optimizer sees of a relu network on the digits")
    figure.savefig(folder / "monitor_training.png", dpi=130)


if __name__ == "__main__":
    main()
