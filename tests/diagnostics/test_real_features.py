"""The accumulators against the published definitions on maps of a model that has learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from featkd.diagnostics import CapturedEnergy, LayerDiagnostics, Settings
from featkd.models import create_student
from tests.diagnostics import published

THRESHOLDS = (0.8, 0.9, 0.95, 0.99)
IMAGES = 120


@pytest.fixture(scope="module")
def maps():
    """Three layers' maps (images, 16, 32) of a ViT that has begun to tell scikit-learn's digits.

    Noise has no token of a background, no loud channels and no mean; these have.
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
def test_equal_to_the_published_definitions(maps, layer):
    features = maps[layer]
    plain = features.numpy()
    chunks = list(zip(features.split(17), torch.arange(IMAGES).split(17), strict=True))
    stats = LayerDiagnostics(Settings(sample=6, permuted=3, permutations=3, k=3))
    for part in chunks:
        stats.update(*part)
    found = stats.result()

    ranks, curves = published.spectrum(plain, THRESHOLDS)
    assert np.array_equal(found.spectrum.ranks, ranks)
    assert np.abs(found.spectrum.curve_mean.numpy() - curves.mean(0)).max() < 1e-6

    values, vectors = published.dataset_pca(plain)
    assert np.abs(found.pca.eigenvalues.numpy() - values).max() < 1e-6 * values[0]
    second = CapturedEnergy(found.pca, THRESHOLDS)
    for part in chunks:
        second.update(*part)
    dims, curves = published.captured(plain, vectors, THRESHOLDS)
    assert np.array_equal(second.result().dims, dims)
    assert np.abs(second.result().curve_mean.numpy() - curves.mean(0)).max() < 1e-6

    mean, std = published.sep(plain)
    assert np.abs(found.sep.mean.numpy() - mean).max() < 1e-6
    assert np.abs(found.sep.std.numpy() - std).max() < 1e-4
    assert found.sep.bandwidth == tuple(published.reaching(mean, s) for s in found.sep.shares)

    chosen = found.rotation.images.tolist()
    for row, i in enumerate(chosen):
        for column, j in enumerate(chosen):
            expected = published.overlap(plain[i], plain[j], 3)
            assert found.rotation.overlap[row, column].item() == pytest.approx(expected, abs=1e-6)


def test_the_maps_are_no_noise(maps):
    """Else this file would say no more than the tests on made-up maps."""
    stats = LayerDiagnostics(Settings(sample=6, permuted=3, permutations=20))
    stats.update(maps[-1])
    found = stats.result()
    own, null = (s.summaries[1].mean for s in (found.spectrum, found.gaussian_spectrum))
    assert own < 0.8 * null
    assert found.pca.spread[0] > 0.2
