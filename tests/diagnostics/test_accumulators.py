"""Accumulators: published definitions, bitwise independence of order, scales, errors."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from featkd.diagnostics import SEP, CapturedEnergy, LayerDiagnostics, Settings, SpectrumStats
from featkd.diagnostics.exact_sum import ExactSum
from featkd.diagnostics.feature_sample import FeatureSample
from featkd.diagnostics.source import Layer
from featkd.diagnostics.student_reach import student_reach
from tests.diagnostics import published
from tests.diagnostics.compare import THRESHOLDS, assert_published, axes, capture, measure
from tests.diagnostics.maps import QUICK, feature_maps

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(result):
    """Fields of a result, to be compared bit by bit."""
    return tree_map(lambda x: x.tolist() if isinstance(x, Tensor) else x, asdict(result))


@pytest.mark.parametrize(
    ("tokens", "channels", "dtype"),
    [
        (49, 32, torch.float32),
        (25, 64, torch.float32),
        (16, 33, torch.float64),
        (36, 48, torch.bfloat16),
        (7, 1, torch.float32),
    ],
)
def test_published_definitions(tokens, channels, dtype):
    assert_published(feature_maps(40, tokens, channels).to(dtype), QUICK, chunk=7)


def test_folded_curve_is_the_one_sided_spectrum():
    for channels in (12, 13):
        maps = feature_maps(3, 5, channels)
        found = measure(maps).sep
        power = np.abs(np.fft.rfft(maps.double().numpy().reshape(-1, channels))) ** 2
        power[:, 1 : (channels + 1) // 2] *= 2
        curves = np.cumsum(power, -1) / power.sum(-1, keepdims=True)
        assert np.abs(found.folded_mean.numpy() - curves.mean(0)).max() < 1e-6
        assert np.abs(found.folded_std.numpy() - curves.std(0)).max() < 1e-5


def test_large_mean_token_keeps_accuracy():
    """The tokens' mean is a thousand times their spread."""
    maps = feature_maps(30, 25, 24) + 3e3
    for centred in (False, True):
        values, vectors = published.dataset_pca(maps.numpy(), centred)
        pca = axes(maps.split(8), centred)
        assert np.abs(pca.eigenvalues.numpy() - values)[1:].max() < 2e-6 * values[1]
    mean = maps.double().numpy().reshape(-1, 24).mean(0)
    dims, _ = published.captured(maps.numpy(), vectors, THRESHOLDS, mean)
    assert np.array_equal(capture(maps.double(), pca).dims, dims)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_merge_is_bitwise_equal_in_any_order(processes):
    maps = feature_maps(33, 16, 20)
    chunks = list(zip(maps.split(4), torch.arange(33).split(4), strict=True))

    def run(order):
        stats = LayerDiagnostics(QUICK)
        stats.calibrate(maps[:4])
        for number in order:
            stats.update(*chunks[number])
        return stats

    alone = run(range(len(chunks))).result()
    parts = [run(range(r, len(chunks), processes)) for r in reversed(range(processes))]
    for part in parts[1:]:
        parts[0].merge(part)
    merged = parts[0].result()
    assert plain(alone) == plain(merged)

    halves = CapturedEnergy(alone.pca, THRESHOLDS), CapturedEnergy(alone.pca, THRESHOLDS)
    whole = CapturedEnergy(alone.pca, THRESHOLDS)
    for number, chunk in enumerate(chunks):
        halves[number % 2].update(*chunk)
        whole.update(*chunk)
    halves[1].merge(halves[0])
    assert plain(whole.result()) == plain(halves[1].result())


def test_state_dict_round_trip(tmp_path):
    maps = feature_maps(20, 9, 16)
    whole, first = LayerDiagnostics(QUICK), LayerDiagnostics(QUICK)
    whole.update(maps[:10])
    first.update(maps[:10])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = LayerDiagnostics(QUICK)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for stats in (whole, resumed):
        stats.update(maps[10:])
    assert plain(whole.result()) == plain(resumed.result())


def test_zero_tokens_and_images():
    maps = feature_maps(6, 9, 16)
    maps[2] = 0
    maps[3, :4] = 0
    found = measure(maps)
    assert (found.sep.tokens, found.sep.zero_tokens) == (6 * 9 - 13, 13)
    assert found.spectrum.ranks[2].tolist() == [0, 0, 0, 0]
    assert capture(maps, found.pca).dims[2].tolist() == [0, 0, 0, 0]
    keep = maps.flatten(0, 1)[maps.flatten(0, 1).abs().amax(1) > 0]
    mean, _ = published.sep(keep[None].numpy())
    assert np.abs(found.sep.mean.numpy() - mean).max() < 1e-6


def test_sep_of_extreme_scales():
    maps = feature_maps(4, 9, 16).double()
    stats = [SEP() for _ in range(3)]
    for one, scale in zip(stats, (1e-200, 1.0, 1e200), strict=True):
        one.update(maps * scale)
    tiny, found, huge = (one.result().mean for one in stats)
    assert (tiny - found).abs().max() < 1e-9
    assert (huge - found).abs().max() < 1e-9


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**55])
@pytest.mark.parametrize("centred", [False, True])
def test_pca_of_extreme_scales(scale, centred):
    """In float32 the square of 1e-30 is zero, and the square of 1e17 approaches the maximum."""
    maps = feature_maps(12, 9, 16)
    plain, scaled = (axes((maps * factor).split(6), centred) for factor in (1.0, scale))
    difference = plain.eigenvalues - scaled.eigenvalues / scale**2
    assert difference.abs().max() < 1e-6 * plain.eigenvalues[0]
    captured, same = capture(maps, plain), capture(maps * scale, scaled)
    assert torch.equal(captured.dims, same.dims)
    assert (captured.curve_mean - same.curve_mean).abs().max() < 1e-6


