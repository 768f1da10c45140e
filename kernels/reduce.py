"""Sum of the partial sums that the programs of a row kernel wrote, in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from featkd.kernels.launch import launch, triton_type

_PARTS, _BLOCK = 64, 32  # partial sums and elements per tile: 24 programs for 2 x 384
_LOSS_PARTS = 1024  # losses in flight at once


@triton.jit(do_not_specialize=["parts", "loss_parts"])
def sum_partials(
    partial,  # (groups, parts, elements) ACC, or None
    weight,  # (elements,) any floating dtype, or None for 1
    bias,  # (elements,) any floating dtype, or None for 0
    out,  # (groups, elements) any floating dtype
    loss_partial,  # (loss_parts,) ACC, or None
    loss,  # one number, ACC
    parts, loss_parts, elements, divisor,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, LOSS_PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = weight / divisor * sum(partial over its parts) + bias; loss = sum(loss_partial)."""
    group = tl.program_id(0)
    first = tl.arange(0, PARTS)
    if partial is not None:
        element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        there = element < elements
        total = tl.zeros((PARTS, BLOCK), ACC)
        at = partial + group.to(tl.int64) * parts * elements + element[None, :]
        for start in range(0, parts, PARTS):
            part = (start + first)[:, None]
            mask = (part < parts) & there[None, :]
            total += tl.load(at + part.to(tl.int64) * elements, mask=mask, other=0.0)
        result = tl.sum(total, 0) / divisor
        if weight is not None:
            result *= tl.load(weight + element, mask=there, other=0.0).to(ACC)
        if bias is not None:
            result += tl.load(bias + element, mask=there, other=0.0).to(ACC)
        to = out + group.to(tl.int64) * elements + element
        tl.store(to, result.to(out.dtype.element_ty), mask=there)
    if loss_partial is not None:
        if (tl.program_id(1) == 0) & (group == 0):
            sums = tl.zeros((LOSS_PARTS,), ACC)
            for start in range(0, loss_parts, LOSS_PARTS):
                part = start + tl.arange(0, LOSS_PARTS)
                sums += tl.load(loss_partial + part, mask=part < loss_parts, other=0.0)
            tl.store(loss, tl.sum(sums, 0))


def add_up(
    partial: Tensor | None,
    out: Tensor | None,
    loss_partial: Tensor | None = None,
    loss: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    divisor: int = 1,
) -> None:
    """Adds up partial sums in one launch, always in the same order.

    Args:
        partial: (groups, parts, elements), float32 or float64, contiguous; None for no `out`.
        out: receives weight / divisor * sum(partial over its parts) + bias; (groups, elements),
            contiguous, any floating dtype.
        loss_partial: (parts,), float32 or float64, contiguous; None for no `loss`.
        loss: receives the sum of `loss_partial`; ().
        weight, bias: (elements,), any floating dtype; None for 1 and 0.
    """
    groups, parts, elements = (1, 0, 0) if partial is None else partial.shape
    source = loss_partial if partial is None else partial
    assert source is not None
    arguments: dict[str, Any] = {
        "partial": partial,
        "weight": weight,
        "bias": bias,
        "out": out,
        "loss_partial": loss_partial,
        "loss": loss,
        "parts": parts,
        "loss_parts": 0 if loss_partial is None else len(loss_partial),
        "elements": elements,
        "divisor": divisor,
        "PARTS": _PARTS,
        "BLOCK": _BLOCK,
        "LOSS_PARTS": _LOSS_PARTS,
        "ACC": triton_type(source.dtype),
    }
    launch(sum_partials, (groups, max(1, -(-elements // _BLOCK))), arguments, num_warps=4)


def norm_gradients(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns gradients of LayerNorm parameters, (parameters, channels), from one launch.

    Args:
        partial: (programs, parameters, channels), float32 or float64, contiguous.
        dtype: dtype of the gradients.
    """
    programs, count, channels = partial.shape
    out = partial.new_empty(count, channels, dtype=dtype)
    add_up(partial.view(1, programs, count * channels), out.view(1, -1))
    return out
