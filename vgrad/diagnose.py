"""Where does the gradient of somebody else's model die, and why? The measurement.

    report = vgrad.diagnose(loss_fn, params, *args)

for any differentiable function of a pytree of parameters: nothing is registered or rewritten, and no framework is imported. The
function is traced, `vgrad.sites` finds the products that parameters feed, `vgrad.instrument` puts a probe behind each of them, and
one backward pass reads them all,

    delta = dJ/dz,    dJ/dW = (dz/dW)^T delta,

at any magnitude: cotangents are carried as numbers and a common power of two. It costs about one gradient and its compilation:
seconds for a hundred sites that are written out, little in a scan.

>>> import jax, jax.numpy as jnp, numpy as np, vgrad
>>> params = [np.random.default_rng(i).standard_normal((50, 50), np.float32) / 50**0.5 for i in range(12)]
>>> def loss_fn(params, x):
...     for w in params:
...         x = jax.nn.sigmoid(x @ w)
...     return jnp.sum(x)
>>> report = vgrad.diagnose(loss_fn, params, np.ones((8, 50), np.float32))
>>> report.site[:2], report.activation[0], bool(report.log_delta[0] < report.log_delta[-1] - 10)
(('0', '1'), 'sigmoid', True)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vgrad.base import Array
from vgrad.diagnosis import Diagnosis, following_site
from vgrad.instrument import probes_for, run
from vgrad.jaxprs import opened
from vgrad.probes import zero_token
from vgrad.sites import Plan, Site, analyse, tap

__all__ = ["Diagnosis", "Program", "diagnose", "instrumented", "rows_of", "tap"]


def diagnose(loss_fn: Callable, params: Any, *args, has_aux: bool = False, batches: Sequence[tuple] | None = None) -> Diagnosis:
    """What the gradient of a loss does on its way through a model.

    Args:
      loss_fn: (params, *args) -> scalar, or (scalar, aux) if `has_aux`. Any differentiable, traceable function.
      params: pytree of parameters; its array leaves are floats. Leaves that are no arrays, such as functions, are left alone.
      *args: what else `loss_fn` takes. Arrays are traced; Python numbers, strings and functions are passed as they are.
      has_aux: as in `jax.grad`.
      batches: several tuples of arguments instead of `args`, of the same shapes: batches of data, or keys. The report then holds
        means over them, and their standard deviations in `Diagnosis.spread`.
    Returns:
      A `Diagnosis`, one row per site. Print it.
    Raises:
      TypeError: parameters that are not floats, or a `loss_fn` that cannot be traced.
      ValueError: no parameters; a loss that is not a real scalar; no site found; batches that differ in shape.
    """
    if batches is not None and args:
        raise ValueError(f"got {len(args)} arguments and batches, expected one or the other: batches=[(x1, t1), (x2, t2), ...].")
    runs = [args] if batches is None else [b if isinstance(b, tuple) else (b,) for b in batches]
    if not runs:
        raise ValueError("batches is empty, expected at least one tuple of arguments.")
    program, arrays = instrumented(loss_fn, params, runs[0], has_aux=has_aux, alone=len(runs) == 1)
    read = []
    for other in runs:
        now, _ = _arrays(other)
        if jax.tree.map(_kind, now) != jax.tree.map(_kind, arrays):
            raise ValueError("batches differ in the shapes or dtypes of their arrays, expected equal ones: drop the last.")
        read.append(jax.device_get(program.measure(zero_token(), program.consts, program.leaves, now)))
    return _assemble(program.plan, program.names, program.leaves, read)


class Program(NamedTuple):
    """A loss that was traced and instrumented.

    Attributes:
      plan: its sites.
      names, leaves: its parameters.
      consts: the arrays it closes over.
      measure: jitted (zero token, consts, leaves, arrays) -> (loss, readings by site, which leaves are not finite). What is closed
        over is an argument too: large data would be compiled in.
    """

    plan: Plan
    names: list[str]
    leaves: list[Array]
    consts: list
    measure: Callable


def instrumented(loss_fn: Callable, params, args: tuple, *, has_aux: bool = False, alone: bool = True) -> tuple[Program, list]:
    """The program behind `diagnose`, and the arrays in `args`. `alone`: it may be traced for these arrays and no others."""
    names, leaves, rebuild = _parameters(params)
    arrays, restore = _arrays(args)
    closed = _trace(loss_fn, has_aux, rebuild, restore, leaves, arrays, alone=alone)
    plan = analyse(closed, names)
    if not plan.sites:
        raise ValueError(
            f"no site found: no matrix product, convolution or tap is fed by the parameters {', '.join(names[:5])}. Expected "
            "weights that reach a product through reshape, transpose or slice; mark other values by vgrad.tap(x, 'name')."
        )
    jaxpr, consts = opened(closed)

    @jax.jit
    def measure(zero, consts, leaves, arrays):
        def probed(probes):
            out, token, facts = run(plan, jaxpr, [*consts, *leaves, *arrays], probes, zero)
            return (out[0], token), facts

        (loss, token), vjp, facts = jax.vjp(probed, probes_for(plan), has_aux=True)
        (stats,) = vjp((jnp.ones_like(loss), jnp.zeros_like(token)))
        bad = [~jnp.all(jnp.isfinite(leaf)) for leaf in leaves]
        return loss, _by_site(plan, stats, facts), bad

    return Program(plan, names, leaves, consts, measure), arrays


def _parameters(params):
    """Names and values of the float leaves, and the function that puts them back between the others."""
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    mine = [k for k, (_, leaf) in enumerate(flat) if _is_array(leaf) or isinstance(leaf, float)]
    names = [jax.tree_util.keystr(flat[k][0], simple=True, separator="/") or "params" for k in mine]
    if not mine:
        raise ValueError(f"params has no array leaves (a {type(params).__name__}), expected a pytree of float arrays.")
    for k, name in zip(mine, names, strict=True):
        dtype = jnp.result_type(flat[k][1])
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"parameter {name} has dtype {dtype}, expected floats: differentiate what is real, and pass counters, keys and "
                "statistics in another argument."
            )

    def rebuild(leaves):
        whole = [leaf for _, leaf in flat]
        for k, leaf in zip(mine, leaves, strict=True):
            whole[k] = leaf
        return jax.tree.unflatten(tree, whole)

    return names, [jnp.asarray(flat[k][1]) for k in mine], rebuild


def _arrays(args):
    """The arrays in the arguments, and the function that puts arrays back in their places."""
    flat, tree = jax.tree.flatten(args)
    mine = [k for k, leaf in enumerate(flat) if _is_array(leaf)]

    def restore(arrays):
        whole = list(flat)
        for k, x in zip(mine, arrays, strict=True):
            whole[k] = x
        return jax.tree.unflatten(tree, whole)

    return [flat[k] for k in mine], restore


def _is_array(x):
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _kind(x):
    return jnp.shape(x), str(x.dtype)


def _trace(loss_fn, has_aux, rebuild, restore, leaves, arrays, *, alone):
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is {type(loss_fn).__name__}, expected a function (params, *args) -> scalar.")

    def flat(leaves, arrays):
        out: Any = loss_fn(rebuild(leaves), *restore(arrays))
        if has_aux:
            if not isinstance(out, tuple | list) or len(out) != 2:
                raise ValueError(f"loss_fn returned {type(out).__name__} with has_aux=True, expected a pair (loss, aux).")
            out = out[0]
        if jax.tree.structure(out) != jax.tree.structure(0) or jnp.shape(out) != ():
            hint = "pass has_aux=True for a pair (loss, aux)." if isinstance(out, tuple | list) else "take the mean over the batch."
            raise ValueError(f"loss_fn returned {jax.tree.map(jnp.shape, out)}, expected a scalar: {hint}")
        if not jnp.issubdtype(jnp.result_type(out), jnp.floating):
            raise ValueError(f"loss_fn returned a {jnp.result_type(out)}, expected a real float.")
        return out

    untraceable = (
        jax.errors.ConcretizationTypeError,
        jax.errors.NonConcreteBooleanIndexError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    )
    try:
        try:
            return jax.make_jaxpr(flat)(leaves, arrays)
        except untraceable:
            if not alone:
                raise
            # Perhaps it looks at its arguments, which `jax.grad` lets it do, and not at its parameters.
            return jax.make_jaxpr(lambda leaves, _: flat(leaves, arrays))(leaves, arrays)
    except untraceable as error:
        raise TypeError(
            "loss_fn cannot be traced: it looks at the value of an array, expected jax operations only. Use jnp for np, and "
            "lax.cond, jnp.where or a static Python argument for `if`."
        ) from error


def _by_site(plan: Plan, stats, facts):
    """Per site the readings [T_1, ..., 13]: of the probe (6), of z (3), of the weights (2) and of the activation (2)."""

    def of(path):
        missing = jnp.full((*stats[path].shape[:-1], 2), jnp.nan, stats[path].dtype)
        parts = [stats[path], facts[path, "z"], facts.get((path, "w"), missing), facts.get((path, "phi"), missing)]
        return jnp.concatenate([p.astype(stats[path].dtype) for p in parts], axis=-1)

    return [of(path) for path in sorted(plan.sites)]


def rows_of(site: Site):
    """(order, index, depth) of every time a site is passed."""
    for index in np.ndindex(*(length for _, length, _, _ in site.loops)):
        key, depth = list(site.path), site.depth
        for t, (at, length, step, reverse) in reversed(list(zip(index, site.loops, strict=True))):
            turn = length - 1 - t if reverse else t
            key.insert(at, turn)
            depth += step * turn
        yield tuple(key), index, depth


def _assemble(plan: Plan, names, leaves, runs) -> Diagnosis:
    """The report of one or several runs of the same program, in NumPy float64."""
    sites = [plan.sites[path] for path in sorted(plan.sites)]
    count: dict[str, int] = {}
    rows = []
    for n, site in enumerate(sites):
        count[site.name] = count.get(site.name, 0) + 1
        label = site.name + (f"#{count[site.name]}" if count[site.name] > 1 else "")
        for key, index, depth in rows_of(site):
            suffix = f"[{','.join(map(str, index))}]" if index else ""
            rows.append((key, label + suffix, site, depth, [np.asarray(readings[n][index], np.float64) for _, readings, _ in runs]))
    rows.sort(key=lambda row: row[0])
    depth = np.array([row[3] for row in rows])
    read = np.moveaxis(np.array([row[4] for row in rows]), 2, 0)  # [13, rows, runs]
    log_of = lambda k: 0.5 * np.log(read[k]) + np.log(read[k + 1])  # noqa: E731
    size = np.array([max(1, np.prod(row[2].shape)) for row in rows])[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        fields = {
            "log_delta": log_of(0) + read[4] * np.log(2),
            "log_grad_w": log_of(2) + read[4] * np.log(2),
            "log_w": log_of(9),
            "log_rms_z": log_of(6) - 0.5 * np.log(size),
            "zero_fraction": read[5],
            "dead_fraction": read[11],
            "saturated_fraction": read[12],
        }
    following = following_site(depth)
    step = lambda v: np.where((following >= 0)[:, None], v[following] - v, np.nan)  # noqa: E731
    with np.errstate(invalid="ignore"):
        fields["log_gain_forward"] = step(fields["log_rms_z"])
        fields["log_gain_backward"] = -step(fields["log_delta"])
        means = {name: v.mean(axis=1) for name, v in fields.items()}
        spread = {name: v.std(axis=1, ddof=1) for name, v in fields.items()} if len(runs) > 1 else {}
    reached = (read[8] > 0).all(axis=1)
    return Diagnosis(
        site=tuple(row[1] for row in rows),
        kind=tuple(row[2].kind for row in rows),
        depth=depth,
        activation=tuple(plan.phi.get(row[2].path, ((), 0, ""))[2] for row in rows),
        status=tuple(_status(row[2].kind, reached[i], means, i) for i, row in enumerate(rows)),
        num_units=np.array([int(np.prod([row[2].shape[a] for a in row[2].units])) for row in rows]),
        unused=tuple(name for i, name in enumerate(names) if not plan.used >> i & 1),
        unread=_unread(plan, names, leaves),
        opaque=tuple(dict.fromkeys(row[1] for row in rows if row[2].kind == "opaque")),
        non_finite=tuple(name for name, bad in zip(names, runs[0][2], strict=True) if bad),
        loss=np.array([float(loss) for loss, _, _ in runs]),
        spread=spread,
        **means,
    )


def _status(kind, reached, means, i):
    if not reached:
        return "not run"
    if not all(np.isfinite(means[f][i]) or np.isneginf(means[f][i]) for f in ("log_delta", "log_rms_z")):
        return "non-finite"
    if kind == "opaque":
        return "opaque"
    return "disconnected" if np.isneginf(means["log_delta"][i]) else "ok"


def _unread(plan: Plan, names, leaves):
    """Used matrices, tables and kernels that are at no site. A stack of vectors is none of them."""
    shown = {part for site in plan.sites.values() for part in plan.joined.get(site.name, [site.name])}

    def missing(i):
        axes = sum(n > 1 for n in leaves[i].shape) - (i in plan.stacked)
        return plan.used >> i & 1 and axes > 1 and i not in plan.biases and names[i] not in shown

    return tuple(name for i, name in enumerate(names) if missing(i))
