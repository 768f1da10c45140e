"""Orthonormal columns by Cholesky factors, the method on a GPU, compared with LAPACK's QR."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featkd.ops.orthonormal import by_cholesky, orthonormal_columns

SHAPES = [(384, 196), (196, 196), (60, 20), (5, 1), (1, 1)]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def conditioned(rows: int, columns: int, power: float) -> Tensor:
    """A matrix with condition number 10^power and similar columns."""
    left, right = (
        torch.linalg.qr(normal(rows, columns)).Q,
        torch.linalg.qr(normal(columns, columns)).Q,
    )
    return left * torch.logspace(0, -power, columns, dtype=torch.float64) @ right.mT


def errors(q: Tensor, x: Tensor) -> tuple[float, float, float]:
    """Errors of orthonormality, of the span of the columns, and of R below its diagonal."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    r = q.mT @ x
    lengths = torch.linalg.vector_norm(x, dim=-2)
    return (
        float((q.mT @ q - eye).abs().max()),
        float((torch.linalg.vector_norm(x - q @ r, dim=-2) / lengths).max()),
        float((r.tril(-1) / lengths).abs().max()),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("power", [0, 4, 8, 11, 13, 14.5])
def test_error_is_at_most_twice_qrs(shape: tuple[int, int], power: float):
    x = conditioned(*shape, power)
    ours, theirs = errors(by_cholesky(x), x), errors(orthonormal_columns(x), x)
    for one, other in zip(ours, theirs, strict=True):
        assert one <= 2 * other + 4e-15
    assert (by_cholesky(x).mT @ x).diagonal().min() > 0


def test_column_scale_does_not_change_result():
    """Columns over the whole range of float64."""
    x = normal(60, 20)
    graded = x * torch.logspace(-307, 307, 20, dtype=torch.float64)
    torch.testing.assert_close(by_cholesky(graded), by_cholesky(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_missing_columns_are_filled(shape: tuple[int, int]):
    x = normal(3, *shape)
    missing = torch.zeros(3, shape[1], dtype=torch.bool)
    missing[0, 3:] = missing[1, ::2] = missing[2] = True
    x[missing.unsqueeze(1).expand_as(x)] = 0
    q = by_cholesky(x, missing)
    assert (q.mT @ q - torch.eye(shape[1])).abs().max() < 4e-15
    kept = ~missing.unsqueeze(1)
    assert ((q @ (q.mT @ x) - x) * kept).abs().max() < 1e-13
    # missing columns do not change the others
    torch.testing.assert_close(q[0, :, :3], by_cholesky(x[0, :, :3]), rtol=0, atol=1e-14)


def test_unmarked_zero_column_gives_nan():
    x = normal(2, 9, 4)
    x[1, :, 2] = 0
    q = by_cholesky(x)
    assert q[1].isnan().any()
    assert torch.equal(q[0], by_cholesky(x[:1])[0])


def test_gradients_match_qr():
    x, weights = normal(2, 9, 5).requires_grad_(), normal(2, 9, 5).sin()
    found = [
        torch.autograd.grad((weights * function(x)).sum(), x)[0]
        for function in (by_cholesky, orthonormal_columns)
    ]
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)
