"""The functions of the length q that mean-field theory is made of, E phi^2, E phi'^2 and d E phi^2 / dq, and their roots.

A root is looked for between the entries of a table over twenty-six decades of q, so that all of them are found and none depends on
a starting value; it is then refined by Newton's method inside its bracket, and differentiated as an implicit function. The table
does not depend on what one sweeps: under `vmap` over sigma_w and sigma_b it is computed once.
"""

import functools
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vgrad import activations, gaussian
from vgrad.base import Array, Phi
from vgrad.initializers import check_sigma

__all__ = [
    "AnyPhi", "Real", "all_roots", "checked", "compiled", "divide", "length_slope", "residual", "root", "second_moment",
    "slope_moment", "table", "tolerance",
]  # fmt: skip

AnyPhi = str | Phi | activations.Activation
Real = float | Array
_LENGTHS = np.concatenate([[0.0], np.geomspace(1e-14, 1e12, 261)])  # zero, then ten a decade


def checked(*numbers):
    """The numbers as arrays of one float dtype."""
    dtype = jnp.result_type(float, *(n for n in numbers if isinstance(n, jax.Array) and jnp.issubdtype(n.dtype, jnp.floating)))
    return [jnp.asarray(n, dtype) for n in numbers]


def compiled(fn):
    """`fn(phi, ...)` as one program for each activation, after a look at its numbers: its steps one by one take seconds to start.

    This is what lets a single answer come in a millisecond. Inside a program of the caller's it changes nothing.
    """
    signature = inspect.signature(fn)
    run = jax.jit(fn, static_argnums=0, static_argnames=[name for name in signature.parameters if name == "num"])

    @functools.wraps(fn)
    def call(phi, *args, **kwargs):
        bound = signature.bind(phi, *args, **kwargs)
        bound.apply_defaults()
        phi, options = bound.arguments.pop("phi"), dict(bound.arguments)
        numbers = {name: n for name, n in options.items() if n is not None and name != "num"}
        for name, number in numbers.items():
            if name in ("sigma_w", "sigma_b", "q", "q_0"):
                check_sigma(name, number)
        options |= zip(numbers, checked(*numbers.values()), strict=True)  # 1, 1.0, np.float64(1) and a default are one program
        return run(activations.facts(phi), **options)

    return call


def second_moment(phi, q):
    """E phi(u)^2, u ~ N(0, q)."""
    return gaussian.expect(lambda z: jnp.square(activations.facts(phi).phi(z)), q, **gaussian.rule_options(phi))


def slope_moment(phi, q):
    """E phi'(u)^2, u ~ N(0, q)."""

    def square(z):
        return jnp.square(jax.jvp(activations.facts(phi).phi, (z,), (jnp.ones_like(z),))[1])

    return gaussian.expect(square, q, **gaussian.rule_options(phi))


def length_slope(phi, q):
    """d E phi^2 / dq. At q = 0, where the density has no derivative, phi'(0)^2 on average of both sides."""
    at_zero = q < 1e-20
    slope = jax.jvp(partial(second_moment, phi), (jnp.where(at_zero, 1.0, q),), (jnp.ones_like(q),))[1]
    return jnp.where(at_zero, slope_moment(phi, jnp.where(at_zero, q, 1.0)), jnp.where(jnp.isnan(q), jnp.nan, slope))


def table(excess, dtype):
    """The lengths of the table, and `excess` at each."""
    lengths = jnp.asarray(_LENGTHS, dtype)
    return lengths, jax.vmap(excess)(lengths)


def all_roots(excess, brackets, num):
    """The first `num` zeros of `excess` that the table brackets, NaN-padded."""
    lengths, values = brackets
    crosses = (values[:-1] * values[1:] < 0) | ((values[1:] == 0) & (values[:-1] != 0))
    crosses = jnp.concatenate([values[:1] == 0, crosses])
    (at,) = jnp.nonzero(crosses, size=num, fill_value=-1)
    roots = jax.vmap(partial(root, excess))(lengths[jnp.maximum(at - 1, 0)], lengths[at])
    good = (at >= 0) & (jax.vmap(partial(residual, excess))(roots) < tolerance(roots))
    return jnp.where(good, roots, jnp.nan)


def root(excess, low, high):
    """The zero of `excess` between two lengths at which it has different signs; differentiable in whatever `excess` closes over."""

    def solve(excess, _):
        rises = excess(high) > excess(low)

        def narrow(_, state):
            low, high, q = state
            value, slope = jax.jvp(excess, (q,), (jnp.ones_like(q),))
            above = (value > 0) == rises
            low, high = jnp.where(above, low, q), jnp.where(above, q, high)
            # At the root itself rounding, which a compiler may do twice and differently, can point out of the bracket: no reason to
            # go back to its middle.
            newton, slack = q - value / slope, (high - low) / 8
            near = (newton >= low - slack) & (newton <= high + slack)
            return low, high, jnp.where(near, jnp.clip(newton, low, high), 0.5 * (low + high))

        middle = jnp.where(low == 0, high, jnp.sqrt(low * high))
        q = lax.fori_loop(0, 6, narrow, (low, high, middle))[2]
        return jnp.where(low == high, low, jnp.where((low == 0) & (excess(low) == 0), low, q))

    return lax.custom_root(excess, 0.5 * (low + high), solve, divide)


def divide(linear, y):
    """The solution of linear(x) = y for a scalar x, as `lax.custom_root` wants it."""
    return y / linear(jnp.ones_like(y))


def residual(excess, q):
    """|excess(q)| in units of q."""
    return jnp.abs(excess(q)) / jnp.maximum(q, 1e-20)


def tolerance(q):
    """The residual beyond which a root is no root."""
    return 1e5 * jnp.finfo(q.dtype).eps
