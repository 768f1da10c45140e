"""Figures of the report: bins and legend."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from featkd.diagnostics import Settings, figures
from featkd.diagnostics.source import Layer
from tests.diagnostics.compare import measure
from tests.diagnostics.maps import feature_maps

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(sample=3, permuted=1, permutations=1)


@pytest.mark.parametrize("largest", [1, 2, 39, 40, 41, 55, 80, 81, 384])
def test_bins_hold_equally_many_integers(largest):
    edges = figures._bin_edges(largest)
    assert edges[0] == 0.5
    assert edges[-1] >= largest + 0.5
    assert len(edges) <= 41
    held = {sum(a < n < b for n in range(1, 2 * largest + 9)) for a, b in itertools.pairwise(edges)}
    assert len(held) == 1
    assert len(edges) == 2 or edges[-2] < largest


@pytest.mark.parametrize("thresholds", [(0.8, 0.9, 0.95, 0.99), (0.9,)])
def test_legend_of_ranks_covers_no_outline(thresholds):
    maps = feature_maps(120, 25, 24)
    maps[5] = 0
    figure = figures._ranks(measure(maps, replace(SETTINGS, thresholds=thresholds)))
    figure.canvas.draw()
    (axes,) = figure.axes
    box = axes.get_legend().get_window_extent()
    outlines = [patch.get_path() for patch in axes.patches]
    assert len(outlines) == len(thresholds)
    for outline in outlines:
        found = axes.transData.transform(outline.vertices)
        assert not torch.tensor([box.contains(x, y) for x, y in found]).any()
    counted = sum(sum(p.vertices[1:-1:2, 1]) for p in outlines) / len(thresholds)
    assert counted == 119


def test_legend_of_layers_is_beside_the_lines():
    result = measure(feature_maps(6, 25, 24), SETTINGS)
    layers = {Layer(model, index): result for model in ("a", "b") for index in (1, 0)}
    figure = figures._layers(SimpleNamespace(layers=layers))
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert len(legend.get_texts()) == len(axes.lines)
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
