"""Sizes and types that launches have in common."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def triton_type(dtype: torch.dtype) -> Any:
    """The Triton name of a floating dtype."""
    return _TYPES[dtype]


def matmul_precision(compute: torch.dtype) -> str:
    """How float32 operands are multiplied: three tf32 products on the tensor cores, about as
    exact as float32 itself, or one where torch's own switch allows tf32."""
    if compute != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def channel_block(channels: int, compute: torch.dtype) -> int:
    """The power of two by which `channels` are cut, at least the tensor cores' 16.

    Padding costs work, and so does every block: 192 is cut by 64, 384 by 128, 100 by 128. Wider
    types get smaller blocks, whose operands must fit in shared memory.
    """

    def cost(block: int) -> float:
        return -(-channels // block) * (block + 16)

    largest = {2: 128, 4: 64, 8: 32}[compute.itemsize]
    return min((block for block in (128, 64, 32, 16) if block <= largest), key=cost)


def channels_adjacent(x: Tensor) -> Tensor:
    """`x`, or a copy of it where its last dimension is not contiguous: kernels load rows."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
