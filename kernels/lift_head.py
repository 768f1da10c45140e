"""lift_head in Triton: the pooled map and the loss from one kernel, gradients from two more.

P = f W^T, z = LN(P) = gamma x_hat + beta; pooled = mean of z over an image's tokens; E = z - T,
loss = scale * sum(E * H), H = E (mse) or E with its row sums (`rows.with_row_sums`). [EM26], Lift.

Pooling needs no z: x_hat = rstd W_c f, with W_c = W less its mean over the output channels, so
pooled = gamma (W_c a) + beta with a = mean of rstd f. The kernel that knows rstd sums rstd f over
its tokens, and a (B, Cs) x (Cs, Ct) product ends it. A tile never spans two images.

Backward, dz = upstream * 2 scale H + dpooled / N and g = gamma dz. Its two means over the channels
are known before P is: those of the loss's part from the forward pass, mean(gamma dpooled / N) once
an image, and mean(gamma dpooled / N x_hat) = rstd f.v with v = W_c^T (gamma dpooled / N) / Ct.

Traffic a row, bf16, 192 -> 384, with teacher and all gradients: 1,152 B read three times (f, T) and
16 B twice, 43 B (statistics, sums), 400 B (df, statistics) written: 3.9 KB, in 6 products of Cs x
Ct. Keeping the loss's df from the forward pass, and adding the pooled part to it in the backward
pass, moves 3.9 KB too, in 8 products, and keeps 384 B a row in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from featkd.kernels import distance, rows
from featkd.kernels.configs import split_count
from featkd.kernels.launch import architecture, launch
from featkd.kernels.lift_launch import (
    Head,
    distance_config,
    features_config,
    head_config,
    loadable,
    shared_arguments,
)
from featkd.kernels.scaled import sum_times
from featkd.reference import accumulation_dtype


@triton.jit
def pool_and_distance(
    features,  # (B, N, Cs) any floating dtype, channels adjacent
    teacher,  # (B, N, Ct) any floating dtype, channels adjacent, or None
    weight,  # (Ct, Cs)
    gamma,  # (Ct,) LayerNorm's weight
    beta,  # (Ct,) LayerNorm's bias
    pooled_partial,  # (B, tiles, Cs) ACC: each program's sum of rstd f
    statistics,  # (B N, 4) ACC: mean, rstd, means of gamma H and of gamma H x_hat; or None
    energy_partial,  # (B, tiles) ACC: each program's sum of E H; None without a teacher
    features_image, features_token, teacher_image, teacher_token, weight_stride,
    tokens, width, image_rows, tiles, eps,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    HB: tl.constexpr, WB: tl.constexpr, SPECTRAL: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program a tile of one image's tokens; P is formed once, and again to meet the teacher.

    W comes from L2 once a sweep and program: the more rows a tile has, the better.
    """
    image, token, valid = _places(tl.program_id(0), image_rows, width, tokens, tiles, HB, WB)
    from_features = image * features_image + token * features_token
    mean, rstd = distance.row_statistics(
        (), features, from_features, valid, weight, weight_stride, None, eps,
        CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
    )  # fmt: skip
    at = pooled_partial + tl.program_id(0).to(tl.int64) * CS
    for k in range(tl.cdiv(CS, CS_BLOCK)):
        f = rows.load_rows(features, from_features, valid, k, CS, CS_BLOCK).to(COMPUTE)
        channel = k * CS_BLOCK + tl.arange(0, CS_BLOCK)
        tl.store(at + channel, tl.sum(f.to(ACC) * rstd[:, None], 0), mask=channel < CS)
    mean_g = tl.zeros((HB * WB,), ACC)
    mean_gx = tl.zeros((HB * WB,), ACC)
    if teacher is not None:
        from_teacher = image * teacher_image + token * teacher_token
        energy, mean_g, mean_gx = distance.row_sums(
            (), features, from_features, teacher, from_teacher, valid, weight, weight_stride,
            None, gamma, beta, mean, rstd, width,
            CS, CT, CS_BLOCK, CT_BLOCK, HB, WB, SPECTRAL, COMPUTE, ACC, PRECISION,
        )  # fmt: skip
        tl.store(energy_partial + tl.program_id(0), tl.sum(energy, 0))
    rows.store_statistics(statistics, image * tokens + token, valid, mean, rstd, mean_g, mean_gx)


