"""Watching a training run from inside the optimizer: log norms of every gradient, parameter and update.

    optimizer = optax.chain(vgrad.monitor(), optax.adam(1e-3), vgrad.monitor("update"))

The first monitor sees the gradient and the parameters, the last what is about to be added to them; both hand it on untouched. For
each parameter leaf the state keeps the last reading of ln ||g||, its extremes, and an exponential average over the n readings
that were finite and not zero,

    a_n = a_{n-1} + (1 - d) / (1 - d^n) (ln ||g_n|| - a_{n-1}),

which is the average with weights d^(n-i), rightly normalised from the first step on: nothing needs debiasing later. A NaN
gradient and an exactly zero one have no place in an average of logarithms; they are counted instead.

A norm takes one pass over its array: the plain sum of squares, whose own value tells whether a square has under- or overflowed.
Only then are the entries scaled by a power of two (see `vgrad.scaled`), so ||g|| = 1e-30 in float32 is a reading. A pass takes
the time of reading memory, whatever the batch; where that shows, `every=10` reads each tenth step, with two passes and no branch.
The update monitor costs most: it makes the compiler write the updates to memory, which otherwise go straight into the parameters.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from vgrad.base import Array
from vgrad.scaled import Scaled, log, norm

__all__ = ["GradientMonitorState", "UpdateMonitorState", "monitor"]


class GradientMonitorState(NamedTuple):
    """What `monitor()` keeps. All but `grad_steps` are trees like the parameters, of scalars, or of [L] for a stacked leaf.

    Logarithms are natural, of Frobenius norms; float32, or float64 for a float64 leaf; -inf before the first reading.

    Attributes:
      grad_steps: gradients seen, int32 [].
      log_grad_norm: ln ||g|| of the last one; -inf if it was exactly zero, NaN or inf if it held one.
      log_grad_average: exponential average over the readings that were finite and not zero.
      log_grad_min, log_grad_max: extremes of the same readings; inf and -inf before the first.
      num_nonfinite_grads: steps whose gradient held a NaN or inf, int32.
      num_zero_grads: steps whose gradient was exactly zero, int32.
      log_param_norm: ln ||w||, before the last step.
    """

    grad_steps: Array
    log_grad_norm: Any
    log_grad_average: Any
    log_grad_min: Any
    log_grad_max: Any
    num_nonfinite_grads: Any
    num_zero_grads: Any
    log_param_norm: Any


class UpdateMonitorState(NamedTuple):
    """What `monitor("update")` keeps: as `GradientMonitorState`, of the update u instead of the gradient.

    Attributes:
      update_steps, log_update_norm, log_update_average, log_update_min, log_update_max, num_nonfinite_updates, num_zero_updates: as
        there.
      log_update_ratio: ln(||u|| / ||w||) of the last step, w before it; inf where w is zero.
    """

    update_steps: Array
    log_update_norm: Any
    log_update_average: Any
    log_update_min: Any
    log_update_max: Any
    num_nonfinite_updates: Any
    num_zero_updates: Any
    log_update_ratio: Any


_STATES = {"gradient": GradientMonitorState, "update": UpdateMonitorState}


def monitor(
    of: Literal["gradient", "update"] = "gradient", *, decay: float = 0.99, every: int = 1, stacked: Any = False
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation that passes updates through bit for bit and records their log norms, leaf by leaf, in its state.

    First in a chain it sees the gradient; last in it, with `of="update"`, what is added to the parameters. The state has one
    structure from `init` on, so it can be a scan carry, and its field names are unique: `optax.tree.get(state, "log_grad_norm")`.

    Args:
      of: which of the two it is.
      decay: d of the exponential average over readings, 0 <= d < 1.
      every: steps per reading, the first step being read. Steps between are counted and otherwise not seen.
      stacked: which leaves hold one layer per row of their leading axis, as in a scanned stack, and get a reading per row: a bool,
        or a tree of bools that is a prefix of the parameters, such as `vgrad.Params(embed=False, hidden=True, readout=False)`.
    Returns:
      A transformation whose state is a `GradientMonitorState` or an `UpdateMonitorState`; `vgrad.monitor_summary` tabulates it.
    Raises:
      ValueError: another `of`, `decay` or `every`; from `init`, a `stacked` that does not fit; from `update`, no params, or a tree
        other than that of `init`.
      TypeError: from `init`, a leaf that is not of real or complex floats.

    >>> optimizer = optax.chain(monitor(), optax.sgd(0.1))
    >>> params, grads = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([1e-30, 0.0])}
    >>> updates, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    >>> f"{optax.tree.get(state, 'log_grad_norm')['w']:.3f} {optax.tree.get(state, 'log_param_norm')['w']:.3f}"
    '-69.078 1.609'
    """
    if of not in _STATES:
        raise ValueError(f"of is {of!r}, expected 'gradient' (first in a chain) or 'update' (last in it).")
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay!r}, expected 0 <= decay < 1: 0.99 averages over about 100 readings.")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every is {every!r}, expected an integer of at least 1: steps per reading.")

    def init(params):
        leaves, tree = jax.tree.flatten_with_path(params)
        shapes = [_shape(*leaf, flag) for leaf, flag in zip(leaves, _flags(stacked, params), strict=True)]
        # A buffer of its own for every leaf: a state whose buffers are shared cannot be donated to a jitted step.
        full = lambda v, dtype=None: tree.unflatten([jnp.full(s.shape, v, dtype or s.dtype) for s in shapes])  # noqa: E731
        inf, counts = jnp.inf, (full(0, jnp.int32), full(0, jnp.int32))
        return _STATES[of](jnp.zeros((), jnp.int32), full(-inf), full(-inf), full(inf), full(-inf), *counts, full(-inf))

    def update(updates, state, params=None, **_):
        if params is None:
            raise ValueError("vgrad.monitor got no params: call optimizer.update(grads, state, params).")
        (steps, *fields), tree = state, jax.tree.structure(updates)
        for name, other in (("state", fields[0]), ("params", params)):
            if jax.tree.structure(other) != tree:
                raise ValueError(f"the updates form the tree {tree}, the {name} {jax.tree.structure(other)}; expected the same.")
        flags, dtypes = _flags(stacked, updates), [leaf.dtype for leaf in jax.tree.leaves(fields[0])]
        # A conditional for each leaf: one around all of them would wait for the last gradient, and so would the optimizer.
        due = lambda read, keep, *xs: read(*xs) if every == 1 else lax.cond(steps % every == 0, read, keep, *xs)  # noqa: E731

        def of_leaf(update, weight, flag, dtype, *fields):
            norm = lambda x: _log_norm(x, flag, quick=every == 1).astype(dtype)  # noqa: E731
            # The parameter has one of its own, or it could not be updated in place.
            log_w = due(norm, lambda _: fields[-1], weight)
            read = lambda u, *rest: _reading(of, decay, steps // every + 1, jnp.size(u), norm(u), *rest)  # noqa: E731
            return due(read, lambda u, w, *fields: fields, update, log_w, *fields)

        # Readings are no part of what is trained: a derivative through a training step must not meet the ln of a zero norm.
        seen = lax.stop_gradient((updates, params, *fields))
        leaves = zip(*(jax.tree.leaves(t) for t in seen[:2]), flags, dtypes, *(jax.tree.leaves(t) for t in seen[2:]), strict=True)
        rows = [of_leaf(*leaf) for leaf in leaves]
        fields = [tree.unflatten([row[i] for row in rows]) for i in range(len(fields))]
        return updates, _STATES[of](optax.safe_increment(steps), *fields)

    return optax.GradientTransformationExtraArgs(init, update)


def _flags(stacked, tree):
    """Whether each leaf of the tree is stacked."""
    try:
        spread = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: bool(flag), part), stacked, tree)
    except (ValueError, TypeError) as error:
        raise ValueError(f"stacked is {stacked!r}, expected a bool, or bools that form a prefix of the params: {error}") from error
    return jax.tree.leaves(spread)