def test_smallest_numbers_of_float32():
    """A scale that brings them to 1 would be infinite."""
    maps = feature_maps(6, 9, 16) * 2.0**-140
    found = measure(maps)
    mean, _ = published.sep(maps.numpy())
    assert np.abs(found.sep.mean.numpy() - mean).max() < 1e-6
    _, vectors = published.dataset_pca(maps.numpy())
    dims, _ = published.captured(maps.numpy(), vectors, THRESHOLDS)
    assert np.array_equal(capture(maps, found.pca).dims, dims)


def test_captured_energy_of_images_of_very_different_scale():
    maps = feature_maps(6, 9, 16)
    pca = axes([maps])
    faint = maps.clone()
    faint[2] *= 2.0**-100
    assert torch.equal(capture(maps, pca).dims, capture(faint, pca).dims)


def test_sample_is_uniform_and_independent_of_order():
    images = torch.arange(400)
    features = images.view(-1, 1, 1).float()
    counts = torch.zeros(400)
    for seed in range(60):
        sample = FeatureSample(20, seed)
        for part in torch.randperm(400, generator=torch.Generator().manual_seed(seed)).split(30):
            sample.update(features[part], part)
        chosen, kept = sample.result()
        straight = FeatureSample(20, seed)
        straight.update(features, images)
        assert torch.equal(chosen, straight.result()[0])
        assert torch.equal(kept.flatten().long(), chosen)
        counts[chosen] += 1
    assert counts.sum() == 1200
    assert counts.max() <= 12  # 3 are expected


def exact_sum(values):
    total = ExactSum()
    for value in values:
        total.add(value)
    return total


def test_exact_sum_is_independent_of_order_and_scale():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 3, dtype=torch.float64, generator=generator)
    values *= 10.0 ** torch.randint(-200, 200, (60, 1), generator=generator).double()
    forward, backward, even, odd = (
        exact_sum(part) for part in (values, values.flip(0), values[::2], values[1::2])
    )
    odd.merge(even)
    assert torch.equal(forward.value(), backward.value())
    assert torch.equal(forward.value(), odd.value())
    exact = [math.fsum(column) for column in values.T.tolist()]
    assert np.allclose(forward.value(), exact, rtol=1e-11)
    for value in values:
        forward.add(-value)
    assert forward.value().abs().max() == 0
    with pytest.raises(ValueError, match="NaN or Inf"):
        forward.add(torch.full((3,), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected shape"):
        forward.add(torch.zeros(2, dtype=torch.float64))
    full = exact_sum(torch.tensor([0.3], dtype=torch.float64))
    assert 2**62 // full._bounds[-40] == 2**21  # as documented
    full._bounds[-40] = 2**62
    with pytest.raises(OverflowError, match="additions"):
        full.add(torch.tensor(0.3, dtype=torch.float64))


def test_pca_of_chunks_of_very_different_scale():
    maps = feature_maps(12, 16, 20)
    maps[:4] *= 1e-9
    maps[4:8] *= 1e9
    values, _ = published.dataset_pca(maps.numpy())
    assert np.abs(axes(maps.split(4)).eigenvalues.numpy() - values).max() < 1e-6 * values[0]


def test_student_reach_definitions():
    maps = feature_maps(40, 25, 24)
    maps[3] *= 20  # images are weighted by their energy
    found = student_reach(Layer("teacher", 0), measure(maps), 6)
    tokens = maps.double().reshape(-1, 24).numpy()
    total = (tokens**2).sum()
    s = np.linalg.svd(tokens, compute_uv=False)
    assert found.shared == pytest.approx((s[:6] ** 2).sum() / total, abs=1e-6)
    centred = np.linalg.svd(tokens - tokens.mean(0), compute_uv=False)
    assert found.shared_with_bias == pytest.approx(1 - (centred[6:] ** 2).sum() / total, abs=1e-6)
    q, _ = np.linalg.qr(torch.nn.functional.adaptive_avg_pool1d(torch.eye(24), 6).double().numpy())
    assert found.pooled == pytest.approx(((tokens @ q) ** 2).sum() / total, abs=1e-6)
    own = sum((np.linalg.svd(x, compute_uv=False)[:6] ** 2).sum() for x in maps.double().numpy())
    assert found.per_image == pytest.approx(own / total, abs=1e-6)


def test_bad_input_raises():
    stats = LayerDiagnostics(QUICK)
    stats.update(feature_maps(3, 9, 16))
    with pytest.raises(ValueError, match=r"features: expected shape \(B, 9, 16\), got \(3, 9, 17"):
        stats.update(feature_maps(3, 9, 17))
    with pytest.raises(TypeError, match=r"features: expected a floating-point tensor"):
        stats.update(torch.ones(3, 9, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="features: hold NaN or Inf"):
        stats.update(torch.full((1, 9, 16), torch.inf))
    stats.update(feature_maps(3, 9, 16), torch.arange(2, 5))
    with pytest.raises(
        ValueError, match="images: expected each index once, got 1 twice, the first is 2"
    ):
        stats.result()
    with pytest.raises(ValueError, match="no image was added"):
        LayerDiagnostics(QUICK).result()
    for wrong in ({"k": 0}, {"thresholds": (0.0,)}, {"sample": 1}, {"shares": ()}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)
    for one, message in ((SpectrumStats(), "no image was added"), (SEP(), "no token is nonzero")):
        with pytest.raises(ValueError, match=message):
            one.result()
