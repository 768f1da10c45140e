"""Distance of a feature map from a teacher's, in Triton: one row kernel forward, one backward.

With P the map (a linear layer's output, or the student's own), LN a LayerNorm or nothing:

    x_hat = (P - mean) rstd        Y = gamma x_hat + beta        E = Y - T
    loss  = scale sum(E H)         pooled = mean of Y over each image's tokens
    H = E for the mse; for the spectral metric
    H = E + (1/W) sum_w E [+ (-1)^w (1/W) sum_w (-1)^w E if W is even]

and backward, with u and v the gradients of loss and pooled, dY = 2 scale u H + v / N,
g = gamma dY, dP = rstd (g - mean(g) - x_hat mean(g x_hat)), dgamma = sum(dY x_hat),
dbeta = sum(dY) ([EM26], feature losses; docs/method.md).

Bytes per element: forward reads P and T, backward reads them again and writes dP. Forward also
keeps four numbers per row, so that backward needs no sum over channels. Rows that take several
blocks of channels are read again from the L1 or L2 cache.

As many programs as fit the GPU at once take turns with the tiles of all images; with a pooled map
a program's tiles lie in one image. Their number is fixed by the shapes and the GPU, so results
repeat bitwise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from featkd.kernels import rows
from featkd.kernels.distance_sizes import config, grid
from featkd.kernels.launch import channels_adjacent, launch, processors, triton_type
from featkd.kernels.reduce import add_up, norm_gradients
from featkd.reference import accumulation_dtype, widest_dtype

MOST_COLUMNS = 128
"""Widest patch grid of the spectral metric: a tile holds whole image rows."""


@triton.jit(do_not_specialize=["images", "loss_divisor"])
def distance_forward(
    feature,  # (B, N, C) any floating dtype: P
    teacher,  # (B, N, C) any floating dtype, or None: no loss
    gamma, beta,  # (C,) any floating dtype, or None
    loss_partial,  # (programs,) ACC, or None
    pooled_partial,  # (B, programs per image, C) ACC: sums of x_hat (P without a norm), or None
    statistics,  # (4, B, N) ACC: mean, rstd, mean of gamma H, mean of gamma H x_hat, or None
    feature_image, feature_token, teacher_image, teacher_token,  # strides
    images, height, width, loss_divisor,  # loss = sum(E H) / loss_divisor
    C: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr,
    NORM: tl.constexpr, SPECTRAL: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    tiles = (height + HB - 1) // HB
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    first, last, step = tl.program_id(0), images * tiles, tl.num_programs(0)
    if pooled_partial is not None:
        last = (tl.program_id(0) + 1) * tiles
        first, step = tl.program_id(0) * tiles + tl.program_id(1), tl.num_programs(1)
    energy = tl.zeros((HB * WB,), ACC)
    pooled = tl.zeros((SUMS, BLOCK), ACC)
    for task in range(first, last, step):
        image = tl.cast(task // tiles, tl.int64)
        token, valid = rows.tile_rows(task % tiles, height, width, HB, WB)
        from_feature = feature + image * feature_image
        offsets = token * feature_token
        mean = tl.zeros((HB * WB, 1), ACC)
        rstd = mean + 1.0
        if BLOCKS == 1:
            p = rows.load_rows(from_feature, offsets, valid, 0, C, BLOCK).to(ACC)
        if teacher is not None:
            from_teacher = teacher + image * teacher_image
            # With a norm, T is loaded a block before its use: it arrives while the moments are
            # computed. Of several float32 blocks a second one would spill.
            AHEAD: tl.constexpr = NORM and (
                BLOCKS == 1 or teacher.dtype.element_ty.primitive_bitwidth <= 16
            )
            if AHEAD:
                coming = rows.load_rows(from_teacher, token * teacher_token, valid, 0, C, BLOCK)
        if NORM:
            if BLOCKS == 1:
                mean, rstd = rows.moments(p, valid, EPS, C, BLOCK)
            else:
                mean, rstd = rows.swept_moments(
                    from_feature, offsets, valid, EPS, C, BLOCK, ACC
                )  # fmt: skip
        sum_g = tl.zeros((HB * WB,), ACC)
        sum_gx = tl.zeros((HB * WB,), ACC)
        for j in range(BLOCKS):
            if BLOCKS > 1:
                p = rows.load_rows(from_feature, offsets, valid, j, C, BLOCK).to(ACC)
            x_hat = rows.mask_out_of_bounds((p - mean) * rstd, valid, j, C, BLOCK)
            if pooled_partial is not None:
                pooled = _add(pooled, x_hat, j, BLOCKS, SUMS)
            if teacher is not None:
                if AHEAD:
                    target = coming
                    if BLOCKS > 1:
                        more = valid & (j + 1 < BLOCKS)
                        coming = rows.load_rows(
                            from_teacher, token * teacher_token, more, j + 1, C, BLOCK
                        )  # fmt: skip
                else:
                    target = rows.load_rows(from_teacher, token * teacher_token, valid, j, C, BLOCK)
                error, grad_error = _error(
                    x_hat, target, gamma, beta, valid, width, j, C, BLOCK, HB, WB, SPECTRAL, ACC
                )  # fmt: skip
                energy += tl.sum(error * grad_error, 1)
                if statistics is not None:
                    g = grad_error * rows.load_channels(gamma, j, 1.0, C, BLOCK, ACC)
                    sum_g += tl.sum(g, 1)
                    sum_gx += tl.sum(g * x_hat, 1)
        if statistics is not None:
            tokens = height * width
            at = statistics + image * tokens + token
            plane = images.to(tl.int64) * tokens
            tl.store(at, tl.reshape(mean, (HB * WB,)), mask=valid)
            tl.store(at + plane, tl.reshape(rstd, (HB * WB,)), mask=valid)
            if teacher is not None:
                tl.store(at + 2 * plane, sum_g / C, mask=valid)
                tl.store(at + 3 * plane, sum_gx / C, mask=valid)
    if pooled_partial is not None:
        _store_sums(pooled_partial, program.to(tl.int64), pooled, BLOCKS, SUMS, C, BLOCK)
    if loss_partial is not None:
        tl.store(loss_partial + program, tl.sum(energy, 0) / loss_divisor.to(ACC))


@triton.jit(do_not_specialize=["images", "loss_divisor"], do_not_specialize_on_alignment=["d_loss"])
def distance_backward(
    feature,  # (B, N, C) any floating dtype: P
    teacher,  # (B, N, C) any floating dtype, or None: pooled alone
    gamma, beta,  # (C,) any floating dtype, or None
    statistics,  # (4, B, N) ACC, from `distance_forward`; None without a norm
    d_loss,  # one number, any floating dtype, or None
    d_pooled,  # (B, C) any floating dtype, or None
    d_feature,  # (B, N, C) feature's dtype, contiguous
    norm_partial,  # (programs, 1 or 2, C) ACC: sums of dY x_hat, and of dY, or None
    feature_image, feature_token, teacher_image, teacher_token, pooled_image,  # strides
    images, height, width, loss_divisor,
    C: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr,
    NORM: tl.constexpr, SPECTRAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    tiles = (height + HB - 1) // HB
    tokens = height * width
    plane = images.to(tl.int64) * tokens
    if d_loss is not None:
        upstream = 2.0 * tl.load(d_loss).to(ACC) / loss_divisor.to(ACC)
    d_gamma = tl.zeros((SUMS, BLOCK), ACC)
    d_beta = tl.zeros((SUMS, BLOCK), ACC)
    for task in range(tl.program_id(0), images * tiles, tl.num_programs(0)):
        image = tl.cast(task // tiles, tl.int64)
        token, valid = rows.tile_rows(task % tiles, height, width, HB, WB)
        from_feature = feature + image * feature_image
        offsets = token * feature_token
        from_teacher = teacher
        if teacher is not None:
            from_teacher += image * teacher_image
        from_pooled = d_pooled
        if d_pooled is not None:
            from_pooled += image * pooled_image
        mean = tl.zeros((HB * WB, 1), ACC)
        rstd = mean + 1.0
        mean_g = mean
        mean_gx = mean
        if NORM:
            at = statistics + image * tokens + token
            mean = tl.load(at, mask=valid, other=0.0)[:, None]
            rstd = tl.load(at + plane, mask=valid, other=0.0)[:, None]
            if d_loss is not None:
                mean_g = upstream * tl.load(at + 2 * plane, mask=valid, other=0.0)[:, None]
                mean_gx = upstream * tl.load(at + 3 * plane, mask=valid, other=0.0)[:, None]
            if d_pooled is not None:  # the pooled map's share depends on its gradient
                for j in range(BLOCKS):
                    p = rows.load_rows(from_feature, offsets, valid, j, C, BLOCK).to(ACC)
                    g = rows.load_channels(from_pooled, j, 0.0, C, BLOCK, ACC) / tokens
                    g *= rows.load_channels(gamma, j, 1.0, C, BLOCK, ACC)
                    mean_g += tl.sum(g, 1)[:, None] / C
                    mean_gx += tl.sum(g * (p - mean) * rstd, 1)[:, None] / C
        for j in range(BLOCKS):
            p = rows.load_rows(from_feature, offsets, valid, j, C, BLOCK).to(ACC)
            x_hat = rows.mask_out_of_bounds((p - mean) * rstd, valid, j, C, BLOCK)
            d_output = tl.zeros((HB * WB, BLOCK), ACC)
            if d_loss is not None:
                target = rows.load_rows(from_teacher, token * teacher_token, valid, j, C, BLOCK)
                _, grad_error = _error(
                    x_hat, target, gamma, beta, valid, width, j, C, BLOCK, HB, WB, SPECTRAL, ACC
                )  # fmt: skip
                d_output = upstream * grad_error
            if d_pooled is not None:
                share = rows.load_channels(from_pooled, j, 0.0, C, BLOCK, ACC) / tokens
                d_output += tl.where(valid[:, None], share, 0.0)
            if norm_partial is not None:
                d_gamma = _add(d_gamma, d_output * x_hat, j, BLOCKS, SUMS)
                d_beta = _add(d_beta, d_output, j, BLOCKS, SUMS)
            if NORM:
                g = d_output * rows.load_channels(gamma, j, 1.0, C, BLOCK, ACC)
                d_output = rstd * (g - mean_g - x_hat * mean_gx)
            rows.store_rows(
                d_feature + image * tokens * C, token * C, valid, d_output, j, C, BLOCK
            )  # fmt: skip
    if norm_partial is not None:
        program = tl.program_id(0).to(tl.int64)
        if beta is None:
            _store_sums(norm_partial, program, d_gamma, BLOCKS, SUMS, C, BLOCK)
        else:
            _store_sums(norm_partial, 2 * program, d_gamma, BLOCKS, SUMS, C, BLOCK)
            _store_sums(norm_partial, 2 * program + 1, d_beta, BLOCKS, SUMS, C, BLOCK)


@triton.jit
def _error(
    x_hat, target, gamma, beta, valid, width, j,
    C: tl.constexpr, BLOCK: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr,
    SPECTRAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """E and H of a channel block; zero out of bounds."""
    output = x_hat
    if gamma is not None:
        output *= rows.load_channels(gamma, j, 1.0, C, BLOCK, ACC)
    if beta is not None:
        output += rows.load_channels(beta, j, 0.0, C, BLOCK, ACC)
    error = rows.mask_out_of_bounds(output - target.to(ACC), valid, j, C, BLOCK)
    grad_error = error
    if SPECTRAL:
        grad_error = _with_row_sums(error, width, HB, WB, BLOCK, ACC)
    return error, grad_error


@triton.jit
def _with_row_sums(
    error, width, HB: tl.constexpr, WB: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """H of the spectral metric, from an E that is zero out of bounds."""
    grid = tl.reshape(error, (HB, WB, BLOCK))
    column = tl.arange(0, WB)[None, :, None]
    scale = 1.0 / (tl.zeros((1, 1, 1), ACC) + width)  # a width of 1 comes as a constant
    plain = tl.sum(grid, 1, keep_dims=True) * scale
    sign = tl.where(column % 2 == 0, 1.0, -1.0).to(ACC)
    alternating = tl.sum(grid * sign, 1, keep_dims=True) * scale
    alternating = tl.where(width % 2 == 0, alternating, 0.0)
    total = tl.where(column < width, grid + plain + sign * alternating, 0.0)
    return tl.reshape(total, (HB * WB, BLOCK))


@triton.jit
def _add(sums, values, j, BLOCKS: tl.constexpr, SUMS: tl.constexpr):
    """Sums over rows, with the values of channel block j added.

    One block is kept as a whole tile, so that nothing moves between threads before the end. Of
    several, each has a row of `sums`, and a loop over j stays a loop: unrolled, it would spill.
    """
    if BLOCKS == 1:
        result = sums + values
    else:
        here = tl.arange(0, SUMS)[:, None] == j
        result = tl.where(here, sums + tl.sum(values, 0)[None, :], sums)
    return result


@triton.jit
def _store_sums(
    base,
    entry,
    sums,
    BLOCKS: tl.constexpr,
    SUMS: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores the sums over rows as an entry of an (entries, C) tensor."""
    if BLOCKS == 1:
        channel = tl.arange(0, BLOCK)
        tl.store(base + entry * C + channel, tl.sum(sums, 0), mask=channel < C)
    else:
        channel = tl.arange(0, SUMS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(base + entry * C + channel, sums, mask=channel < C)


def _shared(
    feature: Tensor,
    teacher: Tensor | None,
    width: int,
    *,
    pooled: bool,
    per_image: bool,
    sums: bool,
) -> tuple[tuple[int, ...], dict[str, Any], dict[str, int]]:
    """Grid, arguments and options that both launches have in common.

    Args:
        pooled: a mean over each image, or its gradient, takes registers.
        per_image, sums: as of `grid`.
    """
    images, tokens, channels = feature.shape
    columns = width or 1
    acc = accumulation_dtype(feature.dtype)
    height = tokens // columns
    chosen = config(height, columns, channels, acc.itemsize)
    threads = 384 if width and (pooled or channels > 1024) else 512
    resident = max(1, threads // (32 * chosen.num_warps)) * processors(feature.device)
    options = {"num_warps": chosen.num_warps, "threads": threads}
    divisor = images * tokens * channels
    if (
        width
    ):  # mean over the real and imaginary parts of the grad_error spectrum, grad_error of sum(E H)
        divisor = 4 * images * channels * (tokens // width) * (width // 2 + 1)
    arguments = {
        "feature": feature,
        "teacher": teacher,
        "feature_image": feature.stride(0),
        "feature_token": feature.stride(1),
        "teacher_image": 0 if teacher is None else teacher.stride(0),
        "teacher_token": 0 if teacher is None else teacher.stride(1),
        "images": images,
        "height": height,
        "width": columns,
        "loss_divisor": divisor,
        "C": channels,
        "BLOCK": chosen.block,
        "SUMS": chosen.sums(channels),
        "HB": chosen.image_rows,
        "WB": chosen.places,
        "SPECTRAL": width > 0,
        "ACC": triton_type(acc),
    }
    programs = grid(chosen, images, height, columns, resident, per_image=per_image, sums=sums)
    return programs, arguments, options


def forward(
    feature: Tensor,
    teacher: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    eps: float,
    width: int,
    pooled_dtype: torch.dtype | None,
    need_statistics: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Loss, pooled map and statistics; each None if not asked for.

    Args:
        feature: (B, N, C), not empty; like the teacher copied if its channels are not adjacent.
        teacher: (B, N, C), or None for no loss.
        gamma, beta: (C,), or None; no LayerNorm without gamma. Copied likewise.
        eps: LayerNorm's epsilon.
        width: columns of the patch grid for the spectral metric, 0 for the mse.
        pooled_dtype: of the mean of Y over the tokens (B, C); None for no such mean.
        need_statistics: return (4, B, N) numbers for `backward`; only with a LayerNorm.
    """
    feature = channels_adjacent(feature)
    teacher, gamma, beta = (
        None if x is None else channels_adjacent(x) for x in (teacher, gamma, beta)
    )
    pool = pooled_dtype is not None
    programs, shared, options = _shared(
        feature, teacher, width, pooled=pool, per_image=pool, sums=False
    )
    images, tokens, channels = feature.shape
    acc = accumulation_dtype(feature.dtype)
    loss = loss_partial = pooled = pooled_partial = statistics = None
    if teacher is not None:
        loss_partial, loss = (
            feature.new_empty(math.prod(programs), dtype=acc),
            feature.new_empty((), dtype=acc),
        )
    if pool:
        pooled_partial = feature.new_empty(images, programs[1], channels, dtype=acc)
        pooled = feature.new_empty(images, channels, dtype=pooled_dtype)
    if need_statistics:
        statistics = feature.new_empty(4, images, tokens, dtype=acc)
    launch(
        distance_forward,
        programs,
        {
            **shared,
            "gamma": gamma,
            "beta": beta,
            "loss_partial": loss_partial,
            "pooled_partial": pooled_partial,
            "statistics": statistics,
            "NORM": gamma is not None,
            "EPS": eps,
        },
        **options,
    )
    add_up(pooled_partial, pooled, loss_partial, loss, weight=gamma, bias=beta, divisor=tokens)
    return loss, pooled, statistics


def backward(
    feature: Tensor,
    teacher: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    statistics: Tensor | None,
    d_loss: Tensor | None,
    d_pooled: Tensor | None,
    *,
    width: int,
    need_norm: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the feature map, and of gamma and beta, (1 or 2, C), if `need_norm`.

    Args:
        d_loss: (), any floating dtype; None if the loss has no gradient.
        d_pooled: (B, C), any floating dtype; None likewise.
        others: as in `forward`, with the statistics that it returned.
    """
    feature = channels_adjacent(feature)
    teacher, gamma, beta, d_pooled = (
        None if x is None else channels_adjacent(x) for x in (teacher, gamma, beta, d_pooled)
    )
    programs, shared, options = _shared(
        feature,
        teacher,
        width,
        pooled=d_pooled is not None,
        per_image=False,
        sums=need_norm,
    )
    d_feature = torch.empty(feature.shape, dtype=feature.dtype, device=feature.device)
    parameters = [p for p in (gamma, beta) if p is not None and need_norm]
    partial = None
    if parameters:
        size = (programs[0], len(parameters), feature.shape[2])
        partial = feature.new_empty(size, dtype=accumulation_dtype(feature.dtype))
    launch(
        distance_backward,
        programs,
        {
            **shared,
            "gamma": gamma,
            "beta": beta,
            "statistics": statistics,
            "d_loss": d_loss,
            "d_pooled": d_pooled,
            "d_feature": d_feature,
            "norm_partial": partial,
            "pooled_image": 0 if d_pooled is None else d_pooled.stride(0),
            "NORM": gamma is not None,
        },
        **options,
    )
    return d_feature, None if partial is None else norm_gradients(
        partial, widest_dtype(*parameters)
    )
