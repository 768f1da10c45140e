"""One-sided Jacobi, which is independent of the solver by Gram matrix."""

from __future__ import annotations

import pytest
import torch

import featkd
from featkd import linalg
from featkd.ops import jacobi, orthonormal
from tests.spectra import FAMILIES, THRESHOLDS, matrices, svd_errors

ODD = [name for name in FAMILIES if name not in ("tiny", "huge")]


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("shape", [(40, 33), (20, 45), (17, 17), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_decomposition_of_all_families(family: str, shape: tuple[int, int], gpu: bool, monkeypatch):
    monkeypatch.setattr(orthonormal, "is_batched_only", lambda x: gpu)
    x = matrices(family, *shape)
    found = linalg.svd(x, method="jacobi")
    assert featkd.last_backend("svd") == "cpu"
    values, vectors, product = svd_errors(x, *found)
    assert values < 1e-13
    assert (found.S.diff(dim=-1) <= 1e-14 * found.S[:, :1]).all()
    assert vectors < 1e-12
    assert product < 1e-12


def graded() -> tuple[torch.Tensor, torch.Tensor]:
    """X = Q diag(s) and s, for an exactly orthogonal Q and powers of two s."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    values = 2.0 ** -torch.arange(0, 96, 6, dtype=torch.float64)
    return (hadamard / 4) * values, values


def test_small_singular_values_have_small_relative_error():
    x, values = graded()
    found = linalg.svd(x, method="jacobi").S
    torch.testing.assert_close(found, values, rtol=1e-13, atol=0)
    assert (linalg.svdvals(x) / values - 1).abs().max() > 0.1


@pytest.mark.parametrize("family", ODD)
def test_energy_ranks_match_sturm(family: str):
    x = matrices(family, 40, 50, count=3).float()
    energy = linalg.svd(x.double(), method="jacobi").S.square()
    total = energy.sum(-1, keepdim=True)
    curve = energy.cumsum(-1) / torch.where(total > 0, total, 1)
    below = (curve[..., None] < torch.tensor(THRESHOLDS, dtype=torch.float64) - 1e-10).sum(-2)
    ranks = torch.where(total > 0, below + 1, 0)
    assert torch.equal(linalg.energy_ranks(x, THRESHOLDS), ranks)


def test_dtypes_batches_k_and_repeatability():
    x = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        found = linalg.svd(x.to(dtype), k=4, method="jacobi")
        assert [tuple(part.shape) for part in found] == [(2, 3, 9, 4), (2, 3, 4), (2, 3, 4, 7)]
        assert all(part.dtype == torch.float32 for part in found)
        again = linalg.svd(x.to(dtype), k=4, method="jacobi")
        assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    assert linalg.svd(x[:0], method="jacobi").S.shape == (0, 3, 7)


def test_no_convergence_raises(monkeypatch):
    monkeypatch.setattr(jacobi, "_MOST_SWEEPS", 1)
    with pytest.raises(RuntimeError, match="a matrix does not converge in 1 sweeps"):
        linalg.svd(matrices("features", 20, 30), method="jacobi")


def test_cuda_graph_capture_returns_nan_instead_of_raising(monkeypatch):
    x = matrices("features", 20, 30, count=3)
    clean = linalg.svd(x, method="jacobi")
    x[1, 3, 3] = float("nan")
    monkeypatch.setattr(jacobi, "_is_captured", lambda x: True)
    for one, other in zip(clean, linalg.svd(x, method="jacobi"), strict=True):
        assert other[1].isnan().all()
        assert torch.equal(one[[0, 2]], other[[0, 2]])
    monkeypatch.setattr(jacobi, "_MOST_SWEEPS", 1)
    assert all(part.isnan().all() for part in linalg.svd(x, method="jacobi"))


def test_bad_arguments_and_reference_backend():
    x = torch.eye(3)
    with pytest.raises(ValueError, match="method: expected 'auto' or 'jacobi', got 'qr'"):
        linalg.svd(x, method="qr")  # type: ignore[arg-type]
    x[1, 1] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or Inf"):
        linalg.svd(x, method="jacobi")
    with featkd.use_backend("reference"):
        assert linalg.svd(torch.eye(3), method="jacobi").S.tolist() == [1, 1, 1]
    assert featkd.last_backend("svd") == "reference"
    with pytest.raises(RuntimeError, match="multiple of 8"):
        torch.ops.featkd.jacobi(torch.zeros(1, 3, 3, dtype=torch.float64))
    torch.library.opcheck(
        torch.ops.featkd.jacobi.default, (torch.eye(3, 8, dtype=torch.float64)[None],)
    )
