"""Comparison of the accumulators with the published definitions."""

from __future__ import annotations

import numpy as np
import torch

from featkd.diagnostics import CapturedEnergy, DatasetPCA, LayerDiagnostics
from tests.diagnostics import published
from tests.diagnostics.maps import QUICK

THRESHOLDS = (0.8, 0.9, 0.95, 0.99)


def measure(maps, settings=QUICK):
    """Result of a layer with these maps (M, N, D)."""
    stats = LayerDiagnostics(settings)
    stats.update(maps)
    return stats.result()


def axes(parts, centred=False):
    """Dataset PCA of chunks of maps."""
    stats = DatasetPCA()
    for part in parts:
        stats.update(part)
    return stats.result(centred)


def capture(maps, pca):
    second = CapturedEnergy(pca, THRESHOLDS)
    second.update(maps, torch.arange(len(maps)))
    return second.result()


def assert_published(maps, settings, chunk):
    """Runs both passes over maps (M, N, D) in chunks; returns the result of the first."""
    plain = maps.double().numpy()
    chunks = list(zip(maps.split(chunk), torch.arange(len(maps)).split(chunk), strict=True))
    stats = LayerDiagnostics(settings)
    for part in chunks:
        stats.update(*part)
    result = stats.result()

    ranks, curves = published.spectrum(plain, THRESHOLDS)
    assert np.array_equal(result.spectrum.ranks, ranks)
    assert np.abs(result.spectrum.curve_mean.numpy() - curves.mean(0)).max() < 1e-6
    assert np.abs(result.spectrum.curve_std.numpy() - curves.std(0)).max() < 1e-5
    for column, summary in zip(ranks.T, result.spectrum.summaries, strict=True):
        assert summary.percentile99 == round(np.percentile(column, 99))
        assert (summary.mean, summary.median) == (column.mean(), np.median(column))

    values, vectors = published.dataset_pca(plain)
    assert np.abs(result.pca.eigenvalues.numpy() - values).max() < 1e-6 * values[0]
    second = CapturedEnergy(result.pca, THRESHOLDS)
    for part in chunks:
        second.update(*part)
    captured = second.result()
    dims, curves = published.captured(plain, vectors, THRESHOLDS)
    assert np.array_equal(captured.dims, dims)
    assert np.abs(captured.curve_mean.numpy() - curves.mean(0)).max() < 1e-6
    assert np.abs(captured.curve_std.numpy() - curves.std(0)).max() < 1e-5

    mean, std = published.sep(plain)
    assert np.abs(result.sep.mean.numpy() - mean).max() < 1e-6
    assert np.abs(result.sep.std.numpy() - std).max() < 1e-4
    expected = tuple(published.reaching(mean, share) for share in result.sep.shares)
    assert result.sep.bandwidth == expected

    if result.channels > 1:
        bases = [plain[image] for image in result.rotation.images]
        overlaps = [[published.overlap(x, y, result.rotation.k) for y in bases] for x in bases]
        assert np.abs(result.rotation.overlap.numpy() - overlaps).max() < 1e-6
    return result
