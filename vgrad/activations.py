"""Activation functions phi, by name or as any callable, and what is known of each.

The backward pass multiplies by phi'(z) at every layer, so whether a gradient can survive is largely a matter of the range of phi'.
Its derivative is taken by autodiff throughout the library; the functions here are written so that autodiff gets it right in the
tails too. `jnp.tanh` and `jax.nn.sigmoid` differentiate (as of jax 0.10) through y (1 - y), and `jax.nn.elu` through y + 1, which
are 0 in float32 from |z| = 9 and |z| = 17 on;

    sigmoid'(z) = bell(z),    tanh'(z) = 4 bell(2 z),    bell(z) = e / (1 + e)^2, e = exp(-|z|),    elu'(z) = exp(min(z, 0)),

are right until e underflows, near |z| = 87, 43.7 and 87. The values are those of jax.
"""

import difflib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from vgrad.base import Phi

__all__ = ["REGISTRY", "Activation", "facts", "get", "softmax", "table"]


class Activation(NamedTuple):
    """An activation and its facts. Ranges are (infimum, supremum); whether they are attained is not said.

    Attributes:
      phi: the function, elementwise; autodiff gives its derivative.
      formula: as printed in the table.
      range: of phi.
      slope_range: of phi', where it exists.
      slopes: limits of phi(z) / z for z -> -inf and z -> +inf.
      breakpoints: where phi or phi' is not smooth: a quadrature should be cut there.
      oscillates: whether it is like sin, with structure at all z.
    """

    phi: Callable
    formula: str
    range: tuple[float, float]
    slope_range: tuple[float, float]
    slopes: tuple[float, float]
    breakpoints: tuple[float, ...] = ()
    oscillates: bool = False


def _with_derivative(phi, derivative):
    phi = jax.custom_jvp(phi)
    phi.defjvp(lambda primals, tangents: (phi(*primals), derivative(*primals) * tangents[0]))
    return phi


def _bell_value(z):
    e = jnp.exp(-jnp.abs(z))
    return e / jnp.square(1 + e)


_bell = _with_derivative(_bell_value, lambda z: -_bell(z) * tanh(z / 2))  # smooth, which autodiff of |z| would not be at 0
sigmoid = _with_derivative(jax.nn.sigmoid, _bell)
tanh = _with_derivative(jnp.tanh, lambda z: 4 * _bell(2 * z))
softplus = _with_derivative(jax.nn.softplus, lambda z: sigmoid(z))
elu = _with_derivative(lambda z: jax.nn.elu(z), lambda z: jnp.exp(jnp.minimum(z, 0)))
selu = _with_derivative(jax.nn.selu, lambda z: jnp.where(z > 0, _SELU[0], _SELU[1] * jnp.exp(jnp.minimum(z, 0))))


def silu(z):
    return z * sigmoid(z)


def gelu(z):
    return 0.5 * z * jax.scipy.special.erfc(-z * math.sqrt(0.5))


def gelu_tanh(z):
    # (1 + tanh u) / 2 = sigmoid(2 u), without the cancellation at large negative u, and saturated long before the cube overflows.
    near = jnp.clip(z, -1e3, 1e3)
    return z * sigmoid(2 * math.sqrt(2 / math.pi) * (near + 0.044715 * near**3))


def identity(z):
    return z


def leaky_relu(z):
    return jax.nn.leaky_relu(z, 0.01)


def softmax(z):
    """exp(z_i) / sum_j exp(z_j) over the last axis, in (0, 1): an output. Its units depend on one another, so it is no phi."""
    return jax.nn.softmax(z, axis=-1)


_INF = math.inf
_SELU = 1.0507009873554805, 1.0507009873554805 * 1.6732632423543772  # lambda, lambda * alpha of Klambauer et al., 2017

