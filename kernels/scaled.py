"""The end of gradients: partial sums added up, and the factor that the backward pass knows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from featkd.kernels.launch import launch

_BLOCK = 2048
_SUM_BLOCK = 512  # an element's partial sums are read one after another: more programs instead


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


@triton.jit
def sum_and_scale(
    partial,  # (splits, elements) ACC, `stride` apart
    factor,  # one number, ACC; None for 1
    scaled,  # (elements,) any floating dtype
    splits, stride, elements, BLOCK: tl.constexpr,
):  # fmt: skip
    """scaled = factor * sum(partial), added up in the order of the splits."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < elements
    total = tl.zeros((BLOCK,), partial.dtype.element_ty)
    for _ in range(splits):
        total += tl.load(partial + place, mask=there, other=0.0)
        partial += stride
    if factor is not None:
        total = total * tl.load(factor)
    tl.store(scaled + place, total.to(scaled.dtype.element_ty), mask=there)


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


def sum_times(partial: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """factor * partial.sum(0) in `dtype`, rounded once: one launch where torch takes three.

    Args:
        partial: (splits, ...) float32 or float64; each entry contiguous, to be added up.
        factor: a scalar of the same dtype on the same device, or None for 1.
    """
    result = partial.new_empty(partial.shape[1:], dtype=dtype)
    arguments: dict[str, Any] = {
        "partial": partial,
        "factor": factor,
        "scaled": result,
        "splits": len(partial),
        "stride": partial.stride(0),
        "elements": result.numel(),
        "BLOCK": _SUM_BLOCK,
    }
    launch(sum_and_scale, (triton.cdiv(result.numel(), _SUM_BLOCK),), arguments, num_warps=4)
    return result
