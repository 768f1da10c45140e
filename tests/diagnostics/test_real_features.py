"""Accumulators and published definitions on the feature maps of a trained model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from featkd.models import create_student
from tests.diagnostics.compare import assert_published, measure
from tests.diagnostics.maps import QUICK

IMAGES = 120


@pytest.fixture(scope="module")
def maps():
    """Maps (images, 16, 32) of three layers of a ViT, briefly trained on scikit-learn's digits.

    Unlike noise they have background tokens, unequal channels and a mean.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().sub(5).div(3).unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    model = create_student(
        "vit_tiny_patch16_224", "plain", num_classes=10, img_size=8, patch_size=2, in_chans=1,
        embed_dim=32, depth=3, num_heads=4,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    model.train()
    for _ in range(4):
        for batch in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        logits, found = model.forward_with_features(images[1500:], range(3))
    assert (logits.argmax(1) == labels[1500:]).float().mean() > 0.4  # of ten classes
    yield [m[:IMAGES] for m in found]
    torch.set_num_threads(threads)


@pytest.mark.parametrize("layer", range(3))
def test_published_definitions(maps, layer):
    assert_published(maps[layer], QUICK, chunk=17)


def test_maps_are_not_noise(maps):
    """Otherwise this file adds nothing to the tests on made-up maps."""
    found = measure(maps[-1])
    rank, null = (s.summaries[1].mean for s in (found.spectrum, found.gaussian_spectrum))
    assert rank < 0.8 * null
    assert found.pca.spread[0] > 0.2
