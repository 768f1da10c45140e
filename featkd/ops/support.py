"""What the ops' choice of a backend has in common."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from featkd import extension
from featkd.factors import LowRank

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOST_COLUMNS = 64  # of the patch grid: a tile of rows in Triton holds whole image rows


def unsupported(backend: str, x: Tensor, rows: int, others: Iterable[Tensor | None] = ()) -> str:
    """Why "cpu" or "triton" cannot take a call on `x` with so many rows at all, or "".

    `others` are the call's further tensors; only their dtypes matter.
    """
    kind = x.device.type
    for tensor in (x, *others):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"a tensor in {tensor.dtype}"
    if backend == "cpu":
        return extension.missing() if kind == "cpu" else f"tensors on {kind}"
    from featkd.kernels.launch import can_run_on

    if not can_run_on(x.device):
        return f"Triton kernels cannot run on tensors on {kind}"
    if rows >= 2**31:
        return f"{rows} tokens, not below 2^31"
    return ""


def operand_dtype(backend: str, x: Tensor) -> torch.dtype:
    """Type to which a projection's operands are rounded: x's own, or autocast's on a GPU.

    On a CPU the fused paths ignore autocast: rounding would cost time there and gain nothing.
    """
    return torch.get_autocast_dtype(x.device.type) if is_cast(backend, x) else x.dtype


def is_cast(backend: str, x: Tensor) -> bool:
    """Whether a fused path follows autocast for `x`, which it does on a GPU below float64."""
    on = torch.is_autocast_enabled(x.device.type)
    return backend == "triton" and x.dtype != torch.float64 and on


def no_autocast(x: Tensor) -> torch.autocast:
    """It would round the operands of the products that an op's backend makes."""
    return torch.autocast(x.device.type, enabled=False)


def is_being_exported() -> bool:
    """Whether a graph is being made for elsewhere, which must hold torch's own operators alone."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return bool(torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or tracing)


def factors(teacher: Tensor | LowRank) -> tuple[Tensor, Tensor | None]:
    """A teacher's map as the ops take it: itself and None, or its two factors."""
    return (teacher.left, teacher.right) if isinstance(teacher, LowRank) else (teacher, None)


def distance_factor(teacher: Tensor, width: int, right: Tensor | None = None) -> float:
    """Loss / sum(E H) of a feature distance: a mean over the elements of E, or, with `width`
    columns of the patch grid, over the real and imaginary parts of its half spectrum."""
    batch, tokens, channels = teacher.shape
    if right is not None:  # the teacher is the left factor
        channels = right.shape[1]
    if not width:
        return 1 / (batch * tokens * channels)
    return 0.25 / (batch * channels * (tokens // width) * (width // 2 + 1))
