"""A gradient times the factor that only the backward pass knows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from featkd.kernels.launch import launch

_BLOCK = 2048


@triton.jit
def scale(
    values,  # (elements,) any floating dtype
    factor,  # one number, float32 or float64
    scaled,  # (elements,) values' dtype
    elements, BLOCK: tl.constexpr,
):  # fmt: skip
    """scaled = values * factor, in factor's dtype until it is stored."""
    # 64 bits: there may be more than 2^31
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < elements
    product = tl.load(values + place, mask=there).to(factor.dtype.element_ty) * tl.load(factor)
    tl.store(scaled + place, product.to(scaled.dtype.element_ty), mask=there)


def times(values: Tensor, factor: Tensor) -> Tensor:
    """values * factor in the dtype of `values`, rounded once.

    torch would round the factor to a half type first, where 1e-7 has few bits or none.

    Args:
        values: contiguous, any floating dtype.
        factor: a scalar on the same device, float32 or float64.
    """
    result = torch.empty_like(values)
    arguments: dict[str, Any] = {
        "values": values,
        "factor": factor,
        "scaled": result,
        "elements": values.numel(),
        "BLOCK": _BLOCK,
    }
    launch(scale, (triton.cdiv(values.numel(), _BLOCK),), arguments, num_warps=4)
    return result
