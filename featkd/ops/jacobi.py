"""One-sided Jacobi of csrc: the op, and `linalg.svd(method="jacobi")`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.ops import backends, extension, reference
from featkd.ops.orthonormal import orthonormal_columns
from featkd.ops.spectrum import MOST_ROWS

NAME = "svd"
_MOST_SWEEPS = 60  # of csrc/linalg/jacobi.h
_VECTOR = {"cpu": 8, "cuda": 32}  # numbers per vector register or warp
_NOTHING = 1e-135  # times the largest element: csrc treats shorter rows as zeros


def choose(x: Tensor) -> str:
    """Returns the backend for matrices (..., N, D): "cpu" or "cuda" (csrc), or "reference"."""

    def unsupported() -> str:
        if 1 <= min(x.shape[-2:]) <= MOST_ROWS:
            return ""
        return f"the smaller side of {x.shape[-2]} x {x.shape[-1]} is not 1 to {MOST_ROWS}"

    return extension.choose(NAME, "featkd::jacobi", x.device, unsupported)


def turn(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates the rows of each matrix until they are orthogonal.

    Args:
        rows: (..., n, length), float64, finite, n <= length.

    Returns:
        turns @ rows with the longest row first; turns (..., n, n), orthogonal; factors (...): NaN
        if 60 sweeps did not suffice, otherwise 1.
    """
    *batch, n, length = rows.shape
    padded = F.pad(rows, (0, -length % _VECTOR[rows.device.type]))
    found, turns, sweeps = torch.ops.featkd.jacobi(padded.reshape(-1, n, padded.shape[-1]))
    return (
        found[..., :length].reshape(rows.shape),
        turns[..., :n].reshape(*batch, n, n),
        torch.where(sweeps > _MOST_SWEEPS, torch.nan, 1.0).to(rows.dtype).reshape(batch),
    )


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes thin U, S, Vh of matrices (..., N, D) in float64 on the chosen backend.

    Raises:
        RuntimeError: a matrix holds NaN or Inf, or does not converge. While a CUDA graph is
            captured, which allows no synchronisation, the results are NaN instead.
    """
    backend = choose(x)
    backends.record(NAME, backend)
    clean, factor = reference.set_bad_aside(x.double())
    _check(factor, "x holds NaN or Inf, of which Jacobi finds no singular vectors")
    if backend == "reference":
        u, s, vh = torch.linalg.svd(clean, full_matrices=False)
    else:
        wide = x.shape[-2] <= x.shape[-1]
        largest = clean.abs().amax((-2, -1), keepdim=True)
        scale = torch.where(largest > 0, largest, 1)
        near, s, far, converged = _by_rows((clean if wide else clean.mT) / scale)
        _check(converged, f"a matrix does not converge in {_MOST_SWEEPS} sweeps")
        u, vh = (near, far.mT) if wide else (far, near.mT)
        s, factor = s * scale[..., 0], factor * converged
    each = factor[..., None]
    return u * each[..., None], s * each, vh * each[..., None]


def svdvals(x: Tensor) -> Tensor:
    """Computes singular values (..., n), descending, of float64 matrices with elements near 1.

    Each has a small relative error. They are NaN if csrc's Jacobi, which must support x, does not
    converge.
    """
    rows, _, converged = turn(x if x.shape[-2] <= x.shape[-1] else x.mT)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return lengths * converged[..., None]


def _by_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes U, S, V and the factors of `turn` for (..., n, D), n <= D, with largest element 1.

    X = T^T (T X), and the rows of T X are s_i v_i^T.
    """
    rows, turns, converged = turn(x)
    lengths = torch.linalg.vector_norm(rows, dim=-1)
    return turns.mT, lengths, orthonormal_columns(rows.mT, lengths <= _NOTHING), converged


def _check(factor: Tensor, message: str) -> None:
    if not _is_captured(factor) and bool(factor.isnan().any()):
        raise RuntimeError(f"svd: {message}")


def _is_captured(x: Tensor) -> bool:
    """Checks whether a CUDA graph is captured, which allows no synchronisation."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


torch.library.define(
    "featkd::jacobi", "(Tensor rows) -> (Tensor orthogonal, Tensor turns, Tensor sweeps)"
)


@torch.library.register_fake("featkd::jacobi")  # type: ignore[untyped-decorator]
def _(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        rows.new_empty(rows.shape),
        rows.new_empty(rows.shape),
        rows.new_empty(rows.shape[0], dtype=torch.int32),
    )
