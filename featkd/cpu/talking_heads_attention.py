"""talking_heads_attention on CPU tensors: blocks of scores that stay in the cache.

The products are BLAS's, and what lies between them is one sweep in C++: both mixes and the softmax
of a query's scores for all heads, in place. Where the processor multiplies in bf16, scores of bf16
inputs are bf16 too, as they are with torch's operations; the sweep computes in float32.
Equations as in `featkd.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featkd.cpu.chunks import product_dtype
from featkd.cpu.rows import mix_heads
from featkd.reference import accumulation_dtype

_BLOCK_BYTES = 2**22  # of scores


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre_weight: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
    *,
    scale: float,
) -> Tensor:
    """O (B, heads, N, d) in the query's dtype, a view of (B, N, heads, d).

    Args:
        query, key, value: (B, heads, N, d), any strides.
        pre_weight, post_weight: (heads, heads).
        post_bias: (heads,).
        scale: of the scores.
    """
    dtype = accumulation_dtype(query.dtype)
    batch, heads, tokens, dim = query.shape
    pre = (pre_weight.to(dtype) * scale).contiguous()
    post, bias = post_weight.to(dtype).contiguous(), post_bias.to(dtype).contiguous()
    out = query.new_empty(batch, tokens, heads, dim)
    stored = product_dtype(query)
    images, queries = _block(batch, tokens, heads * tokens * stored.itemsize)
    scores = out.new_empty(images * heads * queries * tokens, dtype=stored)
    for first in range(0, batch, images):
        q, k, v = (
            x[first : first + images].to(stored).reshape(-1, tokens, dim)
            for x in (query, key, value)
        )
        for start in range(0, tokens, queries):
            rows = q[:, start : start + queries]
            block = scores[: rows.shape[0] * rows.shape[1] * tokens]
            block = block.view(rows.shape[0], rows.shape[1], tokens)
            torch.bmm(rows, k.mT, out=block)
            mix_heads(block.view(-1, heads, *block.shape[1:]), pre, post, bias)
            mixed = torch.bmm(block, v).view(-1, heads, rows.shape[1], dim)
            out[first : first + images, start : start + queries] = mixed.transpose(1, 2)
    return out.transpose(1, 2)


def _block(batch: int, tokens: int, row_bytes: int) -> tuple[int, int]:
    """Images and queries of a block: some whole images, as even as may be, or some queries of one.

    Args:
        batch, tokens: of the maps.
        row_bytes: of the scores of a query.
    """
    images = _BLOCK_BYTES // (row_bytes * tokens)
    if images > 1:
        return -(-batch // -(-batch // images)), tokens
    return 1, max(1, min(tokens, _BLOCK_BYTES // row_bytes))
