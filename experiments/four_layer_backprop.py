"""The four-layer network of textbooks written out: every backward equation checked, and the factors of dW_1 shown.

    Z_l = W_l A_{l-1} + b_l,  A_l = phi(Z_l) but A_4 = g(Z_4),  A_0 = X, a column per sample,  J = ||A_4 - T||^2 / (2 m)
    dA_4 = (A_4 - T) / m,  dA_l = W_{l+1}^T dZ_{l+1},  dZ_l = dA_l * phi'(Z_l),  dW_l = dZ_l A_{l-1}^T,  db_l = row sums of dZ_l

Claim, in float64 and relative to their largest entries: these sixteen, with g' for phi' in dZ_4, are within 1e-12 of `jax.grad`,
1e-7 of central differences and 1e-12 of `vgrad.backprop`, where samples are rows. To 1e-12, nine factors in this order make
dW_1^T = X^T [(((dA_4 * g'(Z_4)) W_4^T * phi'(Z_3)) W_3^T * phi'(Z_2)) W_2^T * phi'(Z_1)]. Ten seconds on a CPU.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

from vgrad import activations, backprop, losses, mlp


@dataclass(frozen=True)
class Config:
    phi: str = "tanh"
    output: str = "sigmoid"
    sizes: tuple[int, ...] = (10, 16, 3, 12)  # inputs, units per layer, outputs, samples
    step: float = 1e-5  # of the central differences: they lose step^2 to curvature and 1e-16 / step to rounding


PAPER, TINY = Config(), Config(sizes=(3, 4, 2, 5))
LIMITS = {"jax.grad": 1e-12, "differences": 1e-7, "vgrad.backprop": 1e-12, "nine factors": 1e-12}  # the claim


class Result(NamedTuple):
    errors: dict  # route, as in LIMITS -> quantity, "Z3" for dZ_3 -> largest difference over largest entry
    factors: list  # of dW_1^T: (name, kind, shape, norm of X^T times the factors so far)


def written_out(p, X, T, phi, g):
    """The forward and the backward pass, equation by equation. The slopes of phi and g are those of autodiff."""
    slope = lambda f, Z: jax.jvp(f, (Z,), (jnp.ones_like(Z),))[1]  # noqa: E731
    A1 = phi(Z1 := p["W1"] @ X + p["b1"])
    A2 = phi(Z2 := p["W2"] @ A1 + p["b2"])
    A3 = phi(Z3 := p["W3"] @ A2 + p["b3"])
    A4 = g(Z4 := p["W4"] @ A3 + p["b4"])
    dZ4 = (dA4 := (A4 - T) / X.shape[1]) * slope(g, Z4)
    dZ3 = (dA3 := p["W4"].T @ dZ4) * slope(phi, Z3)
    dZ2 = (dA2 := p["W3"].T @ dZ3) * slope(phi, Z2)
    dZ1 = (dA1 := p["W2"].T @ dZ2) * slope(phi, Z1)
    d = dict(A4=dA4, A3=dA3, A2=dA2, A1=dA1, Z4=dZ4, Z3=dZ3, Z2=dZ2, Z1=dZ1)
    d |= dict(W4=dZ4 @ A3.T, W3=dZ3 @ A2.T, W2=dZ2 @ A1.T, W1=dZ1 @ X.T)
    return d | {f"b{l}": d[f"Z{l}"].sum(axis=1, keepdims=True) for l in (4, 3, 2, 1)}


def cost(p, X, T, phi, g):
    """J, where what p holds under Zl and Al, zeros, is added to Z_l and A_l: dJ with respect to it is dZ_l and dA_l."""
    A = X
    for l in (1, 2, 3, 4):
        A = (g if l == 4 else phi)(p[f"W{l}"] @ A + p[f"b{l}"] + p[f"Z{l}"]) + p[f"A{l}"]
    return losses.squared_error(A.T, T.T)


def columns(name, layers):
    """What the library has for layers 1 to 4, in the textbook's form."""
    first, hidden, last = map(np.asarray, layers)
    return {f"{name}{l}": np.atleast_2d(a).T for l, a in enumerate([first, *hidden, last], start=1)}


def run(config: Config) -> Result:
    (in_dim, width, out_dim, batch), options = config.sizes, dict(phi=config.phi, output=config.output)
    with jax.enable_x64(True):
        params = jax.jit(mlp(width, config.phi, in_dim, out_dim, sigma_b=0.2).init, static_argnums=1)(jax.random.key(0), 4)
        x, t = (jnp.asarray(np.random.default_rng(s).normal(size=(batch, n))) for s, n in enumerate((in_dim, out_dim)))
        p = columns("W", [q.w for q in params]) | columns("b", [q.b for q in params])
        args = x.T, t.T, activations.get(config.phi), activations.get(config.output)
        ours = jax.device_get(jax.jit(lambda p: written_out(p, *args))(p))
        flat, unravel = ravel_pytree(p | {k: np.zeros_like(d) for k, d in ours.items() if k[0] in "ZA"})
        J = lambda flat: cost(unravel(flat), *args)  # noqa: E731
        slope = jax.vmap(lambda e: (J(flat + e) - J(flat - e)) / (2 * config.step))
        auto, differences = jax.jit(jax.grad(J))(flat), jax.jit(slope)(config.step * np.eye(flat.size))
        delta, grads = jax.jit(lambda q: backprop.backward_pass(q, x, ours["A4"].T, **options))(params)
        library = columns("Z", delta) | columns("W", [q.w for q in grads]) | columns("b", [q.b for q in grads])
        factors = backprop.expanded_product(params, x, ours["A4"].T, **options)
        so_far = jax.jit(lambda: [x, *(backprop.multiply_out(factors[:i]) for i in range(2, 10))])()
        routes = zip(LIMITS, (unravel(auto), unravel(differences), library, {"W1": so_far[-1].T}), strict=True)
        error = lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b)))  # noqa: E731
        return Result(
            {route: {k: error(ours[k], d) for k, d in theirs.items()} for route, theirs in routes},
            [(f.name, f.kind, f.array.shape, float(np.linalg.norm(a))) for f, a in zip(factors, so_far, strict=True)],
        )


def check(result: Result) -> None:
    assert [len(errors) for errors in result.errors.values()] == [16, 16, 12, 1]
    for route, errors in result.errors.items():
        assert max(errors.values()) < LIMITS[route], f"{route}: {errors}, expected each below {LIMITS[route]}"
    assert " ".join(f[0] for f in result.factors) == "X^T dA_4 g'(Z_4) W_4^T phi'(Z_3) W_3^T phi'(Z_2) W_2^T phi'(Z_1)"


def main() -> None:
    result, folder = run(PAPER), Path("results")
    check(result)
    print(f"{__doc__}\nlargest error / largest entry", *(f"{route:>14}" for route in LIMITS))
    for k in (kind + l for l in "4321" for kind in "AZWb"):
        print(f"d{k[0]}_{k[1]:27}", *(f"{e[k]:14.1e}" if k in e else " " * 14 for e in result.errors.values()))
    for name, kind, shape, norm in result.factors:
        print(f"{name:10} {kind:12} {shape!s:9} norm of X^T times the factors so far: {norm:.3g}")
    folder.mkdir(exist_ok=True)
    (folder / "four_layer_backprop.json").write_text(json.dumps(result._asdict(), indent=1))
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    figure.subplots().semilogy([f[0] for f in result.factors], [f[3] for f in result.factors], "o-")
    figure.suptitle("dW_1 of a four-layer network: norm of X^T times the factors so far")
    figure.savefig(folder / "four_layer_backprop.png", dpi=130)


if __name__ == "__main__":
    main()
