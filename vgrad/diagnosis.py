"""The report of `vgrad.diagnose`: numbers per site, as arrays, and what they say, in words.

The rate is the slope of ln ||delta|| over the depth of the sites, positive where the gradient grows on its way to the input,

    ln ||delta_s|| = a_role(s) - rate * depth_s + noise.

Sites of one role, such as the query projections of all blocks, share an intercept: within a block the cotangents of queries and
of values differ for reasons that have nothing to do with depth. Single steps that differ from the median step by a factor above
1000 are taken out and named for themselves. The error is that of the fit, from the scatter over the layers of this one network: it
says how steady the trend is, not how it varies over initializations.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from vgrad.base import Estimate

__all__ = ["Diagnosis", "following_site"]

_CLEAR = math.log(10)  # a change over the whole depth that is called vanishing or exploding, as in `vgrad.study`
_SHARP = math.log(1000)  # a change in one step that is no part of the trend


class Diagnosis(NamedTuple):
    """What the gradient does at every site, in execution order; a row per site, and per iteration of a loop around it.

    Attributes:
      site: unique names: the parameter's path, "#2" behind it at the leaf's second product, "[3]" for the iteration of a loop.
      kind: "dot", "conv", "tap", or "opaque" for an equation that is not entered (custom_vjp, while_loop, shard_map).
      depth: number of sites on the longest way from the input, this one included.
      activation: the guess at what acts on the site's output, or "".
      status: "ok"; "disconnected" where delta is exactly zero; "non-finite"; "opaque"; "not run" in a branch that was not taken.
      num_units: units of the site's output; of experts or an ensemble in one product, those of all.
      log_delta: ln of the Frobenius norm of delta = dJ/dz over the whole batch. -inf for zero.
      log_grad_w: ln ||dJ/dW|| of this use of the leaf; of a slice of it in a loop over layers. NaN at taps.
      log_w: ln ||W||.
      log_rms_z: ln of the root mean square of z, its bias included.
      zero_fraction: of the entries of delta that are exactly zero.
      dead_fraction: of units whose activation is flat for every sample. NaN where the activation is not known, and in the last turn
        of a loop whose blocks start with it.
      saturated_fraction: of entries where the activation's slope is below a tenth of its greatest; for a relu, the inactive ones.
      log_gain_forward: ln rms z of the next deeper site minus that of this one.
      log_gain_backward: ln ||delta|| of this site minus that of the next deeper one: what the step toward the input did.
      unused: parameters that the loss does not use.
      unread: used parameters of two axes or more that feed no site, such as embeddings that are looked up.
      opaque: sites of kind "opaque".
      non_finite: parameters that hold NaN or inf.
      loss: of every run.
      spread: standard deviation over several batches or keys, for each numeric field; empty for one.
    """

    site: tuple[str, ...]
    kind: tuple[str, ...]
    depth: np.ndarray
    activation: tuple[str, ...]
    status: tuple[str, ...]
    num_units: np.ndarray
    log_delta: np.ndarray
    log_grad_w: np.ndarray
    log_w: np.ndarray
    log_rms_z: np.ndarray
    zero_fraction: np.ndarray
    dead_fraction: np.ndarray
    saturated_fraction: np.ndarray
    log_gain_forward: np.ndarray
    log_gain_backward: np.ndarray
    unused: tuple[str, ...]
    unread: tuple[str, ...]
    opaque: tuple[str, ...]
    non_finite: tuple[str, ...]
    loss: np.ndarray
    spread: dict[str, np.ndarray]

    @property
    def rate(self) -> Estimate:
        """Change of ln ||delta|| per layer toward the input, in nats; negative = vanishing. NaN for fewer than three depths."""
        return _rate(self)

    def verdict(self) -> str:
        """What is wrong, where, and what to try, in words."""
        return "\n".join(_verdict(self))

    def table(self, most: int = 80) -> str:
        """The rows as text, norms in natural logarithms. Of more than `most` rows those in the middle are left out."""
        return _table(self, most)

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame`, a row per site. Needs pandas."""
        import pandas

        columns = {name: getattr(self, name) for name in self._fields[: self._fields.index("unused")]}
        return pandas.DataFrame({k: list(v) if isinstance(v, tuple) else v for k, v in columns.items()})

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.verdict()}"


def following_site(depth: np.ndarray) -> np.ndarray:
    """For every row the first later one that lies deeper; -1 where there is none. Branches side by side have the same depth."""
    n = len(depth)
    return np.array([next((j for j in range(i + 1, n) if depth[j] > depth[i]), -1) for i in range(n)], int)


def _role(name: str) -> str:
    """The name without its counters: layers that repeat have the same role."""
    return re.sub(r"\d+", "", name)


