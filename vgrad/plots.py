"""Pictures of a study, drawn from the stored data alone, and of a diagnosis.

The functions of a study take the `xarray.Dataset` of `vgrad.study.run`, `diagnosis` takes a `vgrad.Diagnosis`; all return a
`matplotlib.figure.Figure`. Lines differ in style as well as in colour, so that they can be told apart in grey.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

__all__ = ["FIGURES", "attribution", "delta_over_layers", "diagnosis", "grad_w1_against_depth", "save_all"]

_STYLES = ["-", "--", "-.", ":"]
_MARKERS = ["o", "s", "^", "v", "D", "P", "X", "*"]


def delta_over_layers(dataset) -> Figure:
    """ln ||delta_l|| over the layers, a line per depth, a panel per activation and initialization; bands are seeds' quartiles."""
    figure, axes = _panels(dataset)
    depths = [int(d) for d in dataset.depth.values[np.unique(np.linspace(0, dataset.sizes["depth"] - 1, 6).astype(int))]]
    colours = colormaps["viridis"](np.linspace(0, 0.85, len(depths)))
    for (i, j), ax in np.ndenumerate(axes):
        for n, (depth, colour) in enumerate(zip(depths, colours, strict=True)):
            lines = _finite(dataset.log_delta.isel(phi=i, init=j).sel(depth=depth).values[:, :depth])
            layer, style = np.arange(1, depth + 1), _STYLES[n % len(_STYLES)]
            low, middle, high = _quartiles(lines)
            ax.fill_between(layer, low, high, color=colour, alpha=0.25, linewidth=0)
            ax.plot(layer, middle, style, color=colour, label=f"depth {depth}", linewidth=1.4)
        deepest = np.arange(1, depths[-1] + 1)
        _mean_field(ax, deepest, dataset, "log_delta", phi=i, init=j, depth=-1, layer=slice(0, depths[-1]))
        _say_if_empty(ax)
    _finish(figure, axes, dataset, "layer $l$ (1 = input)", r"$\ln\,\|\delta_l\|$", "The backpropagated signal over the layers")
    return figure


def grad_w1_against_depth(dataset) -> Figure:
    """ln ||dJ/dW_1|| against depth, one panel per activation, one line per initialization, with the seeds' quartiles as bands.

    The grey area is where plain float32 has no number: below its smallest or above its largest.
    """
    num = dataset.sizes["phi"]
    figure = Figure(figsize=(3.4 * num + 0.6, 4.2), layout="constrained")
    axes: Any = figure.subplots(1, num, squeeze=False)
    depth = dataset.depth.values
    colours = colormaps["viridis"](np.linspace(0, 0.85, dataset.sizes["init"]))
    for i, ax in enumerate(axes[0]):
        for j, colour in enumerate(colours):
            low, middle, high = _quartiles(_finite(dataset.log_grad_w.isel(phi=i, init=j, layer=0).values))
            ax.fill_between(depth, low, high, color=colour, alpha=0.25, linewidth=0)
            style = dict(color=colour, linestyle=_STYLES[j % 4], marker=_MARKERS[j % 8], markersize=4, linewidth=1.4)
            ax.plot(depth, middle, label=_named(dataset.init.values[j]), **style)
        for j in range(len(colours)):
            _mean_field(ax, depth, dataset, "log_grad_w", phi=i, init=j, layer=0)
        bottom, top = ax.get_ylim()
        smallest, largest = np.log(1.4e-45), np.log(3.4e38)
        if bottom < smallest:
            ax.axhspan(bottom, smallest, color="0.88", zorder=0)
        if top > largest:
            ax.axhspan(largest, top, color="0.88", zorder=0)
        ax.set(ylim=(bottom, top), title=dataset.phi.values[i], xlabel="depth $L$ (weight matrices)")
        _say_if_empty(ax)
    axes[0, 0].set_ylabel(r"$\ln\,\|\partial J/\partial W_1\|$")
    _legend_below(figure, axes[0, 0])
    figure.suptitle("The gradient of the first layer against depth (grey: outside the range of float32)")
    return figure


def attribution(dataset) -> Figure:
    """What W^T and phi' each do to ln ||delta|| from layer to layer at the greatest depth: stacked bars, means over the seeds."""
    figure, axes = _panels(dataset)
    depth = int(dataset.depth.values[-1])
    layer = np.arange(1, depth - 1)  # hidden steps: from layer l + 1 down to l, without the readout's
    for (i, j), ax in np.ndenumerate(axes):
        at = dataset.isel(phi=i, init=j, depth=-1, layer=slice(0, depth - 2))
        w, phi = (_finite(v.values).mean(axis=0) for v in (at.log_gain_w, at.log_gain_phi))
        # Parts of opposite sign stand on either side of zero; parts of one sign stand on each other.
        base = np.where(np.sign(w) == np.sign(phi), w, 0)
        ax.use_sticky_edges = False  # else a panel ends where a bar does, and the sum runs along its frame
        ax.bar(layer, w, width=1.0, color="#3b6fb6", label=r"$W^\top$")
        hatched = dict(color="#f2b134", hatch="////", edgecolor="#8a5a00", linewidth=0)
        ax.bar(layer, phi, width=1.0, bottom=base, label=r"$\varphi'$", **hatched)
        ax.plot(layer, w + phi, color="black", linewidth=1.4, label="sum")
        if "predicted_log_delta" in dataset:
            _mean_field(ax, layer, -dataset.diff("layer"), "log_delta", phi=i, init=j, depth=-1, layer=slice(0, depth - 2))
        ax.axhline(0, color="0.3", linewidth=0.6)
        _say_if_empty(ax)
    title = f"What the weights and the activation do to the signal at each layer, depth {depth}"
    _finish(figure, axes, dataset, "layer $l$ (1 = input)", "change, nats per layer", title)
    return figure


def diagnosis(report) -> Figure:
    """A `vgrad.Diagnosis` over its sites in execution order: the backward signal, the gains, the forward signal, and flat units.

    A gain is the change from a site to the next deeper one; of delta, on the way back. Bands are standard deviations over batches.
    A cross on the lower edge is a site without a finite reading of delta.
    """
    num = len(report.site)
    labelled = num <= 48
    figure = Figure(figsize=(max(7.0, min(0.26 * num, 12) + 2.2), 9.2), layout="constrained")
    axes: Any = figure.subplots(4, 1, sharex=True, height_ratios=[3, 1.8, 2, 1.3])
    row = np.arange(num)
    lines = [
        (0, "log_delta", r"$\ln\,\|\delta\|$", "#3b6fb6", "-", "o"),
        (0, "log_grad_w", r"$\ln\,\|\partial J/\partial W\|$", "#b5651d", "--", "s"),
        (2, "log_rms_z", r"$\ln\,\mathrm{rms}\,z$", "#3b6fb6", "-", "o"),
        (2, "log_w", r"$\ln\,\|W\|$", "#b5651d", "--", "s"),
        (3, "dead_fraction", "dead units", "black", "-", "X"),
        (3, "saturated_fraction", "saturated entries", "#f2b134", "--", "D"),
        (3, "zero_fraction", r"zeros in $\delta$", "0.5", ":", "v"),
    ]
    for at, field, label, colour, style, marker in lines:
        value = _finite(getattr(report, field))
        look = dict(color=colour, linestyle=style, marker=marker, markersize=4, linewidth=1.2, label=label)
        axes[at].plot(row, value, **look)
        if field in report.spread:
            spread = _finite(report.spread[field])
            axes[at].fill_between(row, value - spread, value + spread, color=colour, alpha=0.25, linewidth=0)
    hatched = dict(color="#f2b134", hatch="////", edgecolor="#8a5a00", linewidth=0)
    gains = ("log_gain_backward", r"of $\delta$, back", -0.2, dict(color="#3b6fb6")), ("log_gain_forward", r"of $z$", 0.2, hatched)
    for field, label, shift, look in gains:
        axes[1].bar(row + shift, np.nan_to_num(_finite(getattr(report, field))), width=0.4, label=label, **look)
    axes[1].axhline(0, color="0.3", linewidth=0.6)
    lost = [i for i, v in enumerate(report.log_delta) if not np.isfinite(v)]
    if lost:
        edge = axes[0].get_xaxis_transform()
        axes[0].plot(lost, [0.02] * len(lost), "x", color="black", transform=edge, label="no finite reading", clip_on=False)
    for ax, ylabel in zip(axes, ("backward, nats", "gain, nats a step", "forward, nats", "fraction"), strict=True):
        ax.set_ylabel(ylabel)
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        ax.grid(axis="x", color="0.92")
    axes[3].set(ylim=(-0.05, 1.05), xlabel="" if labelled else "site, in execution order (input first)")
    if labelled:
        names = [name if len(name) <= 34 else "..." + name[-31:] for name in report.site]
        axes[3].set_xticks(row, names, rotation=90, fontsize=7)
    figure.suptitle("The gradient at every site, input on the left")
    return figure


FIGURES = {
    "delta_over_layers": delta_over_layers,
    "grad_w1_against_depth": grad_w1_against_depth,
    "attribution": attribution,
}


def save_all(dataset, folder: Path) -> list[Path]:
    """Draws all figures into a folder as PNG, and says where they are."""
    paths = [Path(folder) / f"{name}.png" for name in FIGURES]
    for path, draw in zip(paths, FIGURES.values(), strict=True):
        draw(dataset).savefig(path, dpi=130)
    return paths


def _mean_field(ax, at, dataset, field, **where):
    """The prediction as a thin dashed line, with one entry in the legend, where the data set holds one."""
    if f"predicted_{field}" in dataset:
        line = _finite(dataset[f"predicted_{field}"].isel(where).values)
        if np.isfinite(line).any():
            label = None if "mean field" in ax.get_legend_handles_labels()[1] else "mean field"
            ax.plot(at, line, "--", color="black", linewidth=0.8, label=label)


def _panels(dataset):
    rows, columns = dataset.sizes["phi"], dataset.sizes["init"]
    figure = Figure(figsize=(2.9 * columns + 0.6, 2.2 * rows + 1.1), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=True)


def _finish(figure, axes, dataset, xlabel, ylabel, title):
    for j, ax in enumerate(axes[0]):
        ax.set_title(_named(dataset.init.values[j]))
    for i, ax in enumerate(axes[:, 0]):
        ax.set_ylabel(f"{dataset.phi.values[i]}\n{ylabel}")
    for ax in axes[-1]:
        ax.set_xlabel(xlabel)
    figure.suptitle(title)
    _legend_below(figure, axes[0, 0])


def _legend_below(figure, ax):
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _finite(values):
    return np.where(np.isfinite(values), values, np.nan)


def _quartiles(values):
    """Over the first axis, the seeds; NaN, without a warning, where no seed has a finite reading."""
    counts = np.isfinite(values).any(axis=0)
    quartiles = np.full((3, values.shape[1]), np.nan)
    quartiles[:, counts] = np.nanpercentile(values[:, counts], [25, 50, 75], axis=0)
    return quartiles


def _say_if_empty(ax):
    if not any(np.isfinite(line.get_ydata()).any() for line in ax.lines if len(line.get_ydata()) > 2):
        ax.text(0.5, 0.5, "no finite reading", transform=ax.transAxes, ha="center", va="center", color="0.4")


def _named(scheme):
    return str(scheme).replace("_", " ")
