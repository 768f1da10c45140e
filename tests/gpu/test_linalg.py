"""The accuracy suite of featkd.linalg on a CUDA device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import featkd
from featkd import linalg
from tests.ops.test_jacobi import graded
from tests.spectra import FAMILIES, THRESHOLDS, lapack
from tests.test_linalg import SHAPES, matrices

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_and_curves_are_those_of_float64_lapack(family: str, shape: tuple[int, int]):
    for dtype in (torch.float32, torch.float64):
        x = matrices(family, *shape).to(dtype)
        found, expected = linalg.spectrum(x.cuda(), THRESHOLDS), lapack(x.numpy())
        assert featkd.last_backend("spectrum") == "cuda"
        assert (found.ranks.cpu().numpy() == expected.ranks).all()
        # on a GPU the Gram matrix is not summed in float64, as it is on a CPU
        bound = 9e-7 if dtype == torch.float32 else 1e-12
        assert np.abs(found.curve.cpu().double().numpy() - expected.curve).max() <= bound
        twice = linalg.spectrum(x.cuda(), THRESHOLDS)
        assert all(torch.equal(one, two) for one, two in zip(found, twice, strict=True))


@pytest.mark.parametrize("shape", [(196, 384), (300, 200), (40, 33), (17, 17), (1, 4)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_jacobi_decomposes_every_family(family: str, shape: tuple[int, int]):
    x = matrices(family, *shape)
    found = linalg.svd(x.cuda(), method="jacobi")
    assert featkd.last_backend("svd") == "cuda"
    twice = linalg.svd(x.cuda(), method="jacobi")
    assert all(torch.equal(one, two) for one, two in zip(found, twice, strict=True))
    u, s, vh = (part.cpu() for part in found)
    largest = torch.from_numpy(lapack(x.numpy()).values)[:, :1].clamp_min(1e-300)
    assert ((s - linalg.svd(x, method="jacobi").S).abs() / largest).max() < 1e-13
    assert (s.diff(dim=-1) <= 1e-14 * largest).all()
    for part in (u, vh.mT):
        assert (part.mT @ part - torch.eye(min(shape))).abs().max() < 1e-12
    shown = (u * s.unsqueeze(-2)) @ vh
    assert ((shown - x).abs().amax((1, 2)) / largest[:, 0]).max() < 1e-12


def test_jacobi_with_scratch_in_global_memory_and_tiny_values():
    x = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = linalg.svd(x.cuda(), method="jacobi").S.cpu()
    torch.testing.assert_close(values, torch.linalg.svdvals(x), rtol=0, atol=1e-11)
    x, known = graded()
    found = linalg.svd(x.cuda(), method="jacobi").S.cpu()
    torch.testing.assert_close(found, known, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(196, 384), (300, 200), (40, 33)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_leading_vectors_of_every_family(family: str, shape: tuple[int, int]):
    x = matrices(family, *shape)
    u, s, vh = (part.cpu() for part in linalg.svd(x.cuda(), 20))
    assert featkd.last_backend("svd") == "cuda"
    largest = torch.from_numpy(lapack(x.numpy()).values)[:, :1].clamp_min(1e-300)
    assert ((s - linalg.svd(x, 20).S).abs() / largest).max() < 1e-7  # by the Gram matrix both
    for part in (u, vh.mT):
        assert (part.mT @ part - torch.eye(20)).abs().max() < 1e-12
    assert (((x @ vh.mT - u * s.unsqueeze(-2)).abs().amax((1, 2))) / largest[:, 0]).max() < 1e-7


def test_angles():
    one, other = matrices("flat", 384, 30, count=4), matrices("geometric", 384, 40, count=4)
    found = linalg.principal_angles(one.cuda(), other.cuda()).cpu()
    torch.testing.assert_close(found, linalg.principal_angles(one, other), rtol=1e-9, atol=1e-12)


def test_a_graph_captures_everything_and_replays_it():
    calls = [
        lambda x: linalg.spectrum(x).values,
        linalg.svdvals,
        lambda x: linalg.svd(x, 9).S,
        lambda x: linalg.svd(x, method="jacobi").S,
        lambda x: linalg.principal_angles(x[..., :5], x[..., 3:9]),
    ]
    first, second = (matrices("features", 60, 80, count=5).cuda() * scale for scale in (1, 3))
    x = first.clone()
    for call in calls:
        with torch.cuda.stream(torch.cuda.Stream()):
            call(x)  # workspaces of torch's libraries
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call(x)
        for given in (second, first):
            x.copy_(given)
            graph.replay()
            assert torch.equal(found, call(given))


def test_another_stream_and_scratch_in_global_memory():
    x = torch.randn(3, 500, 512, generator=torch.Generator().manual_seed(0))
    with torch.cuda.stream(torch.cuda.Stream()):
        values = linalg.svdvals(x.cuda()).cpu()
    torch.testing.assert_close(values, linalg.svdvals(x), rtol=0, atol=1e-4)


def test_a_bad_matrix_is_told_apart():
    x = matrices("features", 20, 30, count=3).float()
    x[1, 3, 3] = float("nan")
    found = linalg.spectrum(x.cuda())
    assert found.info.tolist() == [0, 1, 0]
    assert found.values[1].isnan().all()