def _jumps(report: Diagnosis) -> dict[int, float]:
    """Rows whose step toward the input is out of line, and by how much it is."""
    gain = report.log_gain_backward
    calm = np.abs(gain) <= _SHARP  # NaN and -inf are not
    calm = calm if calm.any() else np.isfinite(gain)
    roles = np.array([_role(name) for name in report.site])
    excess = {}
    for i in np.flatnonzero(np.isfinite(gain) & (np.abs(gain) > _SHARP)):
        alike = calm & (roles == roles[i])
        excess[int(i)] = float(gain[i] - np.median(gain[alike if alike.sum() > 2 else calm]))
    return {i: e for i, e in excess.items() if abs(e) > _SHARP}


def _rate(report: Diagnosis) -> Estimate:
    depth = np.asarray(report.depth, float)
    use = np.isfinite(report.log_delta) & np.isin(report.kind, ["dot", "conv", "opaque"])
    if len(set(depth[use])) > 3:
        use &= depth < depth[use].max()  # the readout: its width differs
    if len(set(depth[use])) < 3:
        return Estimate(math.nan, math.nan)
    log_delta, jumps = report.log_delta.copy(), _jumps(report)
    for d in {depth[i] for i in jumps}:  # once a depth, however many branches lie side by side there
        log_delta[depth <= d] -= np.median([e for i, e in jumps.items() if depth[i] == d])
    roles = np.array([_role(name) for name in report.site])[use]
    x, y = depth[use], log_delta[use]
    members = [roles == r for r in sorted(set(roles))]
    within = lambda v: v - sum(np.where(m, v[m].mean(), 0) for m in members)  # noqa: E731
    if np.allclose(within(x), 0):  # every role occurs at one depth only: layers with names of their own
        members = [np.ones(len(x), bool)]
    x, y = within(x), within(y)
    slope, spare = float(x @ y / (x @ x)), len(x) - len(members) - 1
    stderr = math.sqrt(float(np.sum((y - slope * x) ** 2)) / spare / float(x @ x)) if spare > 0 else math.nan
    return Estimate(-slope, stderr)


def _verdict(report: Diagnosis) -> list[str]:
    lines = []
    if report.non_finite:
        lines.append(f"NON-FINITE PARAMETERS: {_some(report.non_finite)} hold NaN or inf; nothing behind them can be read.")
    if not np.isfinite(report.loss).all():
        lines.append(f"The loss is {report.loss[~np.isfinite(report.loss)][0]}.")
    bad = [i for i, s in enumerate(report.status) if s == "non-finite"]
    if bad:
        lines.append(f"NON-FINITE at {len(bad)} sites, the first in execution order {report.site[bad[0]]}.")
    dead = [i for i, s in enumerate(report.status) if s == "disconnected"]
    if dead:
        where = f"at {len(dead)} of {len(report.site)} sites"
        lines.append(f"DISCONNECTED: the gradient is exactly zero {where}: {_why_zero(report, dead)}.")
    lines += _trend(report) + _units(report)
    if report.unused:
        lines.append(f"Unused by the loss: {_some(report.unused)}.")
    if report.opaque:
        lines.append(f"Not entered (custom derivative, while_loop or shard_map), read at the output only: {_some(report.opaque)}.")
    if report.unread:
        lines.append(f"At no site: {_some(report.unread)}; mark what is computed from them with vgrad.tap.")
    return lines or ["No trend can be told from fewer than three depths; nothing else stands out."]


def _some(names, most=4):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _why_zero(report, dead):
    """Who is to blame for a gradient that is exactly zero: what comes first on the way forward, for it makes the rest so."""
    last = max(dead, key=lambda k: (report.depth[k], k))
    after = int(following_site(report.depth)[last])
    around = [*dead, after] if after >= 0 else dead
    for i in sorted(around):
        if report.log_w[i] == -np.inf:
            return f"the weights of {report.site[i]} are zero"
        if i in dead and report.dead_fraction[i] == 1:
            return f"all units behind {report.site[i]} are dead, its {report.activation[i]} is flat for every sample"
        if i in dead and report.log_rms_z[i] == -np.inf:
            return f"the forward signal is exactly zero from {report.site[i]} on"
    if after < 0:
        return f"the loss does not depend differentiably on {report.site[last]}"
    return (
        f"it ends between {report.site[after]} and {report.site[last]}, in a stop_gradient, a branch not taken or flat activations"
    )


