"""Low-rank compression: ranks, errors, quantisation and invalid arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featkd import linalg
from featkd.cache.lowrank import FORMS, LowRank, compress, dequantise, quantise, restore

ZEROS = torch.zeros(2, 5, 7)
pytestmark = pytest.mark.usefixtures("one_thread")


def maps(batch: int = 4, tokens: int = 20, channels: int = 30) -> Tensor:
    """Maps with a teacher-like spectrum: a dominant first value and a steep decay."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    s = 3 ** -torch.arange(u.shape[2], dtype=torch.float64).sqrt()
    s = 1000 * s ** torch.linspace(1, 3, batch, dtype=torch.float64)[:, None]
    return (u * s.unsqueeze(1)) @ vh


def product(factors: LowRank) -> Tensor:
    """Product of the factors in float64."""
    return torch.einsum("bnk,bck->bnc", factors.left.double(), factors.right.double())


def shares(x: Tensor, kept: Tensor) -> Tensor:
    """||X_k||^2 / ||X||^2 per image."""
    return 1 - (x - kept).flatten(1).norm(dim=1).square() / x.flatten(1).norm(dim=1).square()


@pytest.mark.parametrize("energy", [0.5, 0.95, 0.99, 0.999, 1])
@pytest.mark.parametrize("shape", [(4, 20, 30), (4, 30, 20), (3, 16, 16)])
def test_the_smallest_rank_that_keeps_the_energy(shape, energy):
    x = maps(*shape).float()
    factors, ranks = compress(x, energy=energy)
    assert torch.equal(ranks, linalg.energy_ranks(x, (energy,)).squeeze(1))
    assert factors.left.shape == (*shape[:2], ranks.max())
    assert factors.left.dtype == factors.right.dtype == torch.float32
    exact = torch.linalg.svdvals(x.double()).square()
    curve = exact.cumsum(1) / exact.sum(1, keepdim=True)
    for image, rank in enumerate(ranks.tolist()):
        assert curve[image, rank - 1] >= energy - 1e-9
        assert rank == 1 or curve[image, rank - 2] < energy
        assert not factors.left[image, :, rank:].any()
        assert not factors.right[image, :, rank:].any()
        basis = factors.right[image, :, :rank].double()
        torch.testing.assert_close(
            basis.mT @ basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6
        )
    kept = product(factors)
    want = curve.gather(1, ranks[:, None] - 1).squeeze(1)
    torch.testing.assert_close(shares(x.double(), kept), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_give_the_factors_of_their_values(dtype):
    x = maps().to(dtype)
    factors, ranks = compress(x, energy=0.99)
    same, others = compress(x.float(), energy=0.99)
    assert torch.equal(ranks, others)
    torch.testing.assert_close(restore(factors), restore(same))
    assert factors.left.dtype == torch.float32


def test_a_given_rank():
    x = maps()
    x[1] = x[1, :, :1] * x[1, :1]  # of rank 1
    x[2] = 0
    factors, ranks = compress(x, rank=3)
    assert ranks.tolist() == [3, 1, 0, 3]
    assert factors.left.shape[2] == factors.right.shape[2] == 3
    best = linalg.svd(x, k=3)
    want = (best.U * best.S.unsqueeze(1)) @ best.Vh
    torch.testing.assert_close(restore(factors).double(), want, rtol=0, atol=1e-3)
    assert not factors.left[1, :, 1:].any()
    whole, ranks = compress(x, rank=20)
    assert ranks.tolist() == [20, 1, 0, 20]
    torch.testing.assert_close(restore(whole).double(), x, rtol=0, atol=1e-3)


def test_nothing_to_keep():
    for x in (torch.zeros(2, 5, 7), torch.zeros(0, 5, 7), torch.zeros(2, 0, 7)):
        for wanted in ({"energy": 0.99}, {"rank": 0}):
            factors, ranks = compress(x, **wanted)
            assert factors.left.shape == (*x.shape[:2], 0)
            assert factors.right.shape == (len(x), 7, 0)
            assert ranks.tolist() == [0] * len(x)
            assert torch.equal(restore(factors), x)


def test_no_gradient_no_change_of_the_input_and_bitwise_repeatable():
    x = maps().requires_grad_()
    before = x.detach().clone()
    factors, _ = compress(x, energy=0.99)
    assert not factors.left.requires_grad
    assert torch.equal(x, before)
    again, _ = compress(x, energy=0.99)
    assert all(torch.equal(a, b) for a, b in zip(factors, again, strict=True))


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (ZEROS, {"rank": 6}, ValueError, r"rank: .* 0 to 5, min\(N, C\), got 6"),
        (ZEROS, {"rank": -1}, ValueError, "rank: .*got -1"),
        (ZEROS, {"rank": 2.0}, TypeError, "rank: expected an int .*got 2.0"),
        (ZEROS, {"rank": True}, TypeError, "rank: expected an int"),
        (ZEROS, {"energy": 0}, ValueError, "energy: .*got 0"),
        (ZEROS, {"energy": 1.5}, ValueError, "energy: .*got 1.5"),
        (ZEROS, {"energy": "all"}, TypeError, "energy: .*got 'all'"),
        (ZEROS, {}, ValueError, "energy, rank: expected exactly one of them, got None"),
        (ZEROS, {"energy": 0.9, "rank": 2}, ValueError, "energy, rank: .*0.9 and 2"),
        (torch.zeros(5, 7), {"rank": 2}, ValueError, r"features: expected shape \(B, N, C\)"),
        (torch.zeros(2, 5, 7).int(), {"rank": 2}, TypeError, "features: .*floating"),
        (torch.tensor([[[0.0]], [[torch.nan]]]), {"energy": 0.9}, ValueError, "image 1 of the"),
        (torch.tensor([[[torch.inf]]]), {"rank": 1}, ValueError, "image 0 of the batch holds NaN"),
    ],
)
def test_invalid_arguments_of_compress(x, options, error, message):
    with pytest.raises(error, match=message):
        compress(x, **options)


