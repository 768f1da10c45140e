"""Tile by tile: h = x W^T, LN_p of it, LN_1 of that, and the way back through both.

Pieces of `widelast_projection.py`, which has the equations.
"""

import triton
import triton.language as tl

from featkd.kernels import rows


@triton.jit
def hold_weight(
    weight, j,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of W of channel block j as operands: a tuple over blocks of x's channels."""
    blocks = ()
    for k in tl.static_range(tl.cdiv(CS, CS_BLOCK)):
        blocks = blocks + (rows.load_weight(weight, CS, j, k, CT, CS, CT_BLOCK, CS_BLOCK),)
    return blocks


@triton.jit
def product_with_held(
    weights, x, offsets, valid,
    ROWS: tl.constexpr, CS: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The channel block of h that the held rows of W belong to, (ROWS, CT_BLOCK)."""
    total = tl.zeros((ROWS, CT_BLOCK), ACC)
    for k in tl.static_range(tl.cdiv(CS, CS_BLOCK)):
        block = rows.load_rows(x, offsets, valid, k, CS, CS_BLOCK).to(COMPUTE)
        w = tl.trans(weights[k])
        total = tl.dot(block, w, total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def whole_product(
    x, offsets, valid, weight,
    ROWS: tl.constexpr, CS: tl.constexpr, CT: tl.constexpr,
    CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All channel blocks of h, a tuple: x and W come once, a block of x's channels at a time."""
    result = rows.zero_blocks(ROWS, CT, CT_BLOCK, ACC)
    for k in range(tl.cdiv(CS, CS_BLOCK)):
        block = rows.load_rows(x, offsets, valid, k, CS, CS_BLOCK).to(COMPUTE)
        sums = ()
        for j in tl.static_range(tl.cdiv(CT, CT_BLOCK)):
            w = rows.load_weight(weight, CS, j, k, CT, CS, CT_BLOCK, CS_BLOCK)
            total = tl.dot(block, tl.trans(w), result[j], input_precision=PRECISION, out_dtype=ACC)
            sums = sums + (total,)
        result = sums
    return result


@triton.jit
def whole_moments(blocks, valid, CT: tl.constexpr, CT_BLOCK: tl.constexpr):
    """Mean over the channels of a tuple of blocks, and the sum of squared deviations from it."""
    total = blocks[0]
    for j in tl.static_range(1, tl.cdiv(CT, CT_BLOCK)):
        total += blocks[j]
    mean = tl.sum(total, 1) / CT
    squares = tl.zeros_like(blocks[0])
    for j in tl.static_range(tl.cdiv(CT, CT_BLOCK)):
        centred = rows.inside(blocks[j] - mean[:, None], valid, j, CT, CT_BLOCK)
        squares += centred * centred
    return mean, tl.sum(squares, 1)


@triton.jit
def normed(
    values, mean, rstd, gamma, beta, j,
    CT: tl.constexpr, CT_BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Channel block j of a LayerNorm's output; zero past the last channel."""
    scaled = (values - mean[:, None]) * rstd[:, None]
    scaled *= rows.load_channels(gamma, j, CT, CT_BLOCK, ACC)[None, :]
    return scaled + rows.load_channels(beta, j, CT, CT_BLOCK, ACC)[None, :]


@triton.jit
def hats(
    h, mean_h, rstd_h, mean_r, rstd_r, gamma_p, beta_p, valid, j,
    CT: tl.constexpr, CT_BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Channel block j of h and of r, normalised; the first is zero past the last channel."""
    h_hat = rows.inside((h - mean_h[:, None]) * rstd_h[:, None], valid, j, CT, CT_BLOCK)
    shift = rows.load_channels(beta_p, j, CT, CT_BLOCK, ACC)[None, :] - mean_r[:, None]
    gamma = rows.load_channels(gamma_p, j, CT, CT_BLOCK, ACC)[None, :]
    return h_hat, (gamma * h_hat + shift) * rstd_r[:, None]


@triton.jit
def upstream(
    d_residual, d_normed, from_residual, from_normed, valid, rstd_r, gamma_1, j,
    ROWS: tl.constexpr, CT: tl.constexpr, CT_BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Channel block j of du, of g = gamma_1 du, and of dr + rstd_r g; zero outside.

    The last is the gradient of r but for the two means that LN_1 takes off.
    """
    du = tl.zeros((ROWS, CT_BLOCK), ACC)
    g = du
    total = du
    if d_normed is not None:
        du = rows.load_rows(d_normed, from_normed, valid, j, CT, CT_BLOCK).to(ACC)
        g = du * rows.load_channels(gamma_1, j, CT, CT_BLOCK, ACC)[None, :]
        total = rstd_r[:, None] * g
    if d_residual is not None:
        total += rows.load_rows(d_residual, from_residual, valid, j, CT, CT_BLOCK).to(ACC)
    return du, g, total


@triton.jit
def slopes(
    h_hat, r_hat, total, rstd_h, mean_1, mean_2, mean_3, mean_4, gamma_p, valid, j,
    CT: tl.constexpr, CT_BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Channel block j of dLoss/dr through both of r's uses, and of dLoss/dh; zero outside."""
    gamma = rows.load_channels(gamma_p, j, CT, CT_BLOCK, ACC)[None, :]
    dr = total - mean_1[:, None] - r_hat * mean_2[:, None]
    dh = rstd_h[:, None] * (gamma * dr - mean_3[:, None] - h_hat * mean_4[:, None])
    return rows.inside(dr, valid, j, CT, CT_BLOCK), rows.inside(dh, valid, j, CT, CT_BLOCK)
