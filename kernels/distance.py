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
    blocks, student, offsets, valid, weight, weight_stride, bias, eps,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of each row of P, formed block by block."""
    mean = tl.zeros((valid.shape[0],), ACC)
    squares = tl.zeros((valid.shape[0],), ACC)
    for j in range(tl.cdiv(CT, CT_BLOCK)):
        p = projected(
            blocks, student, offsets, valid, weight, weight_stride, bias, j,
            CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
        )  # fmt: skip
        mean, squares = rows.join_moments(mean, squares, p, valid, j, CT, CT_BLOCK, ACC)
    return mean, 1.0 / tl.sqrt(squares / CT + eps)


@triton.jit
def row_sums(
    blocks, student, offsets, teacher, from_teacher, valid, weight, weight_stride, bias,
    gamma, beta, mean, rstd, width,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    HB: tl.constexpr, WB: tl.constexpr, SPECTRAL: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each row, where a norm follows P: sum of E H, mean of g = gamma H, mean of g x_hat."""
    energy = tl.zeros((HB * WB,), ACC)
    sum_g = tl.zeros((HB * WB,), ACC)
    sum_gx = tl.zeros((HB * WB,), ACC)
    for j in range(tl.cdiv(CT, CT_BLOCK)):
        p = projected(
            blocks, student, offsets, valid, weight, weight_stride, bias, j,
            CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
        )  # fmt: skip
        x = (p - mean[:, None]) * rstd[:, None]
        error, half = error_and_half(
            x, teacher, from_teacher, gamma, beta, valid, width, j,
            CT, CT_BLOCK, HB, WB, SPECTRAL, ACC,
        )  # fmt: skip
        energy += tl.sum(error * half, 1)
        g = half * rows.load_channels(gamma, j, CT, CT_BLOCK, ACC)[None, :]
        sum_g += tl.sum(g, 1)
        sum_gx += tl.sum(g * x, 1)
    return energy, sum_g / CT, sum_gx / CT


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
