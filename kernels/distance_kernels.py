"""Device code of `feature_distance`; the docstring of that module has the equations."""

import triton
import triton.language as tl

from featkd.kernels import rows


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
            # With a norm, T is loaded one block before its use and arrives while the moments are
            # computed. With several float32 blocks per row, a second block would spill.
            AHEAD: tl.constexpr = NORM and (
                BLOCKS == 1 or teacher.dtype.element_ty.primitive_bitwidth <= 16
            )
            if AHEAD:
                next_target = rows.load_rows(
                    from_teacher, token * teacher_token, valid, 0, C, BLOCK
                )  # fmt: skip
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
                pooled = _accumulate(pooled, x_hat, j, BLOCKS, SUMS)
            if teacher is not None:
                if AHEAD:
                    target = next_target
                    if BLOCKS > 1:
                        is_next = valid & (j + 1 < BLOCKS)
                        next_target = rows.load_rows(
                            from_teacher, token * teacher_token, is_next, j + 1, C, BLOCK
                        )  # fmt: skip
                else:
                    target = rows.load_rows(from_teacher, token * teacher_token, valid, j, C, BLOCK)
                error, grad_error = _error_and_gradient(
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
            if d_pooled is not None:  # these means depend on d_pooled: nothing could be kept
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
                _, grad_error = _error_and_gradient(
                    x_hat, target, gamma, beta, valid, width, j, C, BLOCK, HB, WB, SPECTRAL, ACC
                )  # fmt: skip
                d_output = upstream * grad_error
            if d_pooled is not None:
                share = rows.load_channels(from_pooled, j, 0.0, C, BLOCK, ACC) / tokens
                d_output += tl.where(valid[:, None], share, 0.0)
            if norm_partial is not None:
                d_gamma = _accumulate(d_gamma, d_output * x_hat, j, BLOCKS, SUMS)
                d_beta = _accumulate(d_beta, d_output, j, BLOCKS, SUMS)
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
def _error_and_gradient(
    x_hat, target, gamma, beta, valid, width, j,
    C: tl.constexpr, BLOCK: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr,
    SPECTRAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """E and H = 1/2 d sum(E H) / dE of a channel block; zero out of bounds."""
    output = x_hat
    if gamma is not None:
        output *= rows.load_channels(gamma, j, 1.0, C, BLOCK, ACC)
    if beta is not None:
        output += rows.load_channels(beta, j, 0.0, C, BLOCK, ACC)
    error = rows.mask_out_of_bounds(output - target.to(ACC), valid, j, C, BLOCK)
    grad_error = error
    if SPECTRAL:
        grad_error = _spectral_gradient(error, width, HB, WB, BLOCK, ACC)
    return error, grad_error


@triton.jit
def _spectral_gradient(
    error, width, HB: tl.constexpr, WB: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """H of the spectral metric; E must be zero out of bounds."""
    grid = tl.reshape(error, (HB, WB, BLOCK))
    column = tl.arange(0, WB)[None, :, None]
    scale = 1.0 / (tl.zeros((1, 1, 1), ACC) + width)  # Triton passes a width of 1 as a constant
    plain = tl.sum(grid, 1, keep_dims=True) * scale
    sign = tl.where(column % 2 == 0, 1.0, -1.0).to(ACC)
    alternating = tl.sum(grid * sign, 1, keep_dims=True) * scale
    alternating = tl.where(width % 2 == 0, alternating, 0.0)
    total = tl.where(column < width, grid + plain + sign * alternating, 0.0)
    return tl.reshape(total, (HB * WB, BLOCK))


@triton.jit
def _accumulate(sums, values, j, BLOCKS: tl.constexpr, SUMS: tl.constexpr):
    """Adds the values of channel block j to the sums over rows.

    With one block per row, `sums` is a whole tile, and threads exchange nothing before the end.
    With several, `sums` has a row for each block. The loop over j must stay a loop: unrolled, it
    would spill.
    """
    if BLOCKS == 1:
        result = sums + values
    else:
        here = tl.arange(0, SUMS)[:, None] == j
        result = tl.where(here, sums + tl.sum(values, 0)[None, :], sums)
    return result


@triton.jit
def _store_sums(
    base, entry, sums,
    BLOCKS: tl.constexpr, SUMS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the sums over rows as one entry of an (entries, C) tensor."""
    if BLOCKS == 1:
        channel = tl.arange(0, BLOCK)
        tl.store(base + entry * C + channel, tl.sum(sums, 0), mask=channel < C)
    else:
        channel = tl.arange(0, SUMS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(base + entry * C + channel, sums, mask=channel < C)
