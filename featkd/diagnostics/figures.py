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
    labels = [("energy rank of the image", "images")]
    if r.captured is not None:
        labels.append(("dataset axes that the image needs", ""))
    figure, found = axes_for(labels)
    tables = [r.spectrum.ranks, *([] if r.captured is None else [r.captured.dims])]
    for axes, table in zip(found, tables, strict=True):
        nonzero = table[table[:, 0] != 0].numpy()  # an image that is all zero has no rank
        edges = _bin_edges(int(nonzero.max()))
        highest = 0.0
        colours = itertools.cycle(_COLOURS)
        labels_of_columns = [f"{format_percent(t)} %" for t in r.spectrum.thresholds]
        for colour, label, column in zip(colours, labels_of_columns, nonzero.T, strict=False):
            style: dict[str, Any] = {"histtype": "step", "color": colour, "linewidth": 1.5}
            counts, _, _ = axes.hist(column, bins=edges, label=label, **style)
            highest = max(highest, counts.max())
        axes.set_ylim(0, highest * (1.25 + 0.1 * len(r.spectrum.thresholds)))  # room for the legend
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend(axes, "of the energy", "upper right")
    return figure


def _bin_edges(largest: int) -> Any:
    """Edges of at most 40 equally wide bins for the integers 1 to `largest`."""
    width = -(-largest // 40)
    return np.arange(0, largest + width, width) + 0.5


def _energy(r: LayerResult) -> Figure:
    figure, (axes,) = axes_for([("leading channels", "share of the energy")])
    curves = [("own subspace of each image", r.spectrum.curve_mean, r.spectrum.curve_std)]
    if r.captured is not None:
        curves.append(("each image, data set's axes", r.captured.curve_mean, r.captured.curve_std))
    for colour, (label, mean, std) in zip(_COLOURS, curves, strict=False):
        index = range(1, len(mean) + 1)
        axes.plot(index, mean, color=colour, label=label)
        axes.fill_between(index, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    d = r.channels
    axes.plot(range(1, d + 1), r.pca.spread, color=_COLOURS[2], label="all tokens, data set's axes")
    null = r.gaussian_spectrum.curve_mean
    index = range(1, len(null) + 1)
    axes.plot(index, null, color=_COLOURS[0], linestyle=":", label="Gaussian, own subspace")
    axes.plot([0, d], [0, 1], color=_COLOURS[1], linestyle=":", label="Gaussian, the data set's")
    axes.set_ylim(0, 1.02)
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
        x = [(i + 1) / len(mean) for i in range(len(mean))]
        axes.plot(x, mean, color=_COLOURS[0], label="these features")
        axes.fill_between(x, mean - std, mean + std, color=_COLOURS[0], alpha=0.15, linewidth=0)
        axes.plot(x, null, color=_COLOURS[1], linestyle="--", label="Gaussian tokens")
        axes.set_ylim(0, 1.02)
    x = [(i + 1) / r.channels for i in range(r.channels)]
    permuted = r.permutation.permuted_curve
    full.plot(x, permuted, color=_COLOURS[2], linestyle=":", label="permuted channels")
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
    for number, model in enumerate(models):
        rows = {la.index: r for la, r in findings.layers.items() if la.model == model}
        index = sorted(rows)
        level = next(iter(rows.values())).spectrum.typical
        percent = format_percent(next(iter(rows.values())).spectrum.thresholds[level])
        ranks = [rows[i].spectrum.summaries[level].percentile99 for i in index]
        mark: dict[str, Any] = {"marker": "o", "markersize": 3, "color": _COLOURS[number]}
        name = f"{model}, " if model else ""
        axes.plot(index, ranks, label=f"{name}image's own subspace, {percent} %", **mark)
        dims = [r.captured.summaries[level].percentile99 for r in rows.values() if r.captured]
        if len(dims) == len(index):
            label = f"{name}data set's axes, {percent} %"
            axes.plot(index, dims, linestyle="--", label=label, **mark)
        axes.plot(
            index,
            [rows[i].channels for i in index],
            color=_COLOURS[number],
            linestyle=":",
            linewidth=1,
            label=f"{name}width",
        )
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, loc="outside upper center", columns=len(models))  # beside the lines, not on them
    return figure


def _reach(findings: Findings, found: StudentReach) -> Figure:
    r = findings.layers[found.teacher]
    figure, (axes,) = axes_for([("channels of the student", "share of the teacher's energy")])
    d = range(1, r.channels + 1)
    axes.plot(d, r.pca.spread, color=_COLOURS[0], label="one projector for all images")
    for curve, style, label in (
        (r.spectrum.curve_weighted, "-", "one projector per image"),
        (r.gaussian_spectrum.curve_mean, ":", "one per Gaussian map"),
    ):
        axes.plot(range(1, len(curve) + 1), curve, style, color=_COLOURS[2], label=label)
    axes.plot(
        [found.channels], [found.shared_with_bias], "o", color=_COLOURS[0], label="with a bias"
    )
    axes.plot(
        [found.channels], [found.pooled], "s", color=_COLOURS[1], label="pooled, no projector"
    )
    axes.axvline(found.channels, color=GREY, linestyle=":", label=f"student: {found.channels}")
    axes.set_ylim(0, 1.02)
    legend(axes)
    return figure
