"""What the kernels that work on rows of tokens share: tiles of rows, projections, row sums.

A tile is HB image rows of WB token places each (WB the width of the patch grid rounded up to a
power of two), so that the spectral metric finds whole image rows in one program. Where no image
rows matter, WB is 1 and a tile is HB tokens. Channels come in blocks of a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def tile_places(first, image_rows, width, tokens, HB: tl.constexpr, WB: tl.constexpr):
    """Of each place of the tile that starts at image row `first`: image, token in it, validity."""
    place = tl.arange(0, HB * WB)
    row = first + place // WB
    column = place % WB
    valid = (row < image_rows) & (column < width)
    token = tl.where(valid, row * width + column, 0)
    # 64 bits: offsets in elements, of an image as of a token in it, may pass 2^31
    return (token // tokens).to(tl.int64), (token % tokens).to(tl.int64), valid


@triton.jit
def load_rows(
    base, offsets, valid, block,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, OUTSIDE: tl.constexpr = 0.0,
):  # fmt: skip
    """Block number `block` of the channels of each row: (rows, BLOCK), `OUTSIDE` past the edges."""
    channel = block * BLOCK + tl.arange(0, BLOCK)
    mask = valid[:, None]
    if CHANNELS % BLOCK != 0:
        mask = mask & (channel < CHANNELS)[None, :]
    return tl.load(base + offsets[:, None] + channel[None, :], mask=mask, other=OUTSIDE)


@triton.jit
def store_rows(base, offsets, valid, values, block, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of `load_rows`, in the type that `base` points to."""
    channel = block * BLOCK + tl.arange(0, BLOCK)
    mask = valid[:, None]
    if CHANNELS % BLOCK != 0:
        mask = mask & (channel < CHANNELS)[None, :]
    tl.store(
        base + offsets[:, None] + channel[None, :], values.to(base.dtype.element_ty), mask=mask
    )


