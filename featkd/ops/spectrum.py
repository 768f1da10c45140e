"""Op for the singular values and ranks of `linalg`: schema, gradient, choice of backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from featkd.ops import backends, extension, reference

NAME = "spectrum"
MOST_ROWS = 512  # smaller side, as in csrc/linalg/problem.h
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Spectrum(NamedTuple):
    """Singular values of a batch of matrices, with diagnostics.

    Attributes:
        values: (..., n), singular values, descending; n is the smaller side.
        curve: (..., n), share of the squared Frobenius norm in the leading values; zeros for a
            zero matrix.
        ranks: (..., T) int64, least number of values whose share reaches each threshold; 0 for a
            zero matrix, -1 for a matrix with NaN or Inf.
        info: (...) int32: 0 if solved; 1 if the matrix holds NaN or Inf, and its results are NaN;
            2 if the sum of the eigenvalues differs from the trace by more than 2e-6 of it.
        residual: (...) float64, |sum of eigenvalues / trace - 1|.
        resolved: (...) int32: 1 if a float32 solve was within 1e-6 of a threshold, so that the
            matrix was solved again in float64.
    """

    values: Tensor
    curve: Tensor
    ranks: Tensor
    info: Tensor
    residual: Tensor
    resolved: Tensor


def spectrum(x: Tensor, thresholds: Sequence[float], *, wide: bool) -> Spectrum:
    """Computes the spectrum of x (..., N, D) on the chosen backend; `linalg` checks arguments.

    Args:
        wide: compute in float64 even if x is narrower; the dtype of the results stays.
    """
    backend = extension.choose(NAME, "featkd::spectrum", x.device, lambda: _unsupported(x))
    backends.record(NAME, backend)
    if backend == "reference":
        return Spectrum(*reference.spectrum(x, thresholds))
    batch = x.shape[:-2]
    matrices = x.reshape(-1, *x.shape[-2:]) if x.dim() != 3 else x
    found = torch.ops.featkd.spectrum(matrices, device_vector(x, thresholds), wide)
    return Spectrum(*(part.reshape((*batch, *part.shape[1:])) for part in found))


def _unsupported(x: Tensor) -> str:
    """Returns the reason if csrc does not support matrices (..., N, D), otherwise ""."""
    if x.dtype not in _DTYPES:
        return f"a tensor in {x.dtype}"
    if not 1 <= min(x.shape[-2:]) <= MOST_ROWS:
        return (
            f"matrices of {x.shape[-2]} x {x.shape[-1]}: the smaller side is not 1 to {MOST_ROWS}"
        )
    return ""


def device_vector(x: Tensor, values: Sequence[float]) -> Tensor:
    """Creates (T,) float64 on the device of x: CUDA graphs capture no copies from the host."""
    empty = x.new_empty(0, dtype=torch.float64)
    return torch.cat([empty, *(empty.new_full((1,), value) for value in values)])


torch.library.define(
    "featkd::spectrum",
    "(Tensor x, Tensor thresholds, bool wide) -> "
    "(Tensor values, Tensor curve, Tensor ranks, Tensor info, Tensor residual, Tensor resolved)",
)


@torch.library.register_fake("featkd::spectrum")  # type: ignore[untyped-decorator]
def _(x: Tensor, thresholds: Tensor, wide: bool) -> tuple[Tensor, ...]:
    batch, rows = x.shape[0], torch.sym_min(x.shape[1], x.shape[2])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty((batch, rows), dtype=dtype),
        x.new_empty((batch, rows), dtype=dtype),
        x.new_empty((batch, thresholds.shape[0]), dtype=torch.int64),
        x.new_empty(batch, dtype=torch.int32),
        x.new_empty(batch, dtype=torch.float64),
        x.new_empty(batch, dtype=torch.int32),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[0])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None
    (x,) = ctx.saved_tensors
    # torch's svd, so that the gradient can be differentiated again
    clean, factor = reference.set_bad_aside(x.to(grad.dtype))
    u, _, vh = torch.linalg.svd(clean, full_matrices=False)
    found = (u * grad.unsqueeze(-2)) @ vh * factor[..., None, None]
    return found.to(x.dtype), None, None


torch.library.register_autograd("featkd::spectrum", _differentiate, setup_context=_setup_context)