def _shape(path, leaf, stacked):
    """Shape and dtype of a leaf's readings."""
    name, dtype = jax.tree_util.keystr(path), jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"parameter {name} has dtype {dtype}, expected floats: leave it out with optax.masked.")
    if stacked and not jnp.ndim(leaf):
        raise ValueError(f"parameter {name} is a scalar, expected a leading axis of layers: mark it as not stacked.")
    return jax.ShapeDtypeStruct(jnp.shape(leaf)[:1] if stacked else (), _wide(dtype))


def _wide(dtype):
    """What norms of this dtype are computed in."""
    return jnp.float64 if jnp.finfo(dtype).bits == 64 else jnp.float32


def _reading(of, decay, num, size, seen, w, last, average, low, high, num_nonfinite, num_zero, extra):
    """The fields of one leaf of `size` entries after reading number `num`, of which ln ||update|| and ln ||w|| are given."""
    counts, zero = jnp.isfinite(seen), jnp.isneginf(seen) & bool(size)
    num_nonfinite, num_zero = num_nonfinite + (seen != seen).astype(jnp.int32), num_zero + zero.astype(jnp.int32)
    n = jnp.maximum(num - num_nonfinite - num_zero, 1)  # how many have counted
    weight = (1 - decay) / -jnp.expm1(n.astype(seen.dtype) * (math.log(decay) if decay else -math.inf))
    average = jnp.where(counts, jnp.where(n == 1, seen, average + weight * (seen - average)), average)
    low, high = jnp.where(counts, jnp.minimum(low, seen), low), jnp.where(counts, jnp.maximum(high, seen), high)
    if of == "update":  # of a zero update the ratio is zero, even where the parameter is
        w = jnp.where(jnp.isneginf(seen), seen, seen - jnp.where(jnp.isneginf(seen), jnp.zeros_like(w), w))
    return seen, average, low, high, num_nonfinite, num_zero, w


def _log_norm(x, stacked, *, quick):
    """ln of the Frobenius norm of x, or of each of its rows; NaN where it holds a NaN or inf. Without a branch unless `quick`."""
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    x = x.astype(_wide(x.dtype))

    def careful(x):
        exact = log(norm(Scaled(x, jnp.zeros((), jnp.int32))))
        return jnp.where(exact < jnp.inf, exact, jnp.nan)

    rows = jax.vmap(careful) if stacked else careful
    if not quick:
        return rows(x)
    f = jnp.finfo(x.dtype)
    sumsq = jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)) if stacked else None)
    # Squares below the least normal number are lost; from this sum on, all of them together are less than its rounding.
    sound = (sumsq < jnp.inf) & (sumsq >= max(x.size, 1) * float(f.tiny) / float(f.eps))
    return lax.cond(jnp.all(sound), lambda x: 0.5 * jnp.log(sumsq), rows, x)
