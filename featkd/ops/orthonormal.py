"""Orthonormal bases of the columns of many matrices at once."""

from __future__ import annotations

import torch
from torch import Tensor

# What the first two Gram matrices of unit columns get added: it is above the rounding of their
# eigenvalues, and each of the two divides the condition number by up to 1e5.
_SHIFTS = (1e-10, 1e-10, 0.0, 0.0)


def is_batched_only(x: Tensor) -> bool:
    """Whether x is on a GPU, where calls that take one matrix after the other are slow."""
    return x.is_cuda


def orthonormal_columns(x: Tensor, missing: Tensor | None = None) -> Tensor:
    """The Q of X = Q R, where R's diagonal is positive.

    A CPU takes LAPACK's QR. On a GPU torch.linalg.qr makes Q matrix by matrix, so `by_cholesky`
    runs there. Differentiable.

    Args:
        x: (..., N, k), N >= k, float64.
        missing: (..., k) bool, the columns that carry nothing, such as zeros: arbitrary ones that
            complete the others take their places.
    """
    if is_batched_only(x):
        return by_cholesky(x, missing)
    q, r = torch.linalg.qr(x)  # completes by itself
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).to(x.dtype)
    positive: Tensor = q * signs.unsqueeze(-2)
    return positive


def by_cholesky(x: Tensor, missing: Tensor | None = None) -> Tensor:
    """`orthonormal_columns` by Cholesky factors of Gram matrices: batched calls alone.

    Q = X R^-1 with X^T X = R^T R, four times: two with a shift, so that Cholesky does not fail,
    and two that leave no trace of it. As exact as QR where the columns, divided by their lengths,
    have a condition number up to 1e15. Beyond it the columns are arbitrary, as QR's are, or NaN,
    which they always are where one that is not `missing` is zero.
    """
    # Q does not depend on the lengths; the first division keeps the squares in range
    q = x / x.detach().abs().amax(-2, keepdim=True)
    q = q / torch.linalg.vector_norm(q, dim=-2, keepdim=True)
    if missing is not None:
        # any columns in general position, the same each time
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
