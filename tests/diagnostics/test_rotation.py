"""Overlap of the images' leading subspaces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from featkd.diagnostics.subspace_rotation import measure_rotation
from tests.diagnostics.compare import axes, measure
from tests.diagnostics.maps import QUICK, feature_maps

pytestmark = pytest.mark.usefixtures("one_thread")


def test_images_of_one_subspace():
    scales = torch.arange(1, 6).view(5, 1, 1)
    found = measure(feature_maps(1, 25, 32).expand(5, -1, -1) * scales).rotation
    assert found.random == 3 / 32
    assert found.pair_mean == pytest.approx(1)
    assert found.dataset_mean == pytest.approx(1)
    assert float(found.angles_deg.max()) < 1e-3


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *made, 0)
        return out


def test_rotation_memory():
    images, tokens, channels, k = 60, 25, 32, 20
    maps = feature_maps(images, tokens, channels)
    pca = axes([maps])
    with LargestTensor() as largest:
        found = measure_rotation(maps, torch.arange(images), pca, k)
    assert (found.k, found.left_out) == (k, 0)
    assert largest.elements <= 128 * k * channels  # the pairs whose angles are taken
    assert largest.elements < (images * k) ** 2 / 10
    assert torch.equal(found.overlap, found.overlap.T)


def test_rotation_leaves_out_images_of_low_rank():
    """k is limited by the median rank; images of lower rank are left out."""
    settings = replace(QUICK, k=4)
    line = torch.randn(6, 16, 1) @ torch.randn(1, 20)
    found = measure(line, settings).rotation
    assert (found.k, found.left_out) == (1, 0)
    assert found.pair_mean == pytest.approx(1)
    mixed = feature_maps(6, 16, 20)
    mixed[0] = line[0]
    found = measure(mixed, settings).rotation
    assert (found.k, found.left_out) == (4, 1)
