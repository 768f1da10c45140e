"""talking_heads_attention on CPU tensors: blocks of scores that stay in the cache.

The products are BLAS's, and what lies between them is one sweep in C++: both mixes and the softmax
of a query's scores for all heads, in place. Equations as in `featkd.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    row_bytes = heads * tokens * dtype.itemsize
    images = max(1, _BLOCK_BYTES // (row_bytes * tokens))
    queries = tokens if images > 1 else max(1, min(tokens, _BLOCK_BYTES // row_bytes))
    scores = out.new_empty(images * heads * queries * tokens, dtype=dtype)
    for first in range(0, batch, images):
        q, k, v = (
            x[first : first + images].to(dtype).reshape(-1, tokens, dim)
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
