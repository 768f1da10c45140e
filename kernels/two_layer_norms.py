"""WideLast's two LayerNorms in Triton: one row kernel forward, one backward.

With h the output rows of a linear layer ([EM26], WideLast):

    h_hat = (h - mean) rstd           r = gamma_p h_hat + beta_p
    r_hat = (r - mean_r) rstd_r       u = gamma_1 r_hat + beta_1

The backward pass, with dr and du the gradients of the outputs, computes g = gamma_1 du,
r' = dr + rstd_r (g - mean(g) - r_hat mean(g r_hat)), k = gamma_p r' and
dh = rstd (k - mean(k) - h_hat mean(k h_hat)). The gradient of each gamma is the sum of its output's
gradient times the normalised rows; the gradient of each beta is the sum of its output's gradient.

Memory traffic: the forward pass reads h and writes r and u; the backward pass reads h, dr and du
and writes dh. A program holds whole rows, so the backward pass computes both moments again, and
nothing but h is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from featkd.kernels import rows
from featkd.kernels.launch import channels_adjacent, launch, processors, triton_type
from featkd.kernels.reduce import norm_gradients
from featkd.runtime.dtypes import accumulation_dtype, widest_dtype

_THREADS = 512  # of the backward kernel on a multiprocessor at once


@triton.jit(do_not_specialize=["row_count"])
def two_norms_forward(
    h,  # (M, C) any floating dtype, rows contiguous
    gamma_p, beta_p, gamma_1, beta_1,  # (C,) any floating dtype
    residual,  # (M, C) any floating dtype: r
    normed,  # (M, C) any floating dtype: u
    row_count,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < row_count
    offsets = row.to(tl.int64) * C
    _, _, r, _, r_hat = _normalised(h, offsets, valid, gamma_p, beta_p, C, BLOCK, EPS, ACC)
    u = r_hat * rows.load_channels(gamma_1, 0, 1.0, C, BLOCK, ACC)
    u += rows.load_channels(beta_1, 0, 0.0, C, BLOCK, ACC)
    rows.store_rows(residual, offsets, valid, r, 0, C, BLOCK)
    rows.store_rows(normed, offsets, valid, u, 0, C, BLOCK)


@triton.jit(do_not_specialize=["row_count"])
def two_norms_backward(
    h,  # (M, C) any floating dtype, rows contiguous
    gamma_p, beta_p, gamma_1, beta_1,  # (C,) any floating dtype
    d_residual,  # (B, N, C) any floating dtype, or None
    d_normed,  # (B, N, C) any floating dtype, or None
    d_h,  # (M, C) h's dtype
    norm_partial,  # (programs, 4, C) ACC: sums for gamma_p, beta_p, gamma_1, beta_1; or None
    residual_image, residual_token, normed_image, normed_token,  # strides
    row_count, tokens,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    d_gamma_p = tl.zeros((ROWS, BLOCK), ACC)
    d_beta_p = tl.zeros((ROWS, BLOCK), ACC)
    d_gamma_1 = tl.zeros((ROWS, BLOCK), ACC)
    d_beta_1 = tl.zeros((ROWS, BLOCK), ACC)
    for tile in range(tl.program_id(0), (row_count + ROWS - 1) // ROWS, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        valid = row < row_count
        offsets = row.to(tl.int64) * C
        image = (row // tokens).to(tl.int64)
        token = (row % tokens).to(tl.int64)
        h_hat, rstd, _, rstd_r, r_hat = _normalised(
            h, offsets, valid, gamma_p, beta_p, C, BLOCK, EPS, ACC
        )  # fmt: skip
        dr = tl.zeros((ROWS, BLOCK), ACC)
        if d_normed is not None:
            at = image * normed_image + token * normed_token
            du = rows.load_rows(d_normed, at, valid, 0, C, BLOCK).to(ACC)
            g = du * rows.load_channels(gamma_1, 0, 1.0, C, BLOCK, ACC)
            mean_g = tl.sum(g, 1)[:, None] / C
            mean_gx = tl.sum(g * r_hat, 1)[:, None] / C
            dr = rstd_r * (g - mean_g - r_hat * mean_gx)
            if norm_partial is not None:
                d_gamma_1 += du * r_hat
                d_beta_1 += du
        if d_residual is not None:
            at = image * residual_image + token * residual_token
            dr += rows.load_rows(d_residual, at, valid, 0, C, BLOCK).to(ACC)
        dr = rows.mask_out_of_bounds(dr, valid, 0, C, BLOCK)
        k = dr * rows.load_channels(gamma_p, 0, 1.0, C, BLOCK, ACC)
        mean_k = tl.sum(k, 1)[:, None] / C
        mean_kx = tl.sum(k * h_hat, 1)[:, None] / C
        dh = rstd * (k - mean_k - h_hat * mean_kx)
        rows.store_rows(d_h, offsets, valid, dh, 0, C, BLOCK)
        if norm_partial is not None:
            d_gamma_p += dr * h_hat
            d_beta_p += dr
    if norm_partial is not None:
        channel = tl.arange(0, BLOCK)
        at = norm_partial + tl.program_id(0).to(tl.int64) * 4 * C + channel
        tl.store(at, tl.sum(d_gamma_p, 0), mask=channel < C)
        tl.store(at + C, tl.sum(d_beta_p, 0), mask=channel < C)
        tl.store(at + 2 * C, tl.sum(d_gamma_1, 0), mask=channel < C)
        tl.store(at + 3 * C, tl.sum(d_beta_1, 0), mask=channel < C)


@triton.jit
def _normalised(
    h, offsets, valid, gamma_p, beta_p,
    C: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """h_hat, rstd, r, rstd_r, r_hat of whole rows; h_hat and r_hat are zero out of bounds."""
    values = rows.load_rows(h, offsets, valid, 0, C, BLOCK).to(ACC)
    mean, rstd = rows.moments(values, valid, EPS, C, BLOCK)
    h_hat = rows.mask_out_of_bounds((values - mean) * rstd, valid, 0, C, BLOCK)
    r = h_hat * rows.load_channels(gamma_p, 0, 1.0, C, BLOCK, ACC)
    r += rows.load_channels(beta_p, 0, 0.0, C, BLOCK, ACC)
    mean_r, rstd_r = rows.moments(r, valid, EPS, C, BLOCK)
    r_hat = rows.mask_out_of_bounds((r - mean_r) * rstd_r, valid, 0, C, BLOCK)
    return h_hat, rstd, r, rstd_r, r_hat


@dataclass(frozen=True)
class Config:
    """Launch sizes: rows per tile, padded channels, warps."""

    rows: int
    block: int
    num_warps: int


@lru_cache(maxsize=64)
def config(channels: int, itemsize: int) -> Config:
    """Returns tiles of about 1,024 elements, 8 per thread: one 16-byte load of each bf16 map.

    The sums for four parameters in the backward pass take as many registers as four tiles.

    Args:
        itemsize: bytes of an accumulator; float64 halves the tiles.
    """
    block = triton.next_power_of_2(channels)
    count = max(1, min(16, 4096 // itemsize // block))
    return Config(count, block, max(4, min(16, block * itemsize // 1024)))


def _named(*parameters: Tensor) -> dict[str, Tensor]:
    names = ("gamma_p", "beta_p", "gamma_1", "beta_1")
    return {n: channels_adjacent(p) for n, p in zip(names, parameters, strict=True)}


def forward(
    h: Tensor,
    gamma_p: Tensor,
    beta_p: Tensor,
    gamma_1: Tensor,
    beta_1: Tensor,
    eps: float,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns the residual stream r in `residual_dtype` and its norm u in h's dtype.

    Tensors that are not contiguous are copied.

    Args:
        h: (B, N, C).
        gamma_p, beta_p, gamma_1, beta_1: (C,) each.
        eps: epsilon of both norms.
    """
    h = h.contiguous()
    channels = h.shape[2]
    acc = accumulation_dtype(h.dtype)
    chosen = config(channels, acc.itemsize)
    residual, normed = torch.empty_like(h, dtype=residual_dtype), torch.empty_like(h)
    count = h.shape[0] * h.shape[1]
    if count and channels:
        launch(
            two_norms_forward,
            (-(-count // chosen.rows),),
            {
                "h": h,
                **_named(gamma_p, beta_p, gamma_1, beta_1),
                "residual": residual,
                "normed": normed,
                "row_count": count,
                "C": channels,
                "BLOCK": chosen.block,
                "ROWS": chosen.rows,
                "EPS": eps,
                "ACC": triton_type(acc),
            },
            num_warps=chosen.num_warps,
        )
    return residual, normed


def backward(
    d_residual: Tensor | None,
    d_normed: Tensor | None,
    h: Tensor,
    gamma_p: Tensor,
    beta_p: Tensor,
    gamma_1: Tensor,
    beta_1: Tensor,
    eps: float,
    need_norms: bool,
) -> tuple[Tensor, Tensor]:
    """Returns gradients of h and of the four parameters, (4, C); (0, C) without `need_norms`.

    Args:
        d_residual, d_normed: (B, N, C), any floating dtype and strides; None for no gradient.
        others: as for `forward`.
    """
    h = h.contiguous()
    images, tokens, channels = h.shape
    dtype = widest_dtype(gamma_p, beta_p, gamma_1, beta_1)
    if not h.numel():
        return torch.empty_like(h), h.new_zeros(4 if need_norms else 0, channels, dtype=dtype)
    d_residual = None if d_residual is None else channels_adjacent(d_residual)
    d_normed = None if d_normed is None else channels_adjacent(d_normed)
    acc = accumulation_dtype(h.dtype)
    chosen = config(channels, acc.itemsize)
    count = images * tokens
    # as many as fit at once, with eight tiles or more each: partial sums are traffic, too
    tiles = -(-count // chosen.rows)
    most = max(1, _THREADS // (32 * chosen.num_warps)) * processors(h.device)
    programs = min(tiles, max(processors(h.device), min(most, tiles // 8)))
    d_h = torch.empty_like(h)
    partial = h.new_empty(programs, 4, channels, dtype=acc) if need_norms else None
    launch(
        two_norms_backward,
        (programs,),
        {
            "h": h,
            **_named(gamma_p, beta_p, gamma_1, beta_1),
            "d_residual": d_residual,
            "d_normed": d_normed,
            "d_h": d_h,
            "norm_partial": partial,
            "residual_image": 0 if d_residual is None else d_residual.stride(0),
            "residual_token": 0 if d_residual is None else d_residual.stride(1),
            "normed_image": 0 if d_normed is None else d_normed.stride(0),
            "normed_token": 0 if d_normed is None else d_normed.stride(1),
            "row_count": count,
            "tokens": tokens,
            "C": channels,
            "BLOCK": chosen.block,
            "ROWS": chosen.rows,
            "EPS": eps,
            "ACC": triton_type(acc),
        },
        num_warps=chosen.num_warps,
        threads=_THREADS,
    )
    if partial is None:
        return d_h, h.new_empty(0, channels, dtype=dtype)
    return d_h, norm_gradients(partial, dtype)
