"""What the monitors of a training run have seen, as a table with flags.

The state of an optimizer may hold monitors anywhere: in a chain, under `masked` or `MultiSteps`, in a training state of your own.
A gradient monitor and the next update monitor over the same parameters describe one optimizer, and share a row per parameter:

    ln(||u|| / ||w||),    u the update, w the parameter: healthy near ln 1e-3, idle below the resolution of the dtype.

Everything here runs on the host, between training steps.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np

from vgrad.monitor import GradientMonitorState, UpdateMonitorState

__all__ = ["MonitorSummary", "monitor_summary"]


class MonitorSummary(NamedTuple):
    """Readings of monitors, one row per parameter leaf, or per row of a stacked one. `print` it.

    Attributes:
      name: path of the parameter, [R] strings.
      monitor: which monitor of the state, from 0; a gradient monitor and its update monitor count as one. [R]
      steps: updates seen. [R]
      log_grad_norm .. log_update_ratio: as in `GradientMonitorState` and `UpdateMonitorState`; NaN, and 0 for the counts, where
        there is no such monitor. [R]
      flags: what is amiss, a tuple of words per row, see `monitor_summary`. [R]
    """

    name: tuple[str, ...]
    monitor: np.ndarray
    steps: np.ndarray
    log_grad_norm: np.ndarray
    log_grad_average: np.ndarray
    log_grad_min: np.ndarray
    log_grad_max: np.ndarray
    num_nonfinite_grads: np.ndarray
    num_zero_grads: np.ndarray
    log_param_norm: np.ndarray
    log_update_norm: np.ndarray
    log_update_average: np.ndarray
    log_update_min: np.ndarray
    log_update_max: np.ndarray
    num_nonfinite_updates: np.ndarray
    num_zero_updates: np.ndarray
    log_update_ratio: np.ndarray
    flags: tuple[tuple[str, ...], ...]

    def table(self) -> str:
        """The rows as aligned text."""
        several = len(set(self.monitor.tolist())) > 1
        columns: dict[str, Any] = {
            "parameter": [f"{m}: {n}" if several else n for m, n in zip(self.monitor, self.name, strict=True)]
        }
        if not np.isnan(self.log_grad_max).all():  # an extreme is never NaN, unless there is no monitor
            columns |= {"ln|g|": self.log_grad_norm, "average": self.log_grad_average, "least": self.log_grad_min}
            columns |= {"most": self.log_grad_max, "ln|w|": self.log_param_norm}
        if not np.isnan(self.log_update_max).all():
            columns |= {"ln|u|": self.log_update_norm, "ln|u|/|w|": self.log_update_ratio}
        columns["non-finite"] = np.maximum(self.num_nonfinite_grads, self.num_nonfinite_updates)
        columns["zero"] = np.maximum(self.num_zero_grads, self.num_zero_updates)
        columns["flags"] = [", ".join(words) for words in self.flags]
        cells = [[head, *(f"{v:.2f}" if isinstance(v, float) else str(v) for v in values)] for head, values in columns.items()]
        widths = [max(map(len, column)) for column in cells]
        cells = [[c.ljust(w) if column[0] in ("parameter", "flags") else c.rjust(w) for c in column]
                 for column, w in zip(cells, widths, strict=True)]  # fmt: skip
        head, *lines = ["  ".join(row).rstrip() for row in zip(*cells, strict=True)]
        title = f"{max(self.steps.tolist(), default=0)} steps; natural logarithms of norms: g gradient, w parameter, u update"
        return "\n".join([title, "", head, "-" * len(head), *lines])

    def __str__(self) -> str:
        return self.table()


def monitor_summary(state: Any, *, vanishing=1e-4, exploding=1e3, stalled=1e-7) -> MonitorSummary:
    """A labelled table of all monitors in an optimizer state, or in any pytree that holds one, with flags:

    non-finite: a gradient or an update held a NaN or inf at some step.
    dead: the last gradient was exactly zero.
    exploding: ||g|| was above `exploding` at some step.
    vanishing: ||g||, on average, is below `vanishing` times the largest of those that do not explode.
    stalled: the last ||u|| / ||w|| was below `stalled`, so that adding u changes little or, in the parameter's dtype, nothing.

    Args:
      state: concrete, that is outside `jit`. Under `vmap` over seeds every seed has its own rows.
      vanishing, exploding, stalled: thresholds of the flags; plain numbers, not logarithms. Scale `exploding` with the loss; for
        parameters in bfloat16 an update stalls near 4e-3, its resolution.
    Returns:
      `MonitorSummary`.
    Raises:
      ValueError: no monitor in the state.  TypeError: a traced state.
    """
    monitors = [s for s in jax.tree.leaves(state, is_leaf=_is_monitor) if _is_monitor(s)]
    if not monitors:
        raise ValueError(f"no monitor in a state of type {type(state).__name__}: optax.chain(vgrad.monitor(), ...).init(params).")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(monitors)):
        raise TypeError("monitor_summary was given a traced state, expected numbers: call it outside jit, on what a step returns.")
    pairs: list[dict[type, dict]] = []
    for monitor in monitors:
        rows, own = _rows(monitor), type(monitor)
        # An update monitor belongs to the gradient monitor before it, if that is over the same parameters and has none yet.
        open_for = list(pairs[-1].get(GradientMonitorState, ())) if pairs and UpdateMonitorState not in pairs[-1] else None
        if own is UpdateMonitorState and list(rows) == open_for:
            pairs[-1][own] = rows
        else:
            pairs.append({own: rows})
    names = [(number, name) for number, pair in enumerate(pairs) for name in next(iter(pair.values()))]
    table = [{k: v for rows in pairs[number].values() for k, v in rows[name].items()} for number, name in names]
    fields = {"monitor": np.array([number for number, _ in names], int)}
    for field in MonitorSummary._fields[2:-1]:
        missing, dtype = (0, int) if field.startswith(("num", "steps")) else (math.nan, float)
        fields[field] = np.array([row.get(field, missing) for row in table], dtype)
    flags = _flags(fields, *(math.log(t) for t in (vanishing, exploding, stalled)))
    return MonitorSummary(tuple(name for _, name in names), **fields, flags=flags)


def _is_monitor(x):
    return isinstance(x, GradientMonitorState | UpdateMonitorState)


def _rows(monitor) -> dict[str, dict[str, Any]]:
    """Path of each reading -> field -> value."""
    steps, *fields = jax.device_get(monitor)
    rows: dict[str, dict[str, Any]] = {}
    for field, tree in zip(monitor._fields[1:], fields, strict=True):
        for path, leaf in jax.tree.leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "parameters"
            for index in np.ndindex(leaf.shape):
                label = f"{name}[{', '.join(map(str, index))}]" if index else name
                rows.setdefault(label, {"steps": int(np.max(steps))})[field] = leaf[index]
    return rows


def _flags(f, vanishing, exploding, stalled):
    """The words of each row, from the fields and the logarithms of the thresholds."""
    explodes = f["log_grad_max"] > exploding
    # NaN marks rows without a gradient monitor, which no comparison holds for.
    usual = np.where(explodes | np.isnan(f["log_grad_average"]), -np.inf, f["log_grad_average"])
    largest = np.array([np.max(usual[f["monitor"] == m]) for m in f["monitor"]])
    words = {
        "non-finite": f["num_nonfinite_grads"] + f["num_nonfinite_updates"] > 0,
        "dead": (f["num_zero_grads"] > 0) & np.isneginf(f["log_grad_norm"]),
        "exploding": explodes,
        "vanishing": np.isfinite(f["log_grad_average"]) & (f["log_grad_average"] < vanishing + largest),
        "stalled": (f["steps"] > 0) & (f["log_update_ratio"] < stalled),
    }
    return tuple(tuple(word for word, at in words.items() if at[i]) for i in range(len(explodes)))