@triton.jit
def features_gradient(
    features, teacher, weight, gamma, beta,
    statistics,  # (B N, 4) ACC as `pool_and_distance` left them
    scales,  # (2,) ACC: of H in dz, and of all results
    shift,  # (B, Ct) ACC: dpooled / N over the second scale; or None, as the next two
    shift_mean,  # (B,) ACC: mean(gamma shift)
    shift_features,  # (B, Cs) ACC: v
    totals,  # (B N, 4) ACC: mean, rstd, mean(g), mean(g x_hat); or None
    gradient,  # (B N, Cs) features' dtype, or None
    features_image, features_token, teacher_image, teacher_token, weight_stride,
    tokens, width, image_rows, tiles,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    HB: tl.constexpr, WB: tl.constexpr, SPECTRAL: tl.constexpr, GROUPS: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """df = dP W: a program a tile of one image's tokens and a group of the blocks of df."""
    GROUP: tl.constexpr = tl.cdiv(CS, CS_BLOCK) // GROUPS
    group = tl.program_id(1)
    image, token, valid = _places(tl.program_id(0), image_rows, width, tokens, tiles, HB, WB)
    from_features = image * features_image + token * features_token
    from_teacher = image * teacher_image + token * teacher_token
    row = image * tokens + token
    mean, rstd, mean_g, mean_gx = rows.load_statistics(statistics, row, valid)
    scale = tl.load(scales)
    if teacher is None:  # a loss that is not differentiated may be NaN
        mean_g = tl.zeros((HB * WB,), ACC)
        mean_gx = tl.zeros((HB * WB,), ACC)
    else:
        mean_g *= scale
        mean_gx *= scale
    if shift is not None:
        along = tl.zeros((HB * WB,), ACC)
        for k in range(tl.cdiv(CS, CS_BLOCK)):
            f = rows.load_rows(features, from_features, valid, k, CS, CS_BLOCK).to(COMPUTE)
            v = rows.load_channels(shift_features + image * CS, k, CS, CS_BLOCK, ACC)
            along += tl.sum(f.to(ACC) * v[None, :], 1)
        mean_g += tl.load(shift_mean + image)
        mean_gx += rstd * along
    if group == 0:
        rows.store_statistics(totals, row, valid, mean, rstd, mean_g, mean_gx)
    if gradient is not None:
        sums = rows.zero_blocks(HB * WB, GROUP * CS_BLOCK, CS_BLOCK, ACC)
        for j in range(tl.cdiv(CT, CT_BLOCK)):
            p = rows.project_streamed(
                features, from_features, valid, weight, weight_stride, None, j,
                CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
            )  # fmt: skip
            x = (p - mean[:, None]) * rstd[:, None]
            dz = _map_gradient(
                x, teacher, from_teacher, gamma, beta, shift, image, scale, valid, width, j,
                CT, CT_BLOCK, HB, WB, SPECTRAL, ACC,
            )  # fmt: skip
            slope = distance.slope(dz, x, gamma, rstd, mean_g, mean_gx, j, CT, CT_BLOCK, ACC)
            slope = rows.inside(slope, valid, j, CT, CT_BLOCK)
            sums = rows.through_weight(
                sums, slope, weight, weight_stride, j, group * GROUP,
                CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
            )  # fmt: skip
        size = tl.load(scales + 1)
        for k in tl.static_range(GROUP):
            rows.store_rows(
                gradient, row * CS, valid, sums[k] * size, group * GROUP + k, CS, CS_BLOCK
            )


@triton.jit
def head_gradients(
    features, teacher, weight, gamma, beta,
    totals,  # (B N, 4) ACC as `features_gradient` left them
    scales, shift,
    weight_partial,  # (splits, Ct, Cs) ACC
    vector_partial,  # (splits, 2, Ct) ACC: sums over rows of dz x_hat and of dz
    features_image, features_token, teacher_image, teacher_token, weight_stride,
    tokens, width, image_rows, tiles, all_tiles, tiles_a_split,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    HB: tl.constexpr, WB: tl.constexpr, SPECTRAL: tl.constexpr, GROUPS: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW = dP^T f and the norm's: a program a channel block, a group of dW's blocks, a split.

    Programs of the same rows are neighbours in the grid: f comes from memory once and from L2
    after that. The caller adds the splits up in a fixed order.
    """
    GROUP: tl.constexpr = tl.cdiv(CS, CS_BLOCK) // GROUPS
    j = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    split = tl.program_id(1)
    scale = tl.load(scales)
    sums = rows.zero_blocks(CT_BLOCK, GROUP * CS_BLOCK, CS_BLOCK, ACC)
    sum_gamma = tl.zeros((CT_BLOCK,), ACC)
    sum_beta = tl.zeros((CT_BLOCK,), ACC)
    first = split * tiles_a_split
    for tile in range(first, tl.minimum(first + tiles_a_split, all_tiles)):
        image, token, valid = _places(tile, image_rows, width, tokens, tiles, HB, WB)
        from_features = image * features_image + token * features_token
        from_teacher = image * teacher_image + token * teacher_token
        p = rows.project_streamed(
            features, from_features, valid, weight, weight_stride, None, j,
            CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
        )  # fmt: skip
        mean, rstd, mean_g, mean_gx = rows.load_statistics(totals, image * tokens + token, valid)
        x = (p - mean[:, None]) * rstd[:, None]
        dz = _map_gradient(
            x, teacher, from_teacher, gamma, beta, shift, image, scale, valid, width, j,
            CT, CT_BLOCK, HB, WB, SPECTRAL, ACC,
        )  # fmt: skip
        slope = distance.slope(dz, x, gamma, rstd, mean_g, mean_gx, j, CT, CT_BLOCK, ACC)
        slope = rows.inside(slope, valid, j, CT, CT_BLOCK)
        sums = rows.add_outer(
            sums, slope, features, from_features, valid, group * GROUP,
            CS, CS_BLOCK, COMPUTE, ACC, PRECISION,
        )  # fmt: skip
        sum_gamma += tl.sum(dz * x, 0)
        sum_beta += tl.sum(dz, 0)
    rows.store_weight_partial(
        weight_partial, split, j, sums, group * GROUP, CT, CS, CT_BLOCK, CS_BLOCK
    )
    if group == 0:
        channel = j * CT_BLOCK + tl.arange(0, CT_BLOCK)
        at = vector_partial + split * (2 * CT) + channel
        tl.store(at, sum_gamma, mask=channel < CT)
        tl.store(at + CT, sum_beta, mask=channel < CT)


@triton.jit
def _places(tile, image_rows, width, tokens, tiles, HB: tl.constexpr, WB: tl.constexpr):
    """The image of tile number `tile`, `tiles` an image, and its places' tokens and validity."""
    _, token, valid = rows.tile_places(tile % tiles * HB, image_rows, width, tokens, HB, WB)
    return (tile // tiles).to(tl.int64), token, valid


@triton.jit
def _map_gradient(
    x, teacher, from_teacher, gamma, beta, shift, image, scale, valid, width, j,
    CT: tl.constexpr, CT_BLOCK: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr,
    SPECTRAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Channel block j of dz: the loss's part and the pooled map's, either where it is there."""
    total = tl.zeros((HB * WB, CT_BLOCK), ACC)
    if teacher is not None:
        _, half = distance.error_and_half(
            x, teacher, from_teacher, gamma, beta, valid, width, j,
            CT, CT_BLOCK, HB, WB, SPECTRAL, ACC,
        )  # fmt: skip
        total = scale * half
    if shift is not None:
        total += rows.load_channels(shift + image * CT, j, CT, CT_BLOCK, ACC)[None, :]
    return rows.inside(total, valid, j, CT, CT_BLOCK)


def forward(
    features: Tensor,
    head: Head,
    teacher: Tensor | None,
    *,
    eps: float,
    width: int,
    compute: torch.dtype,
    need_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the pooled map and the loss are made of.

    Args:
        features, teacher: (B, N, Cs), (B, N, Ct); copied where channels are not adjacent.
        eps: LayerNorm's epsilon.
        width: columns of the patch grid for the spectral metric, 0 for the mse.
        compute: type of the products' operands.
        need_statistics: keep the (B N, 4) statistics that `backward` needs.

    Returns:
        The mean of x_hat over each image's tokens (B, Ct), sum(E H) or None without a teacher, and
        the statistics or None; all in the accumulators' dtype.
    """
    features, head, teacher = loadable(features, head, teacher)
    batch, tokens, channels = features.shape
    arch = architecture(features.device)
    config = distance_config(channels, head.weight.shape[0], width, compute, arch)
    arguments = shared_arguments(features, head, teacher, width, compute, config)
    kind, tiles = accumulation_dtype(compute), arguments["tiles"]
    pooled = features.new_empty(batch, tiles, channels, dtype=kind)
    energy = None if teacher is None else features.new_empty(batch, tiles, dtype=kind)
    statistics = features.new_empty(batch * tokens, 4, dtype=kind) if need_statistics else None
    launch(
        pool_and_distance,
        (batch * tiles,),
        {
            **arguments,
            "pooled_partial": pooled,
            "statistics": statistics,
            "energy_partial": energy,
            "eps": eps,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    mean = pooled.sum(1) / tokens @ _centred(head.weight, compute).t()
    return mean, None if energy is None else energy.sum(), statistics


def backward(
    features: Tensor,
    head: Head,
    teacher: Tensor | None,
    statistics: Tensor,
    d_loss: Tensor | None,
    d_pooled: Tensor | None,
    *,
    width: int,
    compute: torch.dtype,
    need_features: bool,
    need_parameters: bool,
    exact: bool = False,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of the features and of the head's parameters.

    Args:
        d_loss: of sum(E H) / 2, a scalar, or None; given with the teacher.
        d_pooled: (B, Ct) contiguous, or None; both in the accumulators' dtype.
        exact: leave the parameters' gradients in that dtype.

    Returns:
        df (B, N, Cs), None where not needed; dW, dgamma and dbeta, none of them where not needed;
        each in the dtype of what it is the gradient of.
    """
    if d_loss is None:
        teacher = None
    features, head, teacher = loadable(features, head, teacher)
    batch, tokens, channels = features.shape
    teacher_width = head.weight.shape[0]
    arch, kind = architecture(features.device), accumulation_dtype(compute)
    scales, shift = _scaled(d_loss, None if d_pooled is None else d_pooled / tokens, compute)
    shift_mean = shift_features = None
    if shift is not None:
        g = shift * head.gamma.to(kind)
        shift_mean = g.mean(1)
        shift_features = g @ _centred(head.weight, compute) / teacher_width
    gradient = features.new_empty(features.shape) if need_features else None
    totals = torch.empty_like(statistics) if need_parameters else None
    config = features_config(channels, teacher_width, width, compute, arch)
    arguments = shared_arguments(features, head, teacher, width, compute, config)
    groups = config.groups(channels)
    launch(
        features_gradient,
        (batch * arguments["tiles"], groups if need_features else 1),
        {
            **arguments,
            "statistics": statistics,
            "scales": scales,
            "shift": shift,
            "shift_mean": shift_mean,
            "shift_features": shift_features,
            "totals": totals,
            "gradient": gradient,
            "GROUPS": groups,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if totals is None:
        return gradient, []
    config = head_config(channels, teacher_width, width, compute, arch)
    arguments = shared_arguments(features, head, teacher, width, compute, config)
    groups = config.groups(channels)
    tiles = batch * arguments["tiles"]
    tiles_a_split = triton.cdiv(tiles, split_count(batch * tokens))
    splits = triton.cdiv(tiles, tiles_a_split)
    weights = features.new_empty(splits, teacher_width, channels, dtype=kind)
    vectors = features.new_empty(splits, 2, teacher_width, dtype=kind)
    launch(
        head_gradients,
        (triton.cdiv(teacher_width, config.teacher_block) * groups, splits),
        {
            **arguments,
            "totals": totals,
            "scales": scales,
            "shift": shift,
            "weight_partial": weights,
            "vector_partial": vectors,
            "all_tiles": tiles,
            "tiles_a_split": tiles_a_split,
            "GROUPS": groups,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    sums = zip(head, (weights, *vectors.unbind(1)), strict=True)
    return gradient, [sum_times(x, scales[1], kind if exact else p.dtype) for p, x in sums]


def _centred(weight: Tensor, compute: torch.dtype) -> Tensor:
    """W_c of W as the products see it. Centred after a product, an offset in W would cancel."""
    exact = weight.to(compute).to(accumulation_dtype(compute))
    return exact - exact.mean(0)


def _scaled(
    d_loss: Tensor | None, shift: Tensor | None, compute: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(d_loss over s, s) and shift over s, with s their size where half-precision dP needs it.

    fp16 ends at 6e-8, below what an unscaled loss's dP often is; dP is rounded before its products.
    """
    some = [x for x in (d_loss, shift) if x is not None]
    size = torch.ones_like(some[0].flatten()[0])
    if compute == torch.float16:
        largest = torch.stack([x.abs().amax() for x in some]).amax()
        size = torch.where((largest > 0) & largest.isfinite(), largest, size)
    loss = torch.zeros_like(size) if d_loss is None else d_loss / size
    return torch.stack((loss, size)), None if shift is None else shift / size
