"""widelast_projection in Triton: r and u from one pass over x; dx and the parameters from two more.

h = x W^T, r = LN_p(h), u = LN_1(r) [EM26, WideLast]. Backward, with g = gamma_1 du and hats for
what a norm has centred and scaled:

    dr_total = dr + rstd_r (g - mean(g) - r_hat mean(g r_hat))
    dh = rstd_h (q - mean(q) - h_hat mean(q h_hat)),  q = gamma_p dr_total;   dx = dh W

mean(q) and mean(q h_hat) are linear in t = dr + rstd_r g and the two means before them: all four
come from one sweep. h is formed again in the backward pass and never in memory. Forward traffic a
row, bf16, 192 -> 384: x read (384 B), r and u (1,536 B) and, for a gradient, statistics (16 B).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from featkd.kernels import distance, rows, two_norms
from featkd.kernels.configs import split_count
from featkd.kernels.launch import architecture, launch
from featkd.kernels.scaled import sum_times
from featkd.kernels.shapes import channels_adjacent
from featkd.kernels.widelast_launch import (
    Parameters,
    forward_config,
    input_config,
    loadable,
    parameter_config,
    shared_arguments,
)
from featkd.reference import accumulation_dtype


@triton.jit
def project_and_normalise(
    x,  # (B, N, Cs) any floating dtype, channels adjacent
    weight,  # (Ct, Cs) contiguous, of the type COMPUTE
    gamma_p, beta_p,  # (Ct,) LN_p's
    gamma_1, beta_1,  # (Ct,) LN_1's
    residual,  # (B N, Ct): r
    normed,  # (B N, Ct): u
    statistics,  # (B N, 4) ACC: mean and rstd of h, mean and rstd of r; or None
    x_image, x_token, tokens, total, eps,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, HOLD: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program a tile of rows. HOLD: h of all channels stays in registers, and W is read once.

    Otherwise h is formed three times, block by block: for its statistics, for r and r's
    statistics, for u. That reads W three times, from L2, and lets a tile have more rows.
    """
    image, token, valid = rows.tile_places(tl.program_id(0) * ROWS, total, 1, tokens, ROWS, 1)
    at = image * x_image + token * x_token
    row = image * tokens + token
    BLOCKS: tl.constexpr = tl.cdiv(CT, CT_BLOCK)
    if HOLD:
        h = two_norms.whole_product(
            x, at, valid, weight, ROWS, CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION
        )
        mean_h, squares = two_norms.whole_moments(h, valid, CT, CT_BLOCK)
        rstd_h = 1.0 / tl.sqrt(squares / CT + eps)
        r = ()
        for j in tl.static_range(BLOCKS):
            block = two_norms.normed(h[j], mean_h, rstd_h, gamma_p, beta_p, j, CT, CT_BLOCK, ACC)
            rows.store_rows(residual, row * CT, valid, block, j, CT, CT_BLOCK)
            r = r + (block,)
        mean_r, squares = two_norms.whole_moments(r, valid, CT, CT_BLOCK)
        rstd_r = 1.0 / tl.sqrt(squares / CT + eps)
        for j in tl.static_range(BLOCKS):
            block = two_norms.normed(r[j], mean_r, rstd_r, gamma_1, beta_1, j, CT, CT_BLOCK, ACC)
            rows.store_rows(normed, row * CT, valid, block, j, CT, CT_BLOCK)
    else:
        mean_h = tl.zeros((ROWS,), ACC)
        squares = tl.zeros((ROWS,), ACC)
        for j in range(BLOCKS):
            block = rows.project_streamed(
                x, at, valid, weight, CS, None, j,
                CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
            )  # fmt: skip
            mean_h, squares = rows.join_moments(mean_h, squares, block, valid, j, CT, CT_BLOCK, ACC)
        rstd_h = 1.0 / tl.sqrt(squares / CT + eps)
        mean_r = tl.zeros((ROWS,), ACC)
        squares = tl.zeros((ROWS,), ACC)
        for j in range(BLOCKS):
            block = rows.project_streamed(
                x, at, valid, weight, CS, None, j,
                CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
            )  # fmt: skip
            block = two_norms.normed(block, mean_h, rstd_h, gamma_p, beta_p, j, CT, CT_BLOCK, ACC)
            rows.store_rows(residual, row * CT, valid, block, j, CT, CT_BLOCK)
            mean_r, squares = rows.join_moments(mean_r, squares, block, valid, j, CT, CT_BLOCK, ACC)
        rstd_r = 1.0 / tl.sqrt(squares / CT + eps)
        for j in range(BLOCKS):
            block = rows.project_streamed(
                x, at, valid, weight, CS, None, j,
                CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
            )  # fmt: skip
            block = two_norms.normed(block, mean_h, rstd_h, gamma_p, beta_p, j, CT, CT_BLOCK, ACC)
            block = two_norms.normed(block, mean_r, rstd_r, gamma_1, beta_1, j, CT, CT_BLOCK, ACC)
            rows.store_rows(normed, row * CT, valid, block, j, CT, CT_BLOCK)
    rows.store_statistics(statistics, row, valid, mean_h, rstd_h, mean_r, rstd_r)


