"""Device functions on tiles of rows: addressing, masked loads and stores, LayerNorm's moments.

A tile holds HB image rows of WB tokens each. WB is the width of the patch grid, rounded up to a
power of two, so that one program sees whole image rows. If image rows don't matter, WB is 1 and
each token is a row of its own. A block of channels is a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def tile_rows(tile, height, width, HB: tl.constexpr, WB: tl.constexpr):
    """Index in the image of each token of a tile, and a mask of the tokens that exist."""
    index = tl.arange(0, HB * WB)
    row = tile * HB + index // WB
    column = index % WB
    valid = (row < height) & (column < width)
    token = tl.where(valid, row * width + column, 0)
    return token.to(tl.int64), valid  # 64 bits: offsets in elements may exceed 2^31


@triton.jit
def bounds(valid, block, C: tl.constexpr, BLOCK: tl.constexpr):
    """Mask (rows, BLOCK) of the elements that exist."""
    mask = valid[:, None]
    if C % BLOCK != 0:
        mask = mask & (block * BLOCK + tl.arange(0, BLOCK) < C)[None, :]
    return mask


@triton.jit
def mask_out_of_bounds(values, valid, block, C: tl.constexpr, BLOCK: tl.constexpr):
    """Sets the elements that don't exist to zero."""
    return tl.where(bounds(valid, block, C, BLOCK), values, 0.0)


@triton.jit
def load_rows(
    base, offsets, valid, block,
    C: tl.constexpr, BLOCK: tl.constexpr, OUTSIDE: tl.constexpr = 0.0,
):  # fmt: skip
    """Loads a channel block of each row, (rows, BLOCK); `OUTSIDE` past the edges."""
    at = base + offsets[:, None] + (block * BLOCK + tl.arange(0, BLOCK))[None, :]
    return tl.load(at, mask=bounds(valid, block, C, BLOCK), other=OUTSIDE)


@triton.jit
def store_rows(base, offsets, valid, values, block, C: tl.constexpr, BLOCK: tl.constexpr):
    """Stores a channel block of each row in the dtype that `base` points to."""
    at = base + offsets[:, None] + (block * BLOCK + tl.arange(0, BLOCK))[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=bounds(valid, block, C, BLOCK))


@triton.jit
def load_channels(
    base, block, OTHERWISE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """Loads a block (1, BLOCK) of a vector over channels; `OTHERWISE` if `base` is None."""
    if base is None:
        values = tl.full((BLOCK,), OTHERWISE, ACC)
    else:
        channel = block * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(base + channel, mask=channel < C, other=0.0).to(ACC)
    return values[None, :]


@triton.jit
def moments(values, valid, EPS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and 1 / standard deviation of each row, (rows, 1), if one block holds the row."""
    mean = tl.sum(values, 1)[:, None] / C
    centred = mask_out_of_bounds(values - mean, valid, 0, C, BLOCK)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 1)[:, None] / C + EPS)


@triton.jit
def swept_moments(
    base, offsets, valid, EPS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """`moments` of rows of several blocks, merged by the rule of Chan, Golub and LeVeque.

    A sum of squares would cancel where the mean is large.
    """
    mean = tl.zeros((offsets.shape[0], 1), ACC)
    squares = tl.zeros((offsets.shape[0], 1), ACC)
    for j in range((C + BLOCK - 1) // BLOCK):
        count = tl.minimum(C - j * BLOCK, BLOCK).to(ACC)
        share = count / (j * BLOCK + count)
        values = load_rows(base, offsets, valid, j, C, BLOCK).to(ACC)
        shift = tl.sum(values, 1)[:, None] / count - mean
        centred = mask_out_of_bounds(values - (mean + shift), valid, j, C, BLOCK)
        squares += tl.sum(centred * centred, 1)[:, None]
        squares += shift * shift * (count * (1 - share))
        mean += shift * share
    return mean, 1.0 / tl.sqrt(squares / C + EPS)
