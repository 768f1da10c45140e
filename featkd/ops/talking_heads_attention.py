"""Op of `functional.talking_heads_attention`: csrc's kernel on a CPU, otherwise plain torch.

The custom op is for teachers and has no backward pass. With gradients, the reference runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featkd.ops import backends, extension, reference, support
from featkd.runtime.environment import has_fast_bf16

NAME = "talking_heads_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK_BYTES = 2**22  # scores per block: they fit the processor's cache


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
    """Computes the output on the chosen backend; `featkd.functional` checks the arguments."""
    parameters = (pre_weight, pre_bias, post_weight, post_bias)
    tensors = (query, key, value, *parameters)
    if support.is_being_exported() or _choose(tensors) == "reference":
        backends.record(NAME, "reference")
        return reference.talking_heads_attention(query, key, value, *parameters, scale=scale)
    # pre_bias does not change the softmax
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
    """Computes O (B, heads, N, d) in the query's dtype, a view of (B, N, heads, d).

    BLAS computes the products, on blocks of scores that stay in the cache. Between them, one pass
    in C++ applies both mixes and the softmax to the scores of a query for all heads, in place. If
    the processor multiplies bf16, scores of bf16 inputs are bf16, as with torch's operators. The
    pass computes in float32.
    """
    backends.record(NAME, "cpu")
    batch, heads, tokens, dim = query.shape
    mixes = (pre_weight, post_weight, post_bias)
    pre, post, bias = (x.to(torch.float32).contiguous() for x in mixes)
    pre = pre * scale
    is_bf16 = query.dtype == torch.bfloat16 and has_fast_bf16(query.device)
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
    """Returns images and queries per block: several whole images, or some queries of one image.

    Args:
        batch, tokens: sizes of the maps.
        row_bytes: bytes of the scores of one query for all heads.
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


# In place: scores = post softmax_keys(pre scores) + bias. Scores are (B, heads, queries, keys),
# float32 or bfloat16; pre and post are (heads, heads) and bias is (heads,), float32. All are
# contiguous. The operator has no gradient and no implementation for fake tensors.
torch.library.define(
    "featkd::mix_heads", "(Tensor(a!) scores, Tensor pre, Tensor post, Tensor bias) -> ()"
)
mix_heads = torch.ops.featkd.mix_heads.default