@triton.jit
def input_gradient(
    x, weight, gamma_p, beta_p, gamma_1,
    d_residual,  # (B, N, Ct) any floating dtype, channels adjacent, or None
    d_normed,  # (B, N, Ct) likewise
    statistics,  # (B N, 4) ACC as `project_and_normalise` left them
    means,  # (B N, 4) ACC: rstd_r times the means of LN_1's gradient, LN_p's means; or None
    gradient,  # (B N, Cs): dx, or None
    x_image, x_token, dr_image, dr_token, du_image, du_token, tokens, total,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, HOLD: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program a tile of rows, two sweeps over the channels: the four means, then dx.

    h is formed in both, and dr and du read again, from L2. HOLD: x is not read again but kept as
    an operand.
    """
    image, token, valid = rows.tile_places(tl.program_id(0) * ROWS, total, 1, tokens, ROWS, 1)
    from_x = image * x_image + token * x_token
    from_residual = image * dr_image + token * dr_token
    from_normed = image * du_image + token * du_token
    row = image * tokens + token
    BLOCKS: tl.constexpr = tl.cdiv(CT, CT_BLOCK)
    mean_h, rstd_h, mean_r, rstd_r = rows.load_statistics(statistics, row, valid)
    held = rows.load_student(x, weight, from_x, valid, CS, CS_BLOCK, COMPUTE, HOLD)
    zero = tl.zeros((ROWS,), ACC)
    sum_g, sum_gr, sum_q, sum_qh, sum_r, sum_h, sum_rh = zero, zero, zero, zero, zero, zero, zero
    sum_gamma = tl.sum(tl.zeros((CT_BLOCK,), ACC), 0)
    for j in range(BLOCKS):
        h = distance.projected(
            held, x, from_x, valid, weight, CS, None, j,
            CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
        )  # fmt: skip
        h_hat, r_hat = two_norms.hats(
            h, mean_h, rstd_h, mean_r, rstd_r, gamma_p, beta_p, valid, j, CT, CT_BLOCK, ACC
        )
        _, g, t = two_norms.upstream(
            d_residual, d_normed, from_residual, from_normed, valid, rstd_r, gamma_1, j,
            ROWS, CT, CT_BLOCK, ACC,
        )  # fmt: skip
        gamma = rows.load_channels(gamma_p, j, CT, CT_BLOCK, ACC)
        sum_g += tl.sum(g, 1)
        sum_gr += tl.sum(g * r_hat, 1)
        q = gamma[None, :] * t
        sum_q += tl.sum(q, 1)
        sum_qh += tl.sum(q * h_hat, 1)
        scaled = gamma[None, :] * h_hat
        sum_h += tl.sum(scaled, 1)
        sum_rh += tl.sum(scaled * r_hat, 1)
        sum_r += tl.sum(gamma[None, :] * r_hat, 1)
        sum_gamma += tl.sum(gamma, 0)
    mean_1 = sum_g / CT * rstd_r
    mean_2 = sum_gr / CT * rstd_r
    mean_3 = (sum_q - mean_1 * sum_gamma - mean_2 * sum_r) / CT
    mean_4 = (sum_qh - mean_1 * sum_h - mean_2 * sum_rh) / CT
    rows.store_statistics(means, row, valid, mean_1, mean_2, mean_3, mean_4)

    if gradient is not None:
        sums = rows.zero_blocks(ROWS, CS, CS_BLOCK, ACC)
        for j in range(BLOCKS):
            h = distance.projected(
                held, x, from_x, valid, weight, CS, None, j,
                CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
            )  # fmt: skip
            h_hat, r_hat = two_norms.hats(
                h, mean_h, rstd_h, mean_r, rstd_r, gamma_p, beta_p, valid, j, CT, CT_BLOCK, ACC
            )
            _, _, t = two_norms.upstream(
                d_residual, d_normed, from_residual, from_normed, valid, rstd_r, gamma_1, j,
                ROWS, CT, CT_BLOCK, ACC,
            )  # fmt: skip
            _, dh = two_norms.slopes(
                h_hat, r_hat, t, rstd_h, mean_1, mean_2, mean_3, mean_4, gamma_p, valid, j,
                CT, CT_BLOCK, ACC,
            )  # fmt: skip
            sums = rows.through_weight(
                sums, dh, weight, CS, j, 0,
                CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
            )  # fmt: skip
        for k in tl.static_range(tl.cdiv(CS, CS_BLOCK)):
            rows.store_rows(gradient, row * CS, valid, sums[k], k, CS, CS_BLOCK)


@triton.jit
def parameter_gradients(
    x, weight, gamma_p, beta_p, gamma_1, d_residual, d_normed, statistics, means,
    weight_partial,  # (splits, Ct, Cs) ACC
    vector_partial,  # (splits, 4, Ct) ACC: sums over rows of dr h_hat, dr, du r_hat, du
    x_image, x_token, dr_image, dr_token, du_image, du_token, tokens, total, tiles,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, HOLD: tl.constexpr, GROUPS: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW = dh^T x and the norms' gradients: a program a block of dW and a share of the tiles.

    A block is CT_BLOCK of h's channels by GROUP blocks of x's. With the statistics and means at
    hand, a channel block of dh needs no other block; programs of other groups form it again.
    Programs of the same rows are neighbours in the grid: x, dr and du come from memory once and
    from L2 after that. HOLD: so does W, whose rows stay an operand through all tiles. Sums over
    rows are added up in a fixed order by the caller: no atomics.
    """
    BLOCKS: tl.constexpr = tl.cdiv(CT, CT_BLOCK)
    GROUP: tl.constexpr = tl.cdiv(CS, CS_BLOCK) // GROUPS
    j = tl.program_id(0) % BLOCKS
    group = tl.program_id(0) // BLOCKS
    split = tl.program_id(1)
    sums = rows.zero_blocks(CT_BLOCK, GROUP * CS_BLOCK, CS_BLOCK, ACC)
    weights = ()
    if HOLD:
        weights = two_norms.hold_weight(weight, j, CS, CT, CS_BLOCK, CT_BLOCK)
    zeros = tl.zeros((CT_BLOCK,), ACC)
    sum_gamma_p, sum_beta_p, sum_gamma_1, sum_beta_1 = zeros, zeros, zeros, zeros
    for tile in range(split * tiles, (split + 1) * tiles):
        image, token, valid = rows.tile_places(tile * ROWS, total, 1, tokens, ROWS, 1)
        at = image * x_image + token * x_token
        row = image * tokens + token
        mean_h, rstd_h, mean_r, rstd_r = rows.load_statistics(statistics, row, valid)
        mean_1, mean_2, mean_3, mean_4 = rows.load_statistics(means, row, valid)
        if HOLD:
            h = two_norms.product_with_held(
                weights, x, at, valid, ROWS, CS, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION
            )
        else:
            h = rows.project_streamed(
                x, at, valid, weight, CS, None, j,
                CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
            )  # fmt: skip
        h_hat, r_hat = two_norms.hats(
            h, mean_h, rstd_h, mean_r, rstd_r, gamma_p, beta_p, valid, j, CT, CT_BLOCK, ACC
        )
        du, _, t = two_norms.upstream(
            d_residual, d_normed,
            image * dr_image + token * dr_token, image * du_image + token * du_token,
            valid, rstd_r, gamma_1, j, ROWS, CT, CT_BLOCK, ACC,
        )  # fmt: skip
        sum_gamma_1 += tl.sum(du * r_hat, 0)
        sum_beta_1 += tl.sum(du, 0)
        dr, dh = two_norms.slopes(
            h_hat, r_hat, t, rstd_h, mean_1, mean_2, mean_3, mean_4, gamma_p, valid, j,
            CT, CT_BLOCK, ACC,
        )  # fmt: skip
        sum_gamma_p += tl.sum(dr * h_hat, 0)
        sum_beta_p += tl.sum(dr, 0)
        sums = rows.add_outer(
            sums, dh, x, at, valid, group * GROUP, CS, CS_BLOCK, COMPUTE, ACC, PRECISION
        )
    rows.store_weight_partial(
        weight_partial, split, j, sums, group * GROUP, CT, CS, CT_BLOCK, CS_BLOCK
    )
    if group == 0:
        channel = j * CT_BLOCK + tl.arange(0, CT_BLOCK)
        place = vector_partial + split * (4 * CT) + channel
        tl.store(place, sum_gamma_p, mask=channel < CT)
        tl.store(place + CT, sum_beta_p, mask=channel < CT)
        tl.store(place + 2 * CT, sum_gamma_1, mask=channel < CT)
        tl.store(place + 3 * CT, sum_beta_1, mask=channel < CT)


def forward(
    x: Tensor,
    parameters: Parameters,
    *,
    eps: float,
    compute: torch.dtype,
    residual_dtype: torch.dtype,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """r, u and the row statistics.

    Args:
        x: (B, N, Cs), not empty; copied where its channels are not adjacent.
        parameters: of any floating dtype.
        eps: epsilon of both norms.
        compute: type of the product's operands, and of u.
        residual_dtype: type of r.
        need_gradient: keep the (B N, 4) statistics that `backward` needs.

    Returns:
        r and u (B, N, Ct), and the statistics, None where not needed.
    """
    x, parameters = loadable(x, parameters, compute)
    batch, tokens, channels = x.shape
    width, kind = parameters.weight.shape[0], accumulation_dtype(compute)
    config = forward_config(channels, width, compute, architecture(x.device))
    residual = x.new_empty(batch, tokens, width, dtype=residual_dtype)
    normed = x.new_empty(batch, tokens, width, dtype=compute)
    statistics = x.new_empty(batch * tokens, 4, dtype=kind) if need_gradient else None
    launch(
        project_and_normalise,
        (triton.cdiv(batch * tokens, config.rows),),
        {
            **shared_arguments(x, parameters, compute, config),
            "beta_1": parameters.beta_1,
            "residual": residual,
            "normed": normed,
            "statistics": statistics,
            "eps": eps,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return residual, normed, statistics


def backward(
    x: Tensor,
    parameters: Parameters,
    d_residual: Tensor | None,
    d_normed: Tensor | None,
    statistics: Tensor,
    *,
    compute: torch.dtype,
    need_input: bool,
    need_parameters: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients.

    Args:
        x, parameters, compute: as in `forward`.
        d_residual, d_normed: (B, N, Ct), copied where channels are not adjacent (an expanded
            scalar); None where that output was not used.
        statistics: as `forward` left them.
        need_input, need_parameters: which gradients to form.

    Returns:
        dx (B, N, Cs), None where not needed; the parameters' gradients, none of them where not
        needed; each in the dtype of what it is the gradient of.
    """
    dtypes = [p.dtype for p in parameters]
    x, parameters = loadable(x, parameters, compute)
    batch, tokens, channels = x.shape
    width, kind = parameters.weight.shape[0], accumulation_dtype(compute)
    arch = architecture(x.device)
    upstream: dict[str, Any] = {}
    for name, short, grad in (("d_residual", "dr", d_residual), ("d_normed", "du", d_normed)):
        adjacent = None if grad is None else channels_adjacent(grad)
        image, token = (0, 0) if adjacent is None else adjacent.stride()[:2]
        upstream |= {name: adjacent, f"{short}_image": image, f"{short}_token": token}
    means = x.new_empty(batch * tokens, 4, dtype=kind) if need_parameters else None
    d_input = x.new_empty(x.shape) if need_input else None
    config = input_config(channels, width, compute, arch)
    launch(
        input_gradient,
        (triton.cdiv(batch * tokens, config.rows),),
        {
            **shared_arguments(x, parameters, compute, config),
            **upstream,
            "statistics": statistics,
            "means": means,
            "gradient": d_input,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if means is None:
        return d_input, []
    config = parameter_config(channels, width, compute, arch)
    tiles = triton.cdiv(batch * tokens, config.rows)
    per_split = triton.cdiv(tiles, split_count(batch * tokens))
    splits = triton.cdiv(tiles, per_split)
    weight_partial = x.new_empty(splits, width, channels, dtype=kind)
    vector_partial = x.new_empty(splits, 4, width, dtype=kind)
    groups = config.groups(channels)
    launch(
        parameter_gradients,
        (triton.cdiv(width, config.teacher_block) * groups, splits),
        {
            **shared_arguments(x, parameters, compute, config),
            **upstream,
            "statistics": statistics,
            "means": means,
            "weight_partial": weight_partial,
            "vector_partial": vector_partial,
            "tiles": per_split,
            "GROUPS": groups,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    sums = (weight_partial, *vector_partial.unbind(1))
    return d_input, [sum_times(x, None, kind) for x, kind in zip(sums, dtypes, strict=True)]
