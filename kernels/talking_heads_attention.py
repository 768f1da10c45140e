"""talking_heads_attention in Triton: attention whose heads are mixed before and after the softmax.

With heads h of queries Q_h, keys K_h, values V_h, and mixes L (pre) and W (post, bias b):

    S'_g = scale sum_h L_gh Q_h K_h^T,    P_g = softmax(S'_g),
    O_h = sum_g W_hg P_g V_h + b_h sum_k V_h

(the pre-mix's bias is the same for all keys, and the softmax drops it). Both mixes are matrix
products of the heads side by side: with a factor for each channel, that of its head,

    S'_g = (Q scale L_g) K^T                 O = sum_g (P_g V) W_g

so that a program, which owns a block of queries, needs one map of scores at a time, and no map
is written. All heads' scores of a block of queries at once spill: 8 heads of 16 queries and 256
keys take all 255 registers. The price is products of all channels for each head, 8 times those of
plain attention; docs/kernels.md has both forms' counts and modelled times.

For each g the softmax is taken online: P_g V and its sum grow over the keys, and then join O.

Traffic an image: Q, K, V read and O written once, 8 N C bytes in half precision; the sweeps of one
image's programs find K and V in the L2 cache. Source: Shazeer et al., arXiv
2003.02436 [THA20].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from featkd.kernels import rows
from featkd.kernels.configs import products
from featkd.kernels.launch import architecture, launch
from featkd.kernels.shapes import channel_block, matmul_precision, triton_type
from featkd.reference import accumulation_dtype


@triton.jit
def attend(
    query, key, value,  # (B, N, C) any floating dtype, channels adjacent: heads side by side
    pre,  # (H, H) ACC: scale L
    post,  # (H, H) ACC: W
    post_bias,  # (H,) ACC: b
    out,  # (B, N, C) contiguous
    query_image, query_token, key_image, key_token, value_image, value_token, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program a block of queries of an image, and GROUP blocks of O's channels."""
    CHANNELS: tl.constexpr = HEADS * DIM
    image = tl.program_id(1).to(tl.int64)  # an offset in elements may pass 2^31
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < tokens
    token = tl.where(valid, row, 0).to(tl.int64)
    from_query = image * query_image + token * query_token
    key += image * key_image
    value += image * value_image

    block = tl.program_id(2) * GROUP
    sums = _bias_times_all_values(
        value, value_token, post_bias, block, tokens, CHANNELS, DIM, BLOCK, GROUP, ROWS, KEYS, ACC
    )
    for g in range(HEADS):
        mixed = ()
        for j in tl.static_range(tl.cdiv(CHANNELS, BLOCK)):
            factor = _of_channels(pre + g * HEADS, 1, j, CHANNELS, DIM, BLOCK)
            q = rows.load_rows(query, from_query, valid, j, CHANNELS, BLOCK)
            mixed = mixed + ((q.to(ACC) * factor[None, :]).to(COMPUTE),)

        top = tl.full((ROWS,), float("-inf"), ACC)
        total = tl.zeros((ROWS,), ACC)
        parts = rows.zero_blocks(ROWS, GROUP * BLOCK, BLOCK, ACC)
        for first in range(0, tokens, KEYS):
            at = (first + tl.arange(0, KEYS)).to(tl.int64)
            scores = tl.zeros((ROWS, KEYS), ACC)
            for j in tl.static_range(tl.cdiv(CHANNELS, BLOCK)):
                k = rows.load_rows(key, at * key_token, at < tokens, j, CHANNELS, BLOCK)
                scores = tl.dot(
                    mixed[j], tl.trans(k.to(COMPUTE)), scores,
                    input_precision=PRECISION, out_dtype=ACC,
                )  # fmt: skip
            scores = tl.where((at < tokens)[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            shrunk = tl.exp(top - higher)
            p = tl.exp(scores - higher[:, None])
            total = total * shrunk + tl.sum(p, 1)
            top = higher
            grown = ()
            for j in tl.static_range(GROUP):
                v = rows.load_rows(value, at * value_token, at < tokens, block + j, CHANNELS, BLOCK)
                grown = grown + (
                    tl.dot(
                        p.to(COMPUTE), v.to(COMPUTE), parts[j] * shrunk[:, None],
                        input_precision=PRECISION, out_dtype=ACC,
                    ),
                )  # fmt: skip
            parts = grown
        joined = ()
        for j in tl.static_range(GROUP):
            factor = _of_channels(post + g, HEADS, block + j, CHANNELS, DIM, BLOCK)
            joined = joined + (sums[j] + parts[j] / total[:, None] * factor[None, :],)
        sums = joined

    to_out = (image * tokens + token) * CHANNELS
    for j in tl.static_range(GROUP):
        rows.store_rows(out, to_out, valid, sums[j], block + j, CHANNELS, BLOCK)


@triton.jit
def _of_channels(
    base, stride, j, CHANNELS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Channel block j of a vector over heads: each channel has its head's value, (BLOCK,)."""
    channel = j * BLOCK + tl.arange(0, BLOCK)
    return tl.load(base + (channel // DIM) * stride, mask=channel < CHANNELS, other=0.0)


@triton.jit
def _bias_times_all_values(
    value, value_token, post_bias, block, tokens,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """b_h sum_k V_h, the same for every query: a (ROWS, BLOCK) entry of the tuple a block."""
    result = ()
    for i in tl.static_range(GROUP):
        j = block + i
        partial = tl.zeros((KEYS, BLOCK), ACC)
        for first in range(0, tokens, KEYS):
            at = (first + tl.arange(0, KEYS)).to(tl.int64)
            v = rows.load_rows(value, at * value_token, at < tokens, j, CHANNELS, BLOCK)
            partial += v.to(ACC)
        bias = _of_channels(post_bias, 1, j, CHANNELS, DIM, BLOCK)
        of_all = (bias * tl.sum(partial, 0))[None, :]
        result = result + (tl.zeros((ROWS, BLOCK), ACC) + of_all,)
    return result


@dataclass(frozen=True)
class Config:
    """Sizes of a launch.

    Attributes:
        rows: queries of a program.
        keys: of a step.
        block: channels of a block.
        group: most channels of O in a program; each group's programs form the scores again.
    """

    rows: int
    keys: int
    block: int
    group: int
    num_warps: int = 8
    num_stages: int = 2

    def group_blocks(self, channels: int) -> int:
        """Blocks of a group: as many as divide all blocks evenly."""
        blocks = triton.cdiv(channels, self.block)
        most = max(1, self.group // self.block)
        return next(n for n in range(min(most, blocks), 0, -1) if blocks % n == 0)


def config(channels: int, compute: torch.dtype, arch: int) -> Config:
    """What compiles without a spill: O and one head's part of it, (rows, group) in float32 each.

    Beside them the mixed queries, (rows, channels), stay in registers, except on sm_100, where the
    part lies in tensor memory.
    """
    block = channel_block(channels, compute)
    kind = products(arch)
    if compute.itemsize > 2:
        group = 192 if channels <= 192 else 128 if channels <= 384 else 64
        return Config(16, 32, min(block, 32), group, num_stages=1)
    if channels > 384:
        return Config(16, 32, block, group=384)
    if kind == "tcgen05":
        rows, keys = 128 if channels <= 192 else 64, 32 if channels % block == 0 else 16
        return Config(rows, keys, block, group=384, num_stages=1)
    if kind == "wgmma" and channels <= 192:
        return Config(64, 64, block, group=384)
    return Config(32, 32, block, group=384)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre_weight: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
    *,
    scale: float,
    compute: torch.dtype,
) -> Tensor:
    """O as (B, heads, N, d), a view of (B, N, heads, d), in the query's dtype.

    Args:
        query, key, value: (B, heads, N, d); copied where the heads' channels are not side by side.
        pre_weight, post_weight: (heads, heads).
        post_bias: (heads,).
        scale: of the scores.
        compute: the products' operands.
    """
    batch, heads, tokens, dim = query.shape
    acc = accumulation_dtype(compute)
    chosen = config(heads * dim, compute, architecture(query.device))
    blocks, group = triton.cdiv(heads * dim, chosen.block), chosen.group_blocks(heads * dim)
    maps = [side_by_side(x) for x in (query, key, value)]
    out = query.new_empty(batch, tokens, heads * dim)
    names = ("query", "key", "value")
    launch(
        attend,
        (triton.cdiv(tokens, chosen.rows), batch, blocks // group),
        {
            **dict(zip(names, maps, strict=True)),
            "pre": (pre_weight.to(acc) * scale).contiguous(),
            "post": post_weight.to(acc).contiguous(),
            "post_bias": post_bias.to(acc).contiguous(),
            "out": out,
            **{f"{n}_image": x.stride(0) for n, x in zip(names, maps, strict=True)},
            **{f"{n}_token": x.stride(1) for n, x in zip(names, maps, strict=True)},
            "tokens": tokens,
            "HEADS": heads,
            "DIM": dim,
            "BLOCK": chosen.block,
            "GROUP": group,
            "ROWS": chosen.rows,
            "KEYS": chosen.keys,
            "COMPUTE": triton_type(compute),
            "ACC": triton_type(acc),
            "PRECISION": matmul_precision(compute),
        },
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return out.view(batch, tokens, heads, dim).transpose(1, 2)


def side_by_side(x: Tensor) -> Tensor:
    """(B, heads, N, d) as (B, N, heads d), copied where that is no view."""
    batch, heads, tokens, dim = x.shape
    adjacent = (heads == 1 or x.stride(1) == dim) and (dim == 1 or x.stride(3) == 1)
    if not adjacent:
        return x.transpose(1, 2).reshape(batch, tokens, heads * dim)
    return x.as_strided((batch, tokens, heads * dim), (x.stride(0), x.stride(2), 1))
