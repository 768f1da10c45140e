"""Tile by tile: the projected map, its distance from the teacher's, and the way back through both.

Pieces of the kernels whose loss is scale * sum(E H), with E = LN(S W^T + b) - T; see
`projected_feature_kd.py` for the equations.
"""

import triton
import triton.language as tl

from featkd.kernels import rows


@triton.jit
def projected(
    blocks, student, offsets, valid, weight, weight_stride, bias, j,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Channel block j of P, (rows, CT_BLOCK): without a weight the student's own channels.

    `blocks` are the student's (`rows.load_student`), or empty to load them here.
    """
    if weight is None:
        result = rows.load_rows(student, offsets, valid, j, CT, CT_BLOCK).to(ACC)
    elif len(blocks) == 0:
        result = rows.project_streamed(
            student, offsets, valid, weight, weight_stride, bias, j,
            CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
        )  # fmt: skip
    else:
        result = rows.project(
            blocks, weight, weight_stride, bias, j,
            CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
        )  # fmt: skip
    return result


@triton.jit
def row_statistics(
    student, offsets, valid, weight, weight_stride, eps,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of each row of P = S W^T, block by block, P streamed."""
    mean = tl.zeros((valid.shape[0],), ACC)
    squares = tl.zeros((valid.shape[0],), ACC)
    for j in range(tl.cdiv(CT, CT_BLOCK)):
        p = rows.project_streamed(
            student, offsets, valid, weight, weight_stride, None, j,
            CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
        )  # fmt: skip
        # join the block's mean and squared deviations to those of the blocks before it
        # (Chan, Golub and LeVeque): sums of squares alone would cancel
        count = tl.minimum(CT - j * CT_BLOCK, CT_BLOCK).to(ACC)
        share = count / (j * CT_BLOCK + count)
        shift = tl.sum(p, 1) / count - mean
        centred = rows.inside(p - (mean + shift)[:, None], valid, j, CT, CT_BLOCK)
        squares += tl.sum(centred * centred, 1) + shift * shift * (count * (1 - share))
        mean += shift * share
    return mean, 1.0 / tl.sqrt(squares / CT + eps)


@triton.jit
def error_and_half(
    normed, teacher, offsets, gamma, beta, valid, width, j,
    CT: tl.constexpr, CT_BLOCK: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr,
    SPECTRAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """E and H of channel block j from x_hat (from P, where there is no norm); zero outside."""
    output = normed
    if gamma is not None:
        output *= rows.load_channels(gamma, j, CT, CT_BLOCK, ACC)[None, :]
    if beta is not None:
        output += rows.load_channels(beta, j, CT, CT_BLOCK, ACC)[None, :]
    target = rows.load_rows(teacher, offsets, valid, j, CT, CT_BLOCK).to(ACC)
    error = rows.inside(output - target, valid, j, CT, CT_BLOCK)
    half = error
    if SPECTRAL:
        half = rows.with_row_sums(error, width, HB, WB, CT_BLOCK, ACC)
    return error, half


@triton.jit
def slope(
    half, normed, gamma, rstd, mean_g, mean_gx, j,
    CT: tl.constexpr, CT_BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dP = rstd (g - mean(g) - x_hat mean(g x_hat)), g = gamma H; without a norm dP = H."""
    result = half
    if gamma is not None:
        g = half * rows.load_channels(gamma, j, CT, CT_BLOCK, ACC)[None, :]
        result = rstd[:, None] * (g - mean_g[:, None] - normed * mean_gx[:, None])
    return result


@triton.jit
def through_weight(
    sums, slope, weight, weight_stride, valid, j,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, first=0,
):  # fmt: skip
    """dS + dP W over channel block j of dP: an entry of the tuple a block of dS, from `first`."""
    operand = rows.inside(slope, valid, j, CT, CT_BLOCK).to(COMPUTE)
    result = ()
    for k in tl.static_range(len(sums)):
        w = rows.load_weight(weight, weight_stride, j, first + k, CT, CS, CT_BLOCK, CS_BLOCK)
        w = w.to(COMPUTE)
        result = result + (
            tl.dot(operand, w, sums[k], input_precision=PRECISION, out_dtype=ACC),
        )  # fmt: skip
    return result