def _trend(report):
    value, stderr = report.rate
    gain, following, jumps = report.log_gain_backward, following_site(report.depth), _jumps(report)
    lines, word = [], "HOLDS"
    if math.isfinite(value):
        depth = report.depth[np.isfinite(report.log_delta)]
        span = int(depth.max() - depth.min())
        unclear = abs(value * span) < _CLEAR or abs(value) < 2 * stderr
        word = "HOLDS" if unclear else "VANISHES" if value < 0 else "EXPLODES"
        apart = " apart from single steps" if jumps else ""
        error = f" ± {stderr:.3f}" if math.isfinite(stderr) else ""
        rate = f"{value:+.3f}{error} nats per layer toward the input, a factor {_decimal(value * span)} over {span} layers"
        lines.append(f"The gradient {word}{apart}: {rate}.")
    for i in sorted(jumps, key=lambda i: -abs(jumps[i]))[:3]:
        verb = "VANISHES" if gain[i] < 0 else "EXPLODES"
        lines.append(
            f"It {verb} by a factor {_decimal(gain[i])} in one step, from {report.site[following[i]]} to {report.site[i]}"
            f"{_weights(report, following[i])}."
        )
    if word != "HOLDS":
        sign = 1 if word == "EXPLODES" else -1
        steps = sorted((i for i in range(len(gain)) if math.isfinite(gain[i]) and i not in jumps), key=lambda i: -sign * gain[i])
        named = [f"{report.site[following[i]]} -> {report.site[i]} ({gain[i]:+.2f})" for i in steps[:3]]
        lines += [f"Most responsible, in nats per step toward the input: {', '.join(named)}.", *_remedies(report)]
    return lines


def _log_sigma(report):
    """ln sigma_w of every site: its weights have the std sigma_w / sqrt(fan_in)."""
    return report.log_w - 0.5 * np.log(report.num_units)


def _weights(report, i):
    sigma = _log_sigma(report)
    usual = float(np.median(sigma[np.isfinite(sigma)])) if np.isfinite(sigma).any() else math.nan
    if not abs(sigma[i] - usual) > _CLEAR:
        return ""
    return f": the weights of {report.site[i]} have sigma_w = {_decimal(sigma[i])}, the median site {_decimal(usual)}"


def _units(report):
    lines = []
    for field, word, least in (("dead_fraction", "dead", 0.1), ("saturated_fraction", "saturated", 0.9)):
        share = getattr(report, field)
        hit = [i for i in range(len(share)) if share[i] >= least]
        if hit:
            worst = max(hit, key=lambda i: share[i])
            lines.append(
                f"{word.capitalize()} units: at {len(hit)} sites {least:.0%} or more, most at {report.site[worst]} "
                f"({share[worst]:.0%}, {report.activation[worst]})."
            )
    return lines


def _remedies(report):
    from vgrad import activations, criticality  # theory gives the numbers of the advice, and none of the measurement

    lines, names = [], [a for a in report.activation if a in activations.REGISTRY]
    if names:
        phi = max(dict.fromkeys(names), key=names.count)
        sigma = _log_sigma(report)[[a == phi for a in report.activation]]
        critical = float(jax.jit(lambda: criticality.critical_sigma_w(phi))())  # compiled: a fifth of the time of op by op
        now = float(np.median(np.exp(sigma)))
        if math.isfinite(critical) and now > 0:
            advice = f"multiply them by {critical / now:.3g}" if abs(critical / now - 1) > 0.02 else "they are there"
            lines.append(
                f"Try weights at the critical sigma_w of {phi}, {critical:.3g} (std {critical:.3g} / sqrt(fan_in)): the median is "
                f"{now:.3g}, so {advice}."
            )
    branch = f"x + f(x) / sqrt(L) = x + {report.depth.max() ** -0.5:.2g} f(x)"
    return [*lines, f"Or try normalisation in front of every product (pre-norm), or skip connections {branch}."]


def _decimal(ln):
    return f"{math.exp(ln):.2g}" if abs(ln) < 9 else f"1e{ln / math.log(10):+.0f}"


def _table(report: Diagnosis, most: int) -> str:
    head = ["depth", "site", "kind", "phi", "ln|delta|", "ln|dW|", "ln|W|", "ln rms z", "zeros", "dead", "saturated", "back"]
    head += ["status"]
    number = lambda v: "" if math.isnan(v) else f"{v:.2f}"  # noqa: E731
    share = lambda v: "" if math.isnan(v) else f"{v:.0%}"  # noqa: E731
    rows = [
        [str(report.depth[i]), report.site[i], report.kind[i], report.activation[i], number(report.log_delta[i]),
         number(report.log_grad_w[i]), number(report.log_w[i]), number(report.log_rms_z[i]), share(report.zero_fraction[i]),
         share(report.dead_fraction[i]), share(report.saturated_fraction[i]), number(report.log_gain_backward[i]),
         report.status[i]]
        for i in range(len(report.site))
    ]  # fmt: skip
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    left = {1, 2, 3, 12}
    line = lambda row: "  ".join(c.ljust(w) if k in left else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True)))  # noqa: E731
    lines = [line(row).rstrip() for row in [head, *rows]]
    if len(rows) > most:
        lines[1 + most // 2 : len(lines) - most // 2] = [f"... {len(rows) - most // 2 * 2} rows ..."]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
