"""What the ops' choice of a backend has in common."""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(backend: str, x: Tensor, rows: int) -> str:
    """Why "cpu" or "triton" cannot take a call on `x` with so many rows at all, or ""."""
    kind = x.device.type
    if backend == "cpu":
        return "" if kind == "cpu" else f"tensors on {kind}"
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
    kind = x.device.type
    if backend == "triton" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def distance_factor(teacher: Tensor, width: int) -> float:
    """Loss / sum(E H) of a feature distance: a mean over the elements of E, or, with `width`
    columns of the patch grid, over the real and imaginary parts of its half spectrum."""
    batch, tokens, channels = teacher.shape
    if not width:
        return 1 / teacher.numel()
    return 0.25 / (batch * channels * (tokens // width) * (width // 2 + 1))