@triton.jit
def load_channels(base, block, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Block number `block` of a vector over channels, (BLOCK,), zero past the end."""
    channel = block * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS % BLOCK == 0:
        values = tl.load(base + channel)
    else:
        values = tl.load(base + channel, mask=channel < CHANNELS, other=0.0)
    return values.to(ACC)


@triton.jit
def load_weight(
    weight, stride, block_out, block_in,
    OUT: tl.constexpr, IN: tl.constexpr, OUT_BLOCK: tl.constexpr, IN_BLOCK: tl.constexpr,
):  # fmt: skip
    """A (OUT_BLOCK, IN_BLOCK) block of a (OUT, IN) weight, zero past its edges."""
    out = block_out * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    inner = block_in * IN_BLOCK + tl.arange(0, IN_BLOCK)
    at = weight + out[:, None] * stride + inner[None, :]
    if OUT % OUT_BLOCK == 0 and IN % IN_BLOCK == 0:
        values = tl.load(at)
    else:
        values = tl.load(at, mask=(out < OUT)[:, None] & (inner < IN)[None, :], other=0.0)
    return values


@triton.jit
def load_student(
    student, weight, offsets, valid,
    CS: tl.constexpr, CS_BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
    HOLD: tl.constexpr = True,
):  # fmt: skip
    """All channel blocks of the rows as operands of products: a tuple.

    Empty without a weight, and where registers cannot hold them (`project_streamed`).
    """
    blocks = ()
    if HOLD and weight is not None:
        for k in tl.static_range(tl.cdiv(CS, CS_BLOCK)):
            blocks = blocks + (load_rows(student, offsets, valid, k, CS, CS_BLOCK).to(COMPUTE),)
    return blocks


@triton.jit
def project(
    blocks, weight, stride, bias, j,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Channel block j of S W^T + b, (rows, CT_BLOCK) in ACC."""
    total = tl.zeros((blocks[0].shape[0], CT_BLOCK), ACC)
    for k in tl.static_range(tl.cdiv(CS, CS_BLOCK)):
        w = load_weight(weight, stride, j, k, CT, CS, CT_BLOCK, CS_BLOCK).to(COMPUTE)
        total = tl.dot(blocks[k], tl.trans(w), total, input_precision=PRECISION, out_dtype=ACC)
    if bias is not None:
        total += load_channels(bias, j, CT, CT_BLOCK, ACC)[None, :]
    return total


@triton.jit
def project_streamed(
    student, offsets, valid, weight, stride, bias, j,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`project` for rows that are not held: loaded again, from the cache, for each block j."""
    total = tl.zeros((valid.shape[0], CT_BLOCK), ACC)
    for k in range(tl.cdiv(CS, CS_BLOCK)):
        block = load_rows(student, offsets, valid, k, CS, CS_BLOCK).to(COMPUTE)
        w = load_weight(weight, stride, j, k, CT, CS, CT_BLOCK, CS_BLOCK).to(COMPUTE)
        total = tl.dot(block, tl.trans(w), total, input_precision=PRECISION, out_dtype=ACC)
    if bias is not None:
        total += load_channels(bias, j, CT, CT_BLOCK, ACC)[None, :]
    return total


@triton.jit
def zero_blocks(ROWS: tl.constexpr, CS: tl.constexpr, CS_BLOCK: tl.constexpr, ACC: tl.constexpr):
    """A tuple of (ROWS, CS_BLOCK) zeros that covers CS channels."""
    blocks = ()
    for _ in tl.static_range(tl.cdiv(CS, CS_BLOCK)):
        blocks = blocks + (tl.zeros((ROWS, CS_BLOCK), ACC),)
    return blocks


@triton.jit
def join_moments(
    mean, squares, values, valid, j,
    CT: tl.constexpr, CT_BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of the channel blocks up to j, from those before j and block j.

    By Chan, Golub and LeVeque: sums of squares alone would cancel.
    """
    count = tl.minimum(CT - j * CT_BLOCK, CT_BLOCK).to(ACC)
    share = count / (j * CT_BLOCK + count)
    shift = tl.sum(values, 1) / count - mean
    centred = inside(values - (mean + shift)[:, None], valid, j, CT, CT_BLOCK)
    squares += tl.sum(centred * centred, 1) + shift * shift * (count * (1 - share))
    return mean + shift * share, squares


@triton.jit
def through_weight(
    sums, slope, weight, stride, j, first,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + slope W, slope being channel block j: an entry of the tuple a block of S's channels,
    from block `first` on. `slope` must be zero outside."""
    operand = slope.to(COMPUTE)
    result = ()
    for k in tl.static_range(len(sums)):
        w = load_weight(weight, stride, j, first + k, CT, CS, CT_BLOCK, CS_BLOCK).to(COMPUTE)
        total = tl.dot(operand, w, sums[k], input_precision=PRECISION, out_dtype=ACC)
        result = result + (total,)
    return result


@triton.jit
def add_outer(
    sums, slope, student, offsets, valid, first,
    CS: tl.constexpr, CS_BLOCK: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + slope^T S: (CT_BLOCK, CS_BLOCK) an entry of the tuple, from block `first` of S on.

    S is loaded once more, from the cache: kept from the projection, whose operand layout is
    another, it would spill.
    """
    operand = tl.trans(slope.to(COMPUTE))
    result = ()
    for k in tl.static_range(len(sums)):
        block = load_rows(student, offsets, valid, first + k, CS, CS_BLOCK).to(COMPUTE)
        total = tl.dot(operand, block, sums[k], input_precision=PRECISION, out_dtype=ACC)
        result = result + (total,)
    return result


@triton.jit
def store_weight_partial(
    partial, split, j, sums, first,
    CT: tl.constexpr, CS: tl.constexpr, CT_BLOCK: tl.constexpr, CS_BLOCK: tl.constexpr,
):  # fmt: skip
    """Entry `split` of a (splits, CT, CS) tensor: rows j CT_BLOCK and on, columns of the blocks
    `first` and on."""
    channel = j * CT_BLOCK + tl.arange(0, CT_BLOCK)
    offsets = (split * CT + channel).to(tl.int64) * CS
    for k in tl.static_range(len(sums)):
        store_rows(partial, offsets, channel < CT, sums[k], first + k, CS, CS_BLOCK)


@triton.jit
def store_statistics(base, row, valid, a, b, c, d):
    """Four numbers a row, side by side: a (rows, 4) tensor; nothing where it is None."""
    if base is not None:
        both = tl.join(tl.join(a, c), tl.join(b, d))  # (rows, 2, 2): [[a, b], [c, d]]
        at = base + row[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(at, tl.reshape(both, (a.shape[0], 4)), mask=valid[:, None])


@triton.jit
def load_statistics(base, row, valid):
    """What `store_statistics` has written: four (rows,) tensors."""
    four = tl.load(
        base + row[:, None] * 4 + tl.arange(0, 4)[None, :], mask=valid[:, None], other=0.0
    )
    first, second = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
    a, c = tl.split(first)
    b, d = tl.split(second)
    return a, b, c, d


@triton.jit
def inside(values, valid, block, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Zero where the row or the channel is not there."""
    mask = valid[:, None]
    if CHANNELS % BLOCK != 0:
        channel = block * BLOCK + tl.arange(0, BLOCK)
        mask = mask & (channel < CHANNELS)[None, :]
    return tl.where(mask, values, 0.0)


@triton.jit
def with_row_sums(
    error, width, HB: tl.constexpr, WB: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """Half the gradient of the spectral energy: e + (1/W) sum_w e [+ (-1)^w (1/W) sum_w (-1)^w e].

    Its product with e, summed, is the energy (design: the half spectrum by Parseval; the last
    term where W is even). `error` must be zero outside of the grid.
    """
    rows = tl.reshape(error, (HB, WB, BLOCK))
    column = tl.arange(0, WB)[None, :, None]
    scale = 1.0 / (tl.zeros((1, 1, 1), ACC) + width)  # a width of 1 comes as a constant
    plain = tl.sum(rows, 1, keep_dims=True) * scale
    sign = tl.where(column % 2 == 0, 1.0, -1.0).to(ACC)
    alternating = tl.sum(rows * sign, 1, keep_dims=True) * scale
    alternating = tl.where(width % 2 == 0, alternating, 0.0)
    total = rows + plain + sign * alternating
    total = tl.where(column < width, total, 0.0)
    return tl.reshape(total, (HB * WB, BLOCK))
