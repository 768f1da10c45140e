"""`talking_heads_attention` at CaiT's sizes, forward only, as a frozen teacher runs it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from featkd.functional import talking_heads_attention

from .problem import Normal, Problem, Tensors
from .sizes import Sizes


def problems(sizes: Sizes) -> list[Problem]:
    """Returns the op's problems."""
    return [_attention(*size) for size in sizes.heads]


def _attention(batch: int, heads: int, tokens: int, dim: int) -> Problem:
    """Attention between the `qkv` and `proj` layers of timm's block."""
    scale = dim**-0.5

    def tensors(normal: Normal) -> Tensors:
        qkv = normal(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
        return {
            **dict(zip("qkv", qkv.unbind(), strict=True)),
            "pre_weight": normal(heads, heads, scale=heads**-0.5),
            "pre_bias": normal(heads, scale=0.1),
            "post_weight": normal(heads, heads, scale=heads**-0.5),
            "post_bias": normal(heads, scale=0.1),
        }

    def eager(x: Tensors) -> tuple[Tensor, ...]:
        scores = (x["q"] * scale) @ x["k"].transpose(-2, -1)
        mixed = F.linear(scores.permute(0, 2, 3, 1), x["pre_weight"], x["pre_bias"])
        shares = mixed.permute(0, 3, 1, 2).softmax(-1)
        mixed = F.linear(shares.permute(0, 2, 3, 1), x["post_weight"], x["post_bias"])
        out = mixed.permute(0, 3, 1, 2) @ x["v"]
        return (out.transpose(1, 2).reshape(batch, tokens, heads * dim),)

    def ours(x: Tensors) -> tuple[Tensor, ...]:
        out = talking_heads_attention(**x, scale=scale)
        return (out.transpose(1, 2).reshape(batch, tokens, heads * dim),)

    return Problem(
        "talking_heads_attention",
        "cait",
        f"{batch}x{heads}x{tokens}x{dim}",
        differentiable=(),
        # two products per head, and two mixes of all heads
        multiply_adds=2 * batch * tokens * tokens * heads * (dim + heads),
        tensors=tensors,
        eager=eager,
        featkd=ours,
    )