@pytest.mark.parametrize("form", FORMS)
def test_quantisation_errors_are_within_the_rounding(form):
    x = maps(channels=12).float() * torch.logspace(-20, 20, 12)
    stored, scale = quantise(x, form)
    assert stored.dtype == {"fp16": torch.float16, "int8": torch.int8}[form]
    assert scale.shape == (4, 1, 12)
    assert scale.dtype == torch.float32
    largest = x.abs().amax(1, keepdim=True)
    error = (dequantise(stored, scale) - x).abs()
    if form == "int8":
        assert (error <= largest / 254 * (1 + 1e-5)).all()
        assert (stored.abs().amax(1) == 127).all()
    else:
        assert (error <= x.abs() * 2**-11 + largest * 2**-39).all()
        assert (torch.frexp(scale).mantissa == 0.5).all()
        assert (stored.abs().amax(1) >= 2**14).all()
    assert dequantise(stored, scale, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_quantised_extremes(form):
    """The largest and smallest values, and zeros: no overflow and no 0 / 0."""
    most = 1e38
    x = torch.tensor([[most, 1e-30, 0.0, 1e-42], [-most, 0.0, 0.0, -1e-42]])
    got = dequantise(*quantise(x, form))
    assert got.isfinite().all()
    torch.testing.assert_close(got[:, :2], x[:, :2], rtol=1e-3, atol=0)
    assert not got[:, 2:].any()
    for shape in ((3, 0, 2), (0, 3, 2), (3, 2, 0)):
        stored, scale = quantise(torch.zeros(shape), form)
        assert dequantise(stored, scale).shape == shape


def test_massive_activations_survive_half_precision():
    x = maps()
    x[:, 0, 3] = 5e6  # float16 ends at 65504
    factors, _ = compress(x, energy=0.9999)
    kept = LowRank(*(dequantise(*quantise(f, "fp16")) for f in factors))
    torch.testing.assert_close(restore(kept)[:, 0, 3], x[:, 0, 3].float(), rtol=1e-3, atol=0)
    assert (shares(x, product(kept)) > 0.9998).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_restored_maps_are_rounded_once(dtype):
    """Also under autocast, and if a factor exceeds float16's range."""
    factors, _ = compress(120 * maps(), energy=0.999)
    want = product(factors)
    assert factors.left.abs().max() > 65504 > want.abs().max()
    rounding = want.abs() * torch.finfo(dtype).eps / 2 + 1e-6 * want.abs().max()
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            found = restore(factors, dtype)
        assert found.dtype == dtype
        assert ((found.double() - want).abs() <= rounding).all()


@pytest.mark.parametrize(
    ("x", "form", "error", "message"),
    [
        (torch.zeros(2, 3), "int4", ValueError, "form: expected one of fp16, int8; got 'int4'"),
        (torch.zeros(3), "int8", ValueError, r"x: expected at least 2 dimensions, got shape \(3,"),
        (torch.zeros(2, 3).int(), "int8", TypeError, "x: expected a floating-point tensor"),
        (torch.full((2, 3), torch.nan), "int8", ValueError, "x: expected finite values up to 1e"),
        (torch.full((2, 3), torch.inf), "fp16", ValueError, "x: expected finite values up to 1e"),
        (torch.full((2, 3), 1e39, dtype=torch.float64), "fp16", ValueError, "up to 1e"),
    ],
)
def test_invalid_arguments_of_quantise(x, form, error, message):
    with pytest.raises(error, match=message):
        quantise(x, form)
