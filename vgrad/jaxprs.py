"""Reading jaxprs, of any jax release, by public names alone.

A jaxpr is a list of equations, `outputs = primitive[parameters] inputs`. Where the parameters of a primitive differ from release to
release, what they say is read off the shapes of its operands instead: of a scan over T iterations, for instance,

    operands that are scanned over have one axis more outside than inside the body;  constants and carried values have not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.extend import core

__all__ = [
    "CHECKPOINTS", "INLINED", "LAYOUT", "PRODUCTS", "Weights", "activation", "bodies", "evaluate", "is_float", "is_literal",
    "moved", "opened", "products", "split_operands", "units",
]  # fmt: skip

INLINED = {"jit", "pjit", "closed_call", "core_call"}
CHECKPOINTS = {"checkpoint", "remat", "remat2"}
PRODUCTS = {"dot_general": "dot", "ragged_dot": "dot", "ragged_dot_general": "dot", "conv_general_dilated": "conv"}
# What moves entries, and computes nothing from them.
LAYOUT = {
    "broadcast_in_dim", "convert_element_type", "copy", "dynamic_slice", "expand_dims", "gather", "name", "pad", "reduce_precision",
    "reshape", "reshard", "rev", "sharding_constraint", "slice", "split", "squeeze", "tile", "transpose", "unstack",
}  # fmt: skip
_NONLINEAR = {"tanh": "tanh", "logistic": "sigmoid", "erf": "erf", "erfc": "erf", "sin": "sin"}
_NAMED = {"elu", "gelu", "hard_tanh", "leaky_relu", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "celu", "mish"}


def is_literal(v) -> bool:
    """Whether an operand is a number written into the equation."""
    return isinstance(v, core.Literal)


def is_float(x) -> bool:
    """Whether a value, or what is known of one, is real or complex floating-point."""
    return jnp.issubdtype(getattr(x, "dtype", jax.dtypes.float0), jnp.inexact)


def opened(jaxpr) -> tuple[Any, list]:
    """A jaxpr, open or closed, as an open one and its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def bodies(eqn) -> list:
    """The jaxprs that an equation holds: the body of a loop, the branches of a conditional."""
    values = [w for v in eqn.params.values() for w in (v if isinstance(v, tuple | list) else (v,))]
    return [v for v in values if isinstance(v, core.ClosedJaxpr | core.Jaxpr)]


def products(body) -> list[str]:
    """The kinds of all matrix products and convolutions in a body and in those within it."""
    found = []
    for eqn in opened(body)[0].eqns:
        kind = PRODUCTS.get(eqn.primitive.name)
        found += [kind] if kind else [k for b in bodies(eqn) for k in products(b)]
    return found


def split_operands(eqn, body) -> tuple[int, int]:
    """Numbers of constants and of carried values of a scan; the rest of its operands is scanned over."""
    extra = lambda outer, inner: sum(len(o.aval.shape) > len(i.aval.shape) for o, i in zip(outer, inner, strict=True))  # noqa: E731
    num_carry = len(eqn.outvars) - extra(eqn.outvars, body.outvars)
    return len(eqn.invars) - num_carry - extra(eqn.invars, body.invars), num_carry


def units(eqn, operand: int, output: int, own: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of an output that count units: those that come from the weights.

    Of axes that are the data's as well, those in `own`, along which the weights are not broadcast: experts, members of an ensemble.
    """
    ndim = len(eqn.outvars[output].aval.shape)
    if eqn.primitive.name == "dot_general":
        contracted, batched = eqn.params["dimension_numbers"]
        free = len(eqn.invars[operand].aval.shape) - len(contracted[0]) - len(batched[0])
        first = len(batched[0]) if operand == 0 else ndim - free
        return (*(j for j, a in enumerate(batched[operand]) if a in own), *range(first, first + free))
    if eqn.primitive.name == "conv_general_dilated":
        return (eqn.params["dimension_numbers"].out_spec[1],)
    return (ndim - 1,) if ndim else ()


def moved(eqn, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where a layout equation puts these axes of its operand; None where it mixes them with others, or is not understood."""
    name, old, new = eqn.primitive.name, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if name == "transpose":
        return tuple(j for j, a in enumerate(eqn.params["permutation"]) if a in axes)
    if name == "broadcast_in_dim":
        to = eqn.params["broadcast_dimensions"]
        return tuple(to[a] for a in axes if old[a] == new[to[a]])
    if name == "unstack":
        axis = eqn.params["axis"]
        return tuple(a - (a > axis) for a in axes if a != axis)
    if name == "tile" and len(old) == len(new):
        return tuple(a for a in axes if old[a] > 1 or new[a] == 1)
    if name in ("reshape", "expand_dims", "squeeze"):
        return _regrouped(old, new, axes)
    return axes if len(old) == len(new) and name != "gather" else None


def _regrouped(old, new, axes):
    """Where a reshape in row-major order puts these axes: the shapes fall into groups of equal size, from left to right."""
    if 0 in old:
        return None
    i = j = 0
    found = []
    while i < len(old) and j < len(new):
        first, second, left, right = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        inside = {a in axes for a in range(first, i) if old[a] != 1}
        if len(inside) == 2:
            return None
        found += range(second, j) if inside == {True} else []
    return tuple(found)


def activation(eqn) -> str:
    """The name of the activation that an equation is, or ""."""
    name = eqn.primitive.name
    if name in _NONLINEAR:
        return _NONLINEAR[name]
    if name == "max":
        return "relu" if any(is_literal(v) and not v.aval.shape and v.val == 0 for v in eqn.invars) else ""
    if name not in INLINED and name != "custom_jvp_call":
        return ""
    if eqn.params.get("name") in _NAMED:
        return eqn.params["name"]
    if name == "custom_jvp_call" and not any(products(b) for b in bodies(eqn)):
        return next((n for b in bodies(eqn) for e in opened(b)[0].eqns if (n := activation(e))), "")
    return ""


def evaluate(jaxpr, eqn, xs) -> list:
    """The outputs of one equation of a jaxpr, through jax's own evaluator: with its name stack and under its settings."""
    given = {v: x for v, x in zip(eqn.invars, xs, strict=True) if not is_literal(v)}
    info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    one = core.Jaxpr([], list(given), eqn.outvars, [eqn], eqn.effects, debug_info=info)
    return list(jax.core.eval_jaxpr(one, [], *given.values()))


class Weights(NamedTuple):
    """A value computed from parameters alone, as a function of one of them.

    Attributes:
      key: stands for the parameter.
      leaf: its value.
      make: computes the value again, from a memo that holds the parameter under its key and takes what is computed on the way.
    """

    key: object
    leaf: Any
    make: Callable[[dict], Any]

    @classmethod
    def leaf_of(cls, x) -> "Weights":
        """A value as a parameter of its own."""
        key, x = object(), lax.stop_gradient(x)
        return cls(key, x, lambda memo: memo.get(key, x))

    @classmethod
    def derived(cls, jaxpr, eqn, xs, known: "dict[int, Weights]", k: int) -> "Weights":
        """The output of an equation, as a function of the parameter behind its operand k, by all roads that lead from there."""
        me, parts = object(), [known.get(j) or cls.leaf_of(x) for j, x in enumerate(xs)]

        def make(memo):
            if me not in memo:
                memo[me] = evaluate(jaxpr, eqn, [p.make(memo) for p in parts])[0]
            return memo[me]

        return cls(parts[k].key, parts[k].leaf, make)
