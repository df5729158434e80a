"""Post-LN against pre-LN: the gradient of a flax transformer at initialization, the model unchanged, through `vgrad.diagnose`.

Xiong et al., 2020 (arXiv:2002.04745, section 3): post-LN starts with large gradients near the output, whatever its depth L, and
that is why it needs a warm-up; those of pre-LN fall as 1 / sqrt(L) and are about the same in every layer. Liu et al., 2020
(arXiv:2004.08249): nor do they vanish in post-LN, in the encoder. Measured, ||dJ/dW|| of the second product of the feed-forward
part:

    in the last layer, from depth 6 to 24: post-LN within 0.35 nats, pre-LN by -ln(4) / 2 within 0.35    both were right
    in the last layer: post-LN larger, by more than 0.4 nats at depth 6 and more than 1 at depth 24      right
    first layer over last, pre-LN: ln(L) / 2 within 0.5, so a factor 2 to 5                              not "about the same"
    first layer over last, post-LN: between -1.5 and 0.5 nats, no vanishing to speak of                  Liu et al. were right

So the gradient of pre-LN is as 1 / sqrt(l) in layer l, whatever the depth, and the curves of depths 6 and 24 lie on each other
within 0.2 nats: the 1 / sqrt(L) is that of the last layer. Layer l reads its stream, of variance l, through a normalisation that
divides the gradient by sqrt(l). Four minutes on a CPU.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vgrad import diagnose


@dataclass(frozen=True)
class Config:
    width: int = 64
    heads: int = 4
    tokens: int = 16
    batch: int = 8
    depths: tuple[int, ...] = (6, 24)
    num_seeds: int = 6


PAPER, TINY = Config(), Config(depths=(6,), num_seeds=1)
KINDS = ("post-LN", "pre-LN")
SITE = "params/blocks/down/kernel"  # the second product of the feed-forward part, as in the paper's figure 3


class Result(NamedTuple):
    depths: tuple[int, ...]
    log_grad_w: dict  # kind -> depth -> by seed and layer: ln ||dJ/dW|| of the second product of the feed-forward part
    log_delta: dict  # the same of its delta
    rates: dict  # kind -> depth -> by seed: change of ln ||delta|| per site toward the input, as the diagnosis has it


class Block(nn.Module):
    """One layer: attention and a feed-forward part, each with its skip connection."""

    heads: int
    pre: bool

    @nn.compact
    def __call__(self, x, _):
        n = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        up, down = nn.Dense(4 * n, name="up"), nn.Dense(n, name="down")
        for branch in (attention, lambda h: down(nn.relu(up(h)))):
            norm = nn.LayerNorm()
            x = x + branch(norm(x)) if self.pre else norm(x + branch(x))
        return x, None


class Transformer(nn.Module):
    depth: int
    heads: int
    pre: bool

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        x, _ = stack(self.heads, self.pre, name="blocks")(x, None)
        return nn.LayerNorm(name="final")(x) if self.pre else x


def run(config: Config) -> Result:
    shape = (config.batch, config.tokens, config.width)
    grads, deltas, rates = ({kind: {} for kind in KINDS} for _ in range(3))
    for kind in KINDS:
        for depth in config.depths:
            model = Transformer(depth, config.heads, kind == "pre-LN")

            def loss_fn(params, x, target, model=model):
                return jnp.mean(jnp.sum(model.apply(params, x) * target, axis=-1))

            reports = []
            init = jax.jit(model.init)
            for seed in range(config.num_seeds):
                keys = jax.random.split(jax.random.key(seed), 3)
                x, target = (jax.random.normal(key, shape) for key in keys[1:])
                reports.append(diagnose(loss_fn, init(keys[0], x), x, target))
            rows = [reports[0].site.index(f"{SITE}[{i}]") for i in range(depth)]
            grads[kind][str(depth)] = [r.log_grad_w[rows].tolist() for r in reports]
            deltas[kind][str(depth)] = [r.log_delta[rows].tolist() for r in reports]
            rates[kind][str(depth)] = [r.rate.value for r in reports]
    return Result(config.depths, grads, deltas, rates)


def check(result: Result) -> None:
    of = lambda kind, depth: np.mean(result.log_grad_w[kind][str(depth)], axis=0)  # noqa: E731
    for depth in result.depths:
        post, pre = of("post-LN", depth), of("pre-LN", depth)
        assert post[-1] - pre[-1] > (0.4 if depth < 24 else 1.0), (depth, post[-1], pre[-1])
        assert abs(pre[0] - pre[-1] - np.log(depth) / 2) < 0.5, (depth, pre[0], pre[-1])
        assert -1.5 < post[0] - post[-1] < 0.5, (depth, post[0], post[-1])
    shallow, deep = result.depths[0], result.depths[-1]
    change = {kind: of(kind, deep)[-1] - of(kind, shallow)[-1] for kind in KINDS}
    apart = of("pre-LN", deep)[:shallow] - of("pre-LN", shallow)
    assert np.max(np.abs(apart)) < 0.2, apart
    assert abs(change["post-LN"]) < 0.35, change
    assert abs(change["pre-LN"] + np.log(deep / shallow) / 2) < 0.35, change


def main() -> None:
    result, folder = run(PAPER), Path("results")
    print(f"{__doc__}\n{'':8}{'depth':>6}{'ln||dW||, first layer':>24}{'last layer':>20}{'rate of delta, nats a site':>30}")
    for kind in KINDS:
        for depth in result.depths:
            w = np.array(result.log_grad_w[kind][str(depth)])
            rate = np.array(result.rates[kind][str(depth)])
            cells = [f"{v.mean():+.3f} ± {v.std(ddof=1) / len(v) ** 0.5:.3f}" for v in (w[:, 0], w[:, -1], rate)]
            print(f"{kind:8}{depth:6}{cells[0]:>24}{cells[1]:>20}{cells[2]:>30}")
    check(result)
    folder.mkdir(exist_ok=True)
    (folder / "diagnose_flax_transformer.json").write_text(json.dumps(result._asdict(), indent=1))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = {r"$\ln\,\|\partial J/\partial W\|$": result.log_grad_w, r"$\ln\,\|\delta\|$": result.log_delta}
    for ax, (title, values) in zip(figure.subplots(1, 2, sharex=True), panels.items(), strict=True):
        for kind, colour in zip(KINDS, ("C0", "C1"), strict=True):
            for depth, style in zip(result.depths, ("--s", "-o"), strict=True):
                lines = np.array(values[kind][str(depth)])
                mean, error = lines.mean(axis=0), lines.std(axis=0, ddof=1) / len(lines) ** 0.5
                at = np.arange(1, depth + 1)
                ax.plot(at, mean, style, color=colour, markersize=3, label=f"{kind}, {depth} layers")
                ax.fill_between(at, mean - error, mean + error, color=colour, alpha=0.25, linewidth=0)
        ax.set(xlabel="layer (1 = nearest the input)", title=title, ylabel="nats")
    ax.legend(fontsize=8)
    figure.suptitle("Second product of the feed-forward part at initialization; mean over seeds ± s.e.")
    figure.savefig(folder / "diagnose_flax_transformer.png", dpi=130)


if __name__ == "__main__":
    main()
