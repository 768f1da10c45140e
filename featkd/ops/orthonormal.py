"""Orthonormal bases for the columns of a batch of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

# Shifts added to the diagonal of each Gram matrix of unit columns. They exceed the rounding errors
# of its eigenvalues, and each shifted step divides the condition number by up to 1e5.
_SHIFTS = (1e-10, 1e-10, 0.0, 0.0)


def is_batched_only(x: Tensor) -> bool:
    """Checks whether x is on a GPU, where calls that process one matrix at a time are slow."""
    return x.is_cuda


def orthonormal_columns(x: Tensor, missing: Tensor | None = None) -> Tensor:
    """Computes Q of X = Q R with a positive diagonal of R; differentiable.

    Uses LAPACK's QR on a CPU and `by_cholesky` on a GPU, where torch.linalg.qr computes Q one
    matrix at a time.

    Args:
        x: (..., N, k), N >= k, float64.
        missing: (..., k) bool, columns without a direction, such as zeros. Arbitrary columns that
            complete the basis replace them.
    """
    if is_batched_only(x):
        return by_cholesky(x, missing)
    q, r = torch.linalg.qr(x)  # completes the basis itself
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).to(x.dtype)
    positive: Tensor = q * signs.unsqueeze(-2)
    return positive


def by_cholesky(x: Tensor, missing: Tensor | None = None) -> Tensor:
    """Computes `orthonormal_columns` from Cholesky factors of Gram matrices: batched calls only.

    Four steps of Q = X R^-1 with X^T X = R^T R: two with a shift, so that Cholesky does not fail,
    and two without one, which remove its effect. The result is as exact as QR if the columns,
    divided by their lengths, have a condition number of at most 1e15. Otherwise the columns are
    arbitrary, as with QR, or NaN. They are NaN if a column that is not `missing` is zero.
    """
    # Q does not depend on the lengths; the first division avoids overflow of the squares
    q = x / x.detach().abs().amax(-2, keepdim=True)
    q = q / torch.linalg.vector_norm(q, dim=-2, keepdim=True)
    if missing is not None:
        # columns in general position, the same in each call
        count = x.shape[-2] * x.shape[-1]
        numbers = torch.arange(count, dtype=x.dtype, device=x.device).square().sin()
        filling = numbers.view(x.shape[-2:]) / x.shape[-2] ** 0.5
        q = torch.where(missing.unsqueeze(-2), filling, q)
    for shift in _SHIFTS:
        gram = q.mT @ q
        gram.diagonal(dim1=-2, dim2=-1).add_(shift)
        r, info = torch.linalg.cholesky_ex(gram, upper=True)
        q = torch.linalg.solve_triangular(r, q, upper=True, left=False)
        q = q * torch.where(info == 0, 1.0, torch.nan)[..., None, None]
    return q
