"""The op behind `functional.talking_heads_attention`: csrc's sweep on a CPU, else plain torch.

The custom op has no backward pass: it is for teachers. With gradients the reference runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featkd.ops import backends, extension, reference, support
from featkd.runtime.environment import multiplies_bf16

NAME = "talking_heads_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK_BYTES = 2**22  # of scores: what the processor's cache holds


def talking_heads_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Output by the chosen backend; arguments as in `featkd.ops.reference`, taken as valid."""
    parameters = (pre_weight, pre_bias, post_weight, post_bias)
    tensors = (query, key, value, *parameters)
    if support.is_being_exported() or _choose(tensors) == "reference":
        backends.record(NAME, "reference")
        return reference.talking_heads_attention(query, key, value, *parameters, scale=scale)
    # the softmax is the same for any pre_bias
    out: Tensor = _forward(query, key, value, pre_weight, post_weight, post_bias, scale)
    return out


def _choose(tensors: tuple[Tensor, ...]) -> str:
    query = tensors[0]

    def unsupported() -> str:
        if backends.wanted_backend() == "triton":
            return "it has no Triton kernel"
        if query.dtype not in _DTYPES:
            return f"csrc has no kernel for {query.dtype}"
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return "an input requires grad, and csrc's kernel has no backward pass"
        return ""

    if query.device.type != "cpu" and backends.wanted_backend() == "auto":
        return "reference"
    return extension.choose(NAME, "featkd::mix_heads", query.device, unsupported)


@torch.library.custom_op("featkd::talking_heads_attention", mutates_args=(), device_types="cpu")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre_weight: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
    scale: float,
) -> Tensor:
    """O (B, heads, N, d) in the query's dtype, a view of (B, N, heads, d).

    The products are BLAS's, on blocks of scores that stay in the cache. What lies between them is
    one sweep in C++: both mixes and the softmax of a query's scores for all heads, in place. Where
    the processor multiplies bf16, scores of bf16 inputs are bf16 too, as they are with torch's
    operations; the sweep computes in float32.
    """
    backends.record(NAME, "cpu")
    batch, heads, tokens, dim = query.shape
    mixes = (pre_weight, post_weight, post_bias)
    pre, post, bias = (x.to(torch.float32).contiguous() for x in mixes)
    pre = pre * scale
    is_bf16 = query.dtype == torch.bfloat16 and multiplies_bf16(query.device)
    stored = torch.bfloat16 if is_bf16 else torch.float32
    out = query.new_empty(batch, tokens, heads, dim)
    images, queries = _block(batch, tokens, heads * tokens * stored.itemsize)
    scores = out.new_empty(images * heads * queries * tokens, dtype=stored)
    with torch.autocast("cpu", enabled=False):
        for first in range(0, batch, images):
            q, k, v = (
                x[first : first + images].to(stored).reshape(-1, tokens, dim)
                for x in (query, key, value)
            )
            for start in range(0, tokens, queries):
                rows = q[:, start : start + queries]
                shape = (*rows.shape[:2], tokens)
                block = scores[: shape[0] * shape[1] * tokens].view(shape)
                torch.bmm(rows, k.mT, out=block)
                mix_heads(block.view(-1, heads, *shape[1:]), pre, post, bias)
                mixed = torch.bmm(block, v).view(-1, heads, rows.shape[1], dim)
                out[first : first + images, start : start + queries] = mixed.transpose(1, 2)
    return out.transpose(1, 2)


def _block(batch: int, tokens: int, row_bytes: int) -> tuple[int, int]:
    """Images and queries per block: whole images, as even as may be, or some queries of one.

    Args:
        batch, tokens: of the maps.
        row_bytes: bytes of one query's scores for all heads.
    """
    images = _BLOCK_BYTES // (row_bytes * tokens)
    if images > 1:
        return -(-batch // -(-batch // images)), tokens
    return 1, max(1, min(tokens, _BLOCK_BYTES // row_bytes))


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre_weight: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
    scale: float,
) -> Tensor:
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim).transpose(1, 2)


# softmax over the keys of `pre` times the scores, then `post` times that, plus `bias`; in place.
# Scores are contiguous (B, heads, queries, keys), float32 or bfloat16; the (heads, heads) mixes and
# the (heads,) bias contiguous float32. It knows neither gradients nor fake tensors.
torch.library.define(
    "featkd::mix_heads", "(Tensor(a!) scores, Tensor pre, Tensor post, Tensor bias) -> ()"
)
mix_heads = torch.ops.featkd.mix_heads.default