REGISTRY: dict[str, Activation] = {
    "identity": Activation(identity, "z", (-_INF, _INF), (1, 1), (1, 1)),
    "sigmoid": Activation(sigmoid, "1 / (1 + exp(-z))", (0, 1), (0, 0.25), (0, 0)),
    "tanh": Activation(tanh, "tanh(z)", (-1, 1), (0, 1), (0, 0)),
    "relu": Activation(jax.nn.relu, "max(z, 0)", (0, _INF), (0, 1), (0, 1), (0.0,)),
    "leaky_relu": Activation(leaky_relu, "max(z, 0.01 z)", (-_INF, _INF), (0.01, 1), (0.01, 1), (0.0,)),
    "erf": Activation(jax.lax.erf, "erf(z)", (-1, 1), (0, 2 / math.sqrt(math.pi)), (0, 0)),
    "sin": Activation(jnp.sin, "sin(z)", (-1, 1), (-1, 1), (0, 0), oscillates=True),
    "hard_tanh": Activation(jax.nn.hard_tanh, "min(max(z, -1), 1)", (-1, 1), (0, 1), (0, 0), (-1.0, 1.0)),
    "elu": Activation(elu, "z if z > 0 else exp(z) - 1", (-1, _INF), (0, 1), (0, 1), (0.0,)),
    "selu": Activation(
        selu, "1.0507 z if z > 0 else 1.7581 (exp(z) - 1)", (-_SELU[1], _INF), (0, _SELU[1]), (0, _SELU[0]), (0.0,)
    ),
    "softplus": Activation(softplus, "ln(1 + exp(z))", (0, _INF), (0, 1), (0, 1)),
    "gelu": Activation(
        gelu, "z (1 + erf(z / sqrt 2)) / 2", (-0.16997120747990366, _INF), (-0.12890414518515479, 1.1289041451851548), (0, 1)
    ),
    "gelu_tanh": Activation(
        gelu_tanh,
        "z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2",
        (-0.17004075057125405, _INF),
        (-0.12899306865877177, 1.1289930686587718),
        (0, 1),
    ),
    "silu": Activation(
        silu, "z / (1 + exp(-z))", (-0.27846454276107380, _INF), (-0.09983932012886692, 1.0998393201288669), (0, 1)
    ),
}


def facts(phi: "str | Phi | Activation") -> Activation:
    """What is known of an activation, by name, by its function or as an `Activation` of your own; NaN where nothing is known."""
    if isinstance(phi, Activation):
        return phi
    known = REGISTRY.get(phi) if isinstance(phi, str) else next((a for a in REGISTRY.values() if a.phi is phi), None)
    nan = math.nan
    return known or Activation(get(phi), getattr(phi, "__name__", repr(phi)), (nan, nan), (nan, nan), (nan, nan))


def get(phi: "str | Phi | Activation") -> Phi:
    """The function of a registered name or of an `Activation`, or `phi` itself if it is an elementwise function.

    Raises:
      ValueError: unknown name; or a callable that changes the shape or the dtype, or is not elementwise.
      TypeError: neither a name nor callable, or a callable that does not return a jax array.
    """
    if isinstance(phi, str):
        if phi in REGISTRY:
            return REGISTRY[phi].phi
        if phi == "softmax":
            raise ValueError("softmax is not elementwise, so it cannot be phi; pass it as the network's `output`.")
        near = difflib.get_close_matches(phi.lower(), REGISTRY, 1)
        raise ValueError(
            f"unknown activation {phi!r}" + (f", did you mean {near[0]!r}?" if near else ".") + f" Known: {', '.join(REGISTRY)}."
        )
    if isinstance(phi, Activation):
        phi = phi.phi
    if not callable(phi):
        raise TypeError(f"phi is {type(phi).__name__}, expected a name or an elementwise function of an array.")
    if not any(phi is a.phi for a in REGISTRY.values()):
        _check_elementwise(phi)
    return phi


def _check_elementwise(phi):
    name = getattr(phi, "__name__", repr(phi))
    with jax.ensure_compile_time_eval():  # concrete numbers even where a network is built inside a trace
        z = np.array([[-1.5, 0.25], [0.75, 2.0]], jnp.result_type(float))
        whole = phi(jnp.asarray(z))
        if not isinstance(whole, jax.Array):
            raise TypeError(f"phi={name} returned {type(whole).__name__}, expected a jax array: write it with jax.numpy.")
        if whole.shape != z.shape or whole.dtype != z.dtype:
            raise ValueError(
                f"phi={name} maps {z.dtype}{list(z.shape)} to {whole.dtype}{list(whole.shape)}, expected the same shape and "
                "dtype: phi acts on each unit alone."
            )
        if isinstance(whole, jax.core.Tracer):  # phi has a traced parameter, a slope being swept say: no values to compare
            return
        single = np.reshape(jax.vmap(phi)(jnp.asarray(z.reshape(4, 1))), z.shape)
        if not np.allclose(whole, single, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"phi={name} is not elementwise: one unit's value changes with its neighbours (softmax, normalisation?). "
                "Pass such a function as the network's `output`, or put it in a block with vgrad.layers.plain."
            )


def table() -> str:
    """The registry as a Markdown table."""

    def show(v):
        return "-inf" if v == -_INF else "inf" if v == _INF else f"{v:.5g}"

    rows = ["| name | phi(z) | range of phi | range of phi' | slope at -inf | slope at +inf |", "|---|---|---|---|---|---|"]
    for name, a in REGISTRY.items():
        ranges = (f"({show(lo)}, {show(hi)})" if lo != hi else f"{{{show(lo)}}}" for lo, hi in (a.range, a.slope_range))
        rows.append(f"| `{name}` | {a.formula} | {' | '.join(ranges)} | {show(a.slopes[0])} | {show(a.slopes[1])} |")
    rows.append("| `softmax` (output) | exp(z_i) / sum_j exp(z_j) | (0, 1) | (-0.25, 0.25) | 0 | 0 |")
    return "\n".join(rows)
