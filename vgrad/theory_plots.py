"""Pictures of the theory: the phase diagram, the maps of length and correlation, and the prediction over what was measured.

    phase diagram   ln chi_1 over (sigma_w, sigma_b), with the critical line chi_1 = 1 and contours of the trainable depth 6 xi_c
    cobweb          q -> q_map(q) or c -> c_map(c) against the diagonal, with the steps that iteration takes between them

`diagram` computes, everything else draws what it is given. Lines differ in style as well as in shade, and the map is light in the
middle and dark at both ends, so that a figure is legible in grey.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vgrad import meanfield
from vgrad.base import Phi

__all__ = ["Diagram", "cobweb", "diagram", "phase_diagram", "theory_over_profile"]

_TRAINABLE = 6  # depth scales xi_c that training bridges. Schoenholz et al., 2017 (arXiv:1611.01232), figure 5
_DEPTHS = (10, 30, 100, 300)  # of the contours


class Diagram(NamedTuple):
    """Asymptotics over a grid of W x V points.

    Attributes:
      phi: name of the activation.
      sigma_w, sigma_b: the axes. Shapes [W], [V].
      deep: `meanfield.Asymptotics` of arrays [V, W].
      line: (sigma_w, sigma_b, chi_par) along the critical line, NaN where it is not real. Three arrays of one shape.
    """

    phi: str
    sigma_w: Any
    sigma_b: Any
    deep: meanfield.Asymptotics
    line: tuple[Any, Any, Any]


def diagram(phi: str | Phi, sigma_w=(0.3, 3.0), sigma_b=(0.0, 1.5), points: int = 96) -> Diagram:
    """The asymptotics on a grid of points x points, row by row in one compiled program, in the caller's precision.

    Args:
      phi: activation.  sigma_w, sigma_b: (lowest, highest) of each axis.
      points: on each axis, at least 2.
    Raises:
      ValueError: ranges that are not 0 <= lowest < highest < inf, or fewer than 2 points.
    """
    for name, (low, high) in (("sigma_w", sigma_w), ("sigma_b", sigma_b)):
        if not 0 <= low < high < np.inf:
            raise ValueError(f"{name} goes from {low} to {high}, expected 0 <= lowest < highest: a range of standard deviations.")
    if points < 2:
        raise ValueError(f"points is {points}, expected at least 2 on each axis.")
    dtype = jnp.result_type(float)
    # Off the corner where a scale-invariant phi has every length for a fixed point.
    rows, columns = np.linspace(sigma_b[0], sigma_b[1], points), np.linspace(max(sigma_w[0], 1e-6), sigma_w[1], points)

    @jax.jit
    def compute(rows, columns):
        point = lambda b, w: meanfield.asymptotics(phi, sigma_w=w, sigma_b=b)  # noqa: E731
        return jax.lax.map(lambda b: jax.vmap(partial(point, b))(columns), rows)

    deep = compute(jnp.asarray(rows, dtype), jnp.asarray(columns, dtype))
    lengths = jnp.geomspace(1e-8, 1e6, 561, dtype=dtype)
    line = jax.jit(jax.vmap(partial(meanfield.critical_line, phi)))(lengths)
    name = phi if isinstance(phi, str) else getattr(phi, "__name__", "phi")
    to_numpy = lambda tree: jax.tree.map(np.asarray, tree)  # noqa: E731
    return Diagram(name, columns, rows, to_numpy(deep), to_numpy((line.sigma_w, line.sigma_b, line.chi_par)))


def phase_diagram(d: Diagram) -> Figure:
    """ln chi_1 as a map; the critical line, dashed where its length repels; contours of 6 xi_c, the depth one can train,
    and behind it in brackets the depth scale xi_c itself.

    Hatched: the length grows without bound. Where the whole line is the one point sigma_b = 0, as for relu, it is a dot.
    """
    figure = Figure(figsize=(7.4, 5.2), layout="constrained")
    ax: Any = figure.subplots()
    unbounded = np.isnan(d.deep.q_star)
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = np.where(unbounded, np.nan, np.log(d.deep.chi_1))
        depth = np.where(unbounded | ~(d.deep.xi_c != 0), np.nan, _TRAINABLE * np.abs(d.deep.xi_c))
    limit = min(2.0, np.nanmax(np.abs(np.where(np.isfinite(growth), growth, np.nan)), initial=0.1))
    shades = dict(cmap="PuOr_r", vmin=-limit, vmax=limit, shading="nearest", rasterized=True)
    mesh = ax.pcolormesh(d.sigma_w, d.sigma_b, np.clip(growth, -limit, limit), **shades)
    bar = figure.colorbar(mesh, ax=ax, extend="both")
    bar.set_label(r"$\ln\,\chi_1$, nats per layer (of the squared gradient)")
    if unbounded.any():
        ax.contourf(d.sigma_w, d.sigma_b, unbounded.astype(float), levels=[0.5, 1.5], colors=["0.93"], hatches=["///"])
    finite = np.where(np.isfinite(depth), depth, np.nanmax(np.where(np.isfinite(depth), depth, np.nan), initial=1.0))
    drawn = [v for v in _DEPTHS if np.nanmin(finite) < v < np.nanmax(finite)]
    if drawn:
        style = dict(levels=drawn, colors="black", linewidths=0.9, linestyles=[":", "-.", "--", "-"][: len(drawn)])
        lines = ax.contour(d.sigma_w, d.sigma_b, np.where(unbounded, np.nan, finite), **style)
        ax.clabel(lines, fmt=lambda v: f"{v:g} ({v / _TRAINABLE:.3g})", fontsize=8)
    sigma_w, sigma_b, chi_par = d.line
    stays = chi_par <= 1 + 1e-5
    for kept, style, label in ((stays, "-", "critical"), (~stays, "--", r"$\chi_1 = 1$, the length repels")):
        at = np.where(kept & np.isfinite(sigma_w), sigma_b, np.nan)
        if np.isfinite(at).any():
            one_point = np.nanmax(at) - np.nanmin(at) < 1e-9
            look = dict(color="crimson", linewidth=2.4, markersize=8, label=label)
            ax.plot(sigma_w, at, style, marker="o" if one_point else None, clip_on=not one_point, **look)
    ax.plot([], [], "-.", color="black", linewidth=0.9, label=r"trainable depth $6\,\xi_c$ (depth scale $\xi_c$), layers")
    ax.set(xlabel=r"$\sigma_w$ (weight std times $\sqrt{\mathrm{fan\ in}}$)", ylabel=r"$\sigma_b$ (bias std)")
    ax.set(xlim=(d.sigma_w[0], d.sigma_w[-1]), ylim=(d.sigma_b[0], d.sigma_b[-1]))
    ax.set_title(f"{d.phi}: gradients vanish where $\\ln\\chi_1 < 0$ and explode where it is $> 0$")
    if unbounded.any():
        ax.fill_between([], [], [], facecolor="0.93", hatch="///", edgecolor="black", linewidth=0, label="the length has no bound")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def cobweb(
    phi: str | Phi, *, sigma_w: float, sigma_b: float = 0.0, starts_q=None, starts_c=(0.05, 0.95), steps: int = 12
) -> Figure:
    """The maps of length and of correlation, each with the diagonal, its fixed point and the path of iteration from the starts.

    Args:
      phi: activation.  sigma_w, sigma_b: as for `meanfield.q_map`.
      starts_q: lengths to start from. Default: 0.02 q* and 2 q*.  starts_c: correlations to start from, at length q*.
      steps: of the iteration.
    Raises:
      ValueError: no length settles at this sigma_w, so there is no map of the correlation.
    """
    deep = jax.jit(partial(meanfield.asymptotics, phi))(sigma_w=sigma_w, sigma_b=sigma_b)
    q_star, c_star = float(deep.q_star), float(deep.c_star)
    if not np.isfinite(q_star):
        raise ValueError(f"the length grows without bound at sigma_w={sigma_w}, expected a fixed point: choose a smaller sigma_w.")
    scale = q_star if q_star > 0 else 1.0
    starts_q = (0.02 * scale, 2 * scale) if starts_q is None else starts_q
    q_map = jax.jit(jax.vmap(lambda q: meanfield.q_map(phi, q, sigma_w=sigma_w, sigma_b=sigma_b)))
    c_map = jax.jit(jax.vmap(lambda c: meanfield.c_map(phi, c, jnp.asarray(scale), sigma_w=sigma_w, sigma_b=sigma_b)))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    top = 1.1 * max(*starts_q, scale)
    for ax, step, starts, end, fixed, letter in (
        (panels[0], q_map, starts_q, top, q_star, "q"), (panels[1], c_map, starts_c, 1.0, c_star, "c")
    ):  # fmt: skip
        grid = jnp.linspace(0.0, end, 201)
        ax.plot(grid, step(grid), color="black", linewidth=1.8, label="map")
        ax.plot([0, end], [0, end], "--", color="0.5", linewidth=1, label="unchanged")
        for start, style, shade in zip(starts, ("-", ":"), ("0.35", "0.35"), strict=False):
            at = [np.asarray([start])]
            for _ in range(steps):
                at.append(np.asarray(step(jnp.asarray(at[-1]))))
            path = np.concatenate(at)
            ax.plot(np.repeat(path, 2)[:-1], np.concatenate([[0], np.repeat(path[1:], 2)]), style, color=shade, linewidth=1)
        ax.plot(fixed, fixed, "o", color="crimson", markersize=8, label=f"${letter}^* = {fixed:.4g}$", clip_on=False)
        ax.set(xlim=(0, end), ylim=(0, end), aspect="equal")
        ax.set(xlabel=f"${letter}$ of a layer", ylabel=f"${letter}$ of the next layer")
        ax.legend(loc="upper left", frameon=False)
    panels[0].set_title("length $q$ (variance of the preactivations)", fontsize=10)
    panels[1].set_title("correlation $c$ of two inputs, at length $q^*$", fontsize=10)
    name = phi if isinstance(phi, str) else getattr(phi, "__name__", "phi")
    figure.suptitle(f"{name}, $\\sigma_w$ = {sigma_w:.4g}, $\\sigma_b$ = {sigma_b:.4g}: $\\chi_1$ = {float(deep.chi_1):.4g}")
    return figure


def theory_over_profile(dataset, phi: str, init: str) -> Figure:
    """Theory over one combination of a study, at its greatest depth: every field by layer, seeds' quartiles as a band.

    Args:
      dataset: of `vgrad.study.run`, with its predicted fields.  phi, init: which combination.
    Raises:
      ValueError: the combination is not in the data set, or the data set holds no prediction.
    """
    known = {"phi": list(dataset.phi.values), "init": list(dataset.init.values)}
    for name, value in (("phi", phi), ("init", init)):
        if value not in known[name]:
            raise ValueError(f"{name} is {value!r}, expected one of the study's: {', '.join(map(str, known[name]))}.")
    if "predicted_log_delta" not in dataset:
        raise ValueError("the data set holds no predicted_log_delta, expected a study with predictions: run it again.")
    depth = int(dataset.depth.values[-1])
    at = dataset.sel(phi=phi, init=init).isel(depth=-1)
    layer = np.arange(1, depth + 1)
    figure = Figure(figsize=(10, 6), layout="constrained")
    fields = {"log_delta": r"\delta_l", "log_grad_w": r"\partial J/\partial W_l", "log_grad_b": r"\partial J/\partial b_l",
              "log_h": "h_l"}  # fmt: skip
    panels: Any = figure.subplots(2, 2, sharex=True)
    for ax, (field, label) in zip(panels.flat, fields.items(), strict=True):
        seeds = np.where(np.isfinite(at[field].values), at[field].values, np.nan)
        if np.isfinite(seeds).any():
            low, middle, high = np.nanquantile(seeds[:, np.isfinite(seeds).any(axis=0)], [0.25, 0.5, 0.75], axis=0)
            seen = layer[np.isfinite(seeds).any(axis=0)]
            ax.fill_between(seen, low, high, color="0.8", label="seeds' quartiles", linewidth=0)
            ax.plot(seen, middle, color="0.35", linewidth=2.2, label="median")
        ax.plot(layer, at[f"predicted_{field}"].values, "--", color="black", linewidth=1.2, label="mean field")
        ax.set_ylabel(rf"$\ln\,\|{label}\|$")
    for ax in panels[1]:
        ax.set_xlabel("layer $l$ (1 = input)")
    figure.suptitle(f"{phi}, {str(init).replace('_', ' ')}, depth {depth}: theory over the measured profile")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure
