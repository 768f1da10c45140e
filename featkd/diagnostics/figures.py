"""Figures of the report, readable on a light and on a dark page."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from featkd.diagnostics.findings import Findings, format_percent
from featkd.diagnostics.layer_diagnostics import LayerResult
from featkd.diagnostics.student_reach import StudentReach
from featkd.runtime.files import atomic_write
from featkd.runtime.plots import GREY, as_svg, axes_for, legend

_TICKS = 16  # maximum tick labels of the rotation figure
_COLOURS = ("#3a86c8", "#d1495b", "#2a9d6f", "#c98a1b")


def draw(findings: Findings) -> dict[str, Figure]:
    """Draws the figures, by file name; figures of a single layer for the last layers only."""
    figures: dict[str, Figure] = {}
    last = findings.last_layers()
    for layer in last:
        result = findings.layers[layer]
        name = f"{layer.model or 'model'}-{layer.index}"
        figures[f"ranks-{name}"] = _ranks(result)
        figures[f"energy-{name}"] = _energy(result)
        figures[f"sep-{name}"] = _sep(result)
        if result.rotation is not None:
            figures[f"rotation-{name}"] = _rotation(result)
    if len(findings.layers) > len(last):
        figures["layers"] = _layers(findings)
    matched = findings.matched_reach()
    if matched is not None:
        figures["reach"] = _reach(findings, matched)
    return figures


def save(figures: dict[str, Figure], folder: Path) -> dict[str, str]:
    """Saves each figure as PNG and SVG; returns the SVGs by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    inline = {}
    for name, figure in figures.items():
        inline[name] = as_svg(figure)
        with atomic_write(folder / f"{name}.svg") as file:
            file.write(f'<?xml version="1.0" encoding="utf-8"?>\n{inline[name]}'.encode())
        with atomic_write(folder / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=150, facecolor="white", transparent=False)
    return inline


def _ranks(r: LayerResult) -> Figure:
    labels, tables = [("energy rank of the image", "images")], [r.spectrum.ranks]
    if r.captured is not None:
        labels.append(("dataset axes that the image needs", ""))
        tables.append(r.captured.dims)
    figure, found = axes_for(labels)
    for axes, table in zip(found, tables, strict=True):
        nonzero = table[table[:, 0] != 0].numpy()  # an image that is all zero has no rank
        edges = _bin_edges(int(nonzero.max()))
        highest = 0.0
        levels = zip(r.spectrum.thresholds, nonzero.T, itertools.cycle(_COLOURS), strict=False)
        for threshold, column, colour in levels:
            style: dict[str, Any] = {"histtype": "step", "color": colour, "linewidth": 1.5}
            counts, _, _ = axes.hist(
                column, bins=edges, label=f"{format_percent(threshold)} %", **style
            )
            highest = max(highest, counts.max())
        axes.set_ylim(0, highest * (1.25 + 0.1 * len(r.spectrum.thresholds)))  # room for the legend
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend(axes, "of the energy", "upper right")
    return figure


def _bin_edges(largest: int) -> Any:
    """Edges of at most 40 equally wide bins for the integers 1 to `largest`."""
    width = -(-largest // 40)
    return np.arange(0, largest + width, width) + 0.5


def _plot(
    axes: Any, curve: Any, colour: int, label: str, line: str = "-", std: Any = None, width: int = 1
) -> None:
    """Plots a curve over 1 to n, or over shares of `width`, shaded by a standard deviation."""
    x = np.arange(1, len(curve) + 1) / width
    axes.plot(x, curve, line, color=_COLOURS[colour], label=label)
    if std is not None:
        shade = {"color": _COLOURS[colour], "alpha": 0.15, "linewidth": 0}
        axes.fill_between(x, curve - std, curve + std, **shade)
    axes.set_ylim(0, 1.02)


def _energy(r: LayerResult) -> Figure:
    figure, (axes,) = axes_for([("leading channels", "share of the energy")])
    own, shared = r.spectrum, r.captured
    _plot(axes, own.curve_mean, 0, "own subspace of each image", std=own.curve_std)
    if shared is not None:
        _plot(axes, shared.curve_mean, 1, "each image, data set's axes", std=shared.curve_std)
    _plot(axes, r.pca.spread, 2, "all tokens, data set's axes")
    _plot(axes, r.gaussian_spectrum.curve_mean, 0, "Gaussian, own subspace", ":")
    diagonal = [0, r.channels], [0, 1]
    axes.plot(*diagonal, color=_COLOURS[1], linestyle=":", label="Gaussian, the data set's")
    legend(axes)
    return figure


def _sep(r: LayerResult) -> Figure:
    figure, (full, folded) = axes_for(
        [("frequency d / D, as published", "cumulative energy"), ("one-sided frequency", "")]
    )
    for axes, mean, std, null in (
        (full, r.sep.mean, r.sep.std, r.gaussian.mean),
        (folded, r.sep.folded_mean, r.sep.folded_std, r.gaussian.folded_mean),
    ):
        _plot(axes, mean, 0, "these features", std=std, width=len(mean))
        _plot(axes, null, 1, "Gaussian tokens", "--", width=len(mean))
    _plot(full, r.permutation.permuted_curve, 2, "permuted channels", ":", width=r.channels)
    legend(full)
    return figure


def _rotation(r: LayerResult) -> Figure:
    assert r.rotation is not None
    labels = [("sampled image (index in images.csv)", "sampled image")]
    figure, (axes,) = axes_for(labels, height=4.6)
    image = axes.imshow(r.rotation.overlap.numpy(), vmin=0, vmax=1, cmap="viridis")
    axes.grid(visible=False)
    indices = r.rotation.images.tolist()
    places = range(0, len(indices), -(-len(indices) // _TICKS))
    ticks = [str(indices[place]) for place in places]
    axes.set_xticks(places, ticks, rotation=90)
    axes.set_yticks(places, ticks)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(f"overlap of {r.rotation.k} leading dimensions", color=GREY)
    bar.ax.tick_params(colors=GREY)
    bar.ax.axhline(r.rotation.random, color="#ffffff", linewidth=1.5)
    return figure


def _layers(findings: Findings) -> Figure:
    figure, (axes,) = axes_for([("layer", "dimensions (99th percentile over images)")])
    models = sorted({layer.model for layer in findings.layers})
    for model, colour in zip(models, _COLOURS, strict=False):
        found = {la.index: r for la, r in findings.layers.items() if la.model == model}
        index = sorted(found)
        rows = [found[i] for i in index]
        level = rows[0].spectrum.typical
        percent = format_percent(rows[0].spectrum.thresholds[level])
        ranks = [r.spectrum.summaries[level].percentile99 for r in rows]
        mark: dict[str, Any] = {"marker": "o", "markersize": 3, "color": colour}
        name = f"{model}, " if model else ""
        axes.plot(index, ranks, label=f"{name}image's own subspace, {percent} %", **mark)
        dims = [r.captured.summaries[level].percentile99 for r in rows if r.captured]
        if len(dims) == len(index):
            label = f"{name}data set's axes, {percent} %"
            axes.plot(index, dims, linestyle="--", label=label, **mark)
        line: dict[str, Any] = {"color": colour, "linestyle": ":", "linewidth": 1}
        axes.plot(index, [r.channels for r in rows], label=f"{name}width", **line)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, loc="outside upper center", columns=len(models))  # beside the lines, not on them
    return figure


def _reach(findings: Findings, found: StudentReach) -> Figure:
    r = findings.layers[found.teacher]
    figure, (axes,) = axes_for([("channels of the student", "share of the teacher's energy")])
    _plot(axes, r.pca.spread, 0, "one projector for all images")
    _plot(axes, r.spectrum.curve_weighted, 2, "one projector per image")
    _plot(axes, r.gaussian_spectrum.curve_mean, 2, "one per Gaussian map", ":")
    for value, mark, colour, label in (
        (found.shared_with_bias, "o", 0, "with a bias"),
        (found.pooled, "s", 1, "pooled, no projector"),
    ):
        axes.plot([found.channels], [value], mark, color=_COLOURS[colour], label=label)
    axes.axvline(found.channels, color=GREY, linestyle=":", label=f"student: {found.channels}")
    legend(axes)
    return figure
