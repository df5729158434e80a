"""In words: what theory says will happen to the gradient of a network, and where the nearest critical initialization is.

    chi_1 < 1: vanishes,    chi_1 > 1: explodes,    per layer by sqrt(chi_1);    trainable depth: about 6 xi_c

(Schoenholz et al., 2017, arXiv:1611.01232, figure 5, for the last). At finite depth the verdict is that of the predicted profile,
with the thresholds of a study, so that `vgrad predict` and `vgrad study` mean the same by "vanishes".
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from vgrad import meanfield
from vgrad.base import Phi
from vgrad.study_table import decimal, verdict

__all__ = ["TRAINABLE", "Outlook", "advice", "outlook", "profile_table", "summary"]

TRAINABLE = 6.0  # depth scales xi_c that gradient descent can bridge
_SENTENCES = {
    "vanishes": "the gradient vanishes", "holds": "the gradient holds", "explodes": "the gradient explodes",
    "dead": "the gradient is exactly zero", "no reading": "theory has no prediction",
}  # fmt: skip


class Outlook(NamedTuple):
    """What holds for the deep layers of an activation at one (sigma_w, sigma_b), as plain numbers.

    Attributes:
      deep: the `meanfield.Asymptotics` there.
      critical: the points (sigma_w, q, chi_par) of the critical line at this sigma_b, in the order of q.
      universality: the `meanfield.Universality` of the activation.
    """

    phi: str
    sigma_w: float
    sigma_b: float
    deep: meanfield.Asymptotics
    critical: list[tuple[float, float, float]]
    universality: meanfield.Universality


def outlook(phi: str | Phi, sigma_w: float, sigma_b: float = 0.0) -> Outlook:
    """The numbers behind the words, best in float64: near a critical point, six digits of chi_1 are few. Raises as `meanfield`."""
    deep = jax.jit(partial(meanfield.asymptotics, phi))(sigma_w=sigma_w, sigma_b=sigma_b)
    points = jax.jit(partial(meanfield.critical_points, phi))(sigma_b)
    critical: list[tuple[float, float, float]] = []
    for w, q, chi_par in zip(*(np.asarray(v, float).tolist() for v in (points.sigma_w, points.q, points.chi_par)), strict=True):
        if math.isfinite(w) and not any(abs(w - other) < 1e-6 * w for other, _, _ in critical):
            critical.append((w, q, chi_par))
    name = phi if isinstance(phi, str) else getattr(phi, "__name__", repr(phi))
    return Outlook(name, sigma_w, sigma_b, jax.tree.map(float, deep), critical, meanfield.universality(phi))


def summary(o: Outlook, prediction: Any) -> str:
    """What will happen, from the `Prediction` of a network and the outlook of its deep layers. Several lines."""
    delta, typical = (np.asarray(v, float) for v in (prediction.log_delta, prediction.mean_log_delta))
    depth, deep = len(delta), o.deep
    if depth < 3:
        return f"Depth {depth} has no hidden step: nothing can vanish or explode on the way."
    change, middle = delta[0] - delta[-2], typical[0] - typical[-2]
    middle = change if math.isnan(middle) else middle
    rate, spread = change / (depth - 2), float(np.asarray(prediction.std_log_delta)[0])
    growth = math.exp(min(rate, 700))
    lines = [
        f"{o.phi}, sigma_w {o.sigma_w:.5g}, sigma_b {o.sigma_b:.5g}, depth {depth}: {_SENTENCES[verdict(middle)]}.",
        f"On the way to the input ||delta|| changes by e^{rate:+.4f} = {growth:.4g} per layer, over the hidden layers to "
        f"{decimal(change)} of its size (root mean square); in the typical network to {decimal(middle)}"
        + ("." if math.isnan(spread) else f", give or take a factor {math.exp(spread):.2f} from seed to seed."),
    ]
    if math.isnan(deep.q_star):
        lines += ["The length of the signal grows without bound: there is no fixed point, and no depth scale, at this sigma_w."]
        return "\n".join(lines)
    size = "the signal dies out, q* = 0" if deep.q_star == 0 else f"the length settles at q* = {deep.q_star:.5g}"
    lines += [f"Deep layers: {size} (depth scale xi_q: {_layers(deep.xi_q)}); chi_1 = {deep.chi_1:.5g}, {_phase(deep.chi_1)}."]
    if _is_critical(deep.chi_1):
        return "\n".join([*lines, "Two inputs grow alike only as a power of depth: no depth scale limits training."])
    if deep.q_star == 0:
        return "\n".join([*lines, "Differences of inputs die out with the signal: after some depth scales both are gone."])
    fate = "grow alike, c* = 1," if deep.c_star == 1 else f"come to a correlation of c* = {deep.c_star:.4g}"
    limit = f"trainable to a depth of about 6 xi_c = {TRAINABLE * deep.xi_c:.0f}"
    lines += [f"Two inputs {fate} with a depth scale of xi_c = {_layers(deep.xi_c)}: {limit}."]
    return "\n".join(lines)


def advice(o: Outlook) -> str:
    """The nearest critical initialization, or that there is none."""
    phi, kind = o.phi, o.universality
    # At length 0 the map of gelu and silu has the slope 1 too, but bends up: what starts above leaves.
    attracting = [p for p in o.critical if p[2] <= 1 + 1e-5 and not (p[1] == 0 and kind.kind == "half-stable")]
    lines = []
    if attracting:
        sigma_w, q, _ = min(attracting, key=lambda p: abs(p[0] - o.sigma_w))
        where = "at any length" if kind.kind == "scale-invariant" else f"at length {q:.4g}"
        lines += [f"Nearest critical initialization: sigma_w = {sigma_w:.5f} at this sigma_b ({where})."]
    elif o.critical:
        sigma_w, q, chi_par = o.critical[0]
        lines += [f"At this sigma_b, sigma_w = {sigma_w:.5f} makes chi_1 = 1, but at a length ({q:.4g}) that repels: chi_par = "
                  f"{chi_par:.4f}, and a network set there leaves it."]  # fmt: skip
    else:
        lines += [f"At sigma_b = {o.sigma_b:g} no sigma_w keeps the gradient at a length that lasts."]
    point = f"sigma_w = {kind.sigma_w:.5f}, sigma_b = {kind.sigma_b:.5f}"
    if kind.kind == "scale-invariant":
        lines += [f"{phi} is scale-invariant: {point} keeps every length, and the gradient with it."]
    elif kind.kind == "K*=0":
        decay = "not at all" if math.isinf(kind.power) else f"as ({kind.rate * kind.power:.3g} l)^{-1 / kind.power:.2g}"
        lines += [f"{phi} is of the class K* = 0: at {point} small signals decay {decay}, and the gradient as a power too."]
    elif kind.kind == "half-stable":
        lines += [f"{phi} is half-stable: at {point} gradient and length both hold, at length {kind.q:.4g}, which neither "
                  "attracts nor repels to first order: scale the input to it."]  # fmt: skip
    elif math.isnan(kind.sigma_w):
        lines += [f"{phi} has no critical initialization: at no sigma_w, sigma_b is chi_1 = 1 at a fixed point of the length."]
    else:
        lines += [f"{phi} has no point where gradient and length both hold; the best available is {point}: chi_1 = 1 at length "
                  f"{kind.q:.4g}, with chi_par = {kind.chi_par:.3g}."]  # fmt: skip
    return "\n".join(lines)


def profile_table(prediction: Any, rows: int = 14) -> str:
    """The prediction by layer, thinned out to about so many rows, the first and the last two among them."""
    depth = len(prediction.q)
    shown = sorted({1, depth - 1, depth, *np.unique(np.linspace(1, depth, min(rows, depth)).round().astype(int)).tolist()})
    fields = ("log_delta", "std_log_delta", "log_grad_w", "log_grad_b", "log_h")
    head = ["layer", "q", "c", "ln||delta||", "± seeds", "ln||dW||", "ln||db||", "ln||h||"]
    values = [np.asarray(getattr(prediction, name), float) for name in fields]
    q, c = np.asarray(prediction.q, float), np.asarray(prediction.c, float)
    cells = [[f"{l}", f"{q[l - 1]:.4g}", f"{c[l - 1]:.4f}", *(f"{v[l - 1]:.3f}" for v in values)] for l in shown]
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [head, *cells]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _is_critical(chi_1):
    return chi_1 > 0 and abs(math.log(chi_1)) <= 1e-5


def _phase(chi_1):
    return "critical" if _is_critical(chi_1) else "ordered" if chi_1 < 1 else "chaotic"


def _layers(xi):
    if math.isinf(xi) or abs(xi) > 1e6:
        return "unlimited"
    return f"{abs(xi):.3g} layers" + (", repelling" if xi < 0 and abs(xi) > 1e-12 else "")
