"""projected_feature_kd in Triton: loss and dS from one pass over the rows, dW from a second.

P = S W^T + b, Y = LN(P), E = Y - T, loss = scale * sum(E * H), H = E (mse) or E with its row sums
(spectral, `rows.with_row_sums`); then dLoss/dE = 2 scale H. Gradients are stored without the
factor 2 scale, so that half-precision ones do not underflow; the upstream gradient, unknown in
the forward pass, joins that factor later. [EM26], feature losses.

Traffic a row, bf16, 192 -> 384: S and T read once (1,152 B), dS written (384 B) and, with a
LayerNorm, four row statistics (16 B). P, Y, E and their gradients stay in registers. Every program
reads W again, from L2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from featkd.kernels import distance, rows
from featkd.kernels.configs import Config, gradient_config, loss_config, split_count
from featkd.kernels.launch import architecture, launch
from featkd.kernels.scaled import sum_times
from featkd.kernels.shapes import channels_adjacent
from featkd.reference import accumulation_dtype


@triton.jit
def loss_and_student_gradient(
    student,  # (B, N, Cs) any floating dtype, channels adjacent
    teacher,  # (B, N, Ct) any floating dtype, channels adjacent
    weight,  # (Ct, Cs) or None
    bias,  # (Ct,) or None
    gamma,  # (Ct,) LayerNorm's weight, or None
    beta,  # (Ct,) or None
    gradient,  # (B N, Cs) student's dtype: dS / (2 scale), or None
    statistics,  # (B N, 4) ACC: mean, rstd, mean(g), mean(g x_hat), or None
    partial,  # (programs,) ACC: each program's sum of E H
    student_image, student_token, teacher_image, teacher_token, weight_stride,
    tokens, width, image_rows, eps,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    HB: tl.constexpr, WB: tl.constexpr, SPECTRAL: tl.constexpr, HOLD: tl.constexpr,
    GROUPS: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program a tile of rows and a group of dS's channels; one sweep without a norm, or three.

    A norm needs two reductions over the channels before its gradient. P is formed again for each,
    on the tensor cores, and T read again, from L2: P and H of a tile do not fit in registers
    (64 x 384 of both spilled 1 to 16 KB a thread), and in memory they are what fusion avoids.
    """
    BLOCKS: tl.constexpr = tl.cdiv(CT, CT_BLOCK)
    GROUP: tl.constexpr = tl.cdiv(CS, CS_BLOCK) // GROUPS
    group = 0 if GROUPS == 1 else tl.program_id(1)
    first = tl.program_id(0) * HB
    image, token, valid = rows.tile_places(first, image_rows, width, tokens, HB, WB)
    from_student = image * student_image + token * student_token
    from_teacher = image * teacher_image + token * teacher_token
    row = image * tokens + token
    blocks = rows.load_student(student, weight, from_student, valid, CS, CS_BLOCK, COMPUTE, HOLD)
    mean = tl.zeros((HB * WB,), ACC)
    rstd = tl.zeros((HB * WB,), ACC)
    energy = tl.zeros((HB * WB,), ACC)
    mean_g = tl.zeros((HB * WB,), ACC)
    mean_gx = tl.zeros((HB * WB,), ACC)
    if gamma is not None:
        mean, rstd = distance.row_statistics(
            blocks, student, from_student, valid, weight, weight_stride, bias, eps,
            CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
        )  # fmt: skip
        energy, mean_g, mean_gx = distance.row_sums(
            blocks, student, from_student, teacher, from_teacher, valid, weight, weight_stride,
            bias, gamma, beta, mean, rstd, width,
            CS, CT, CS_BLOCK, CT_BLOCK, HB, WB, SPECTRAL, COMPUTE, ACC, PRECISION,
        )  # fmt: skip
        if group == 0:
            rows.store_statistics(statistics, row, valid, mean, rstd, mean_g, mean_gx)

    if gamma is None or gradient is not None:
        sums = rows.zero_blocks(HB * WB, GROUP * CS_BLOCK, CS_BLOCK, ACC)
        for j in range(BLOCKS):
            x = distance.projected(
                blocks, student, from_student, valid, weight, weight_stride, bias, j,
                CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
            )  # fmt: skip
            if gamma is not None:
                x = (x - mean[:, None]) * rstd[:, None]
            error, half = distance.error_and_half(
                x, teacher, from_teacher, gamma, beta, valid, width, j,
                CT, CT_BLOCK, HB, WB, SPECTRAL, ACC,
            )  # fmt: skip
            if gamma is None:
                energy += tl.sum(error * half, 1)
            if gradient is not None:
                slope = distance.slope(half, x, gamma, rstd, mean_g, mean_gx, j, CT, CT_BLOCK, ACC)
                if weight is None:
                    rows.store_rows(gradient, row * CT, valid, slope, j, CT, CT_BLOCK)
                else:
                    slope = rows.inside(slope, valid, j, CT, CT_BLOCK)
                    sums = rows.through_weight(
                        sums, slope, weight, weight_stride, j, group * GROUP,
                        CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
                    )  # fmt: skip
        if gradient is not None and weight is not None:
            for k in tl.static_range(GROUP):
                rows.store_rows(gradient, row * CS, valid, sums[k], group * GROUP + k, CS, CS_BLOCK)
    if group == 0:
        tl.store(partial + tl.program_id(0), tl.sum(energy, 0))


@triton.jit
def parameter_gradients(
    student, teacher, weight, bias, gamma, beta,
    statistics,  # (B N, 4) ACC as `loss_and_student_gradient` left them, or None without a norm
    weight_partial,  # (splits, Ct, Cs) ACC, or None without a weight
    vector_partial,  # (splits, 3, Ct) ACC: sums over rows of dP, H x_hat, H
    student_image, student_token, teacher_image, teacher_token, weight_stride,
    tokens, width, image_rows, tiles,
    CS: tl.constexpr, CT: tl.constexpr, CS_BLOCK: tl.constexpr, CT_BLOCK: tl.constexpr,
    HB: tl.constexpr, WB: tl.constexpr, SPECTRAL: tl.constexpr, GROUPS: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW = dP^T S and the vectors' gradients: a program a channel block and a share of the tiles.

    With the row statistics at hand, a channel block of dP needs no other block. Programs of the
    same rows are neighbours in the grid: S comes from memory once and from L2 after that. Sums
    over rows are added up in a fixed order by the caller: no atomics.
    """
    j = tl.program_id(0)
    split = tl.program_id(1)
    GROUP: tl.constexpr = tl.cdiv(CS, CS_BLOCK) // GROUPS
    first = tl.program_id(2) * GROUP
    sums = rows.zero_blocks(CT_BLOCK, GROUP * CS_BLOCK, CS_BLOCK, ACC)
    sum_slope = tl.zeros((CT_BLOCK,), ACC)
    sum_gamma = tl.zeros((CT_BLOCK,), ACC)
    sum_beta = tl.zeros((CT_BLOCK,), ACC)
    for tile in range(split * tiles, (split + 1) * tiles):
        image, token, valid = rows.tile_places(tile * HB, image_rows, width, tokens, HB, WB)
        from_student = image * student_image + token * student_token
        from_teacher = image * teacher_image + token * teacher_token
        x = distance.projected(
            (), student, from_student, valid, weight, weight_stride, bias, j,
            CS, CT, CS_BLOCK, CT_BLOCK, COMPUTE, ACC, PRECISION,
        )  # fmt: skip
        rstd = tl.zeros((HB * WB,), ACC)
        mean_g = rstd
        mean_gx = rstd
        if gamma is not None:
            row = image * tokens + token
            mean, rstd, mean_g, mean_gx = rows.load_statistics(statistics, row, valid)
            x = (x - mean[:, None]) * rstd[:, None]
        _, half = distance.error_and_half(
            x, teacher, from_teacher, gamma, beta, valid, width, j,
            CT, CT_BLOCK, HB, WB, SPECTRAL, ACC,
        )  # fmt: skip
        slope = distance.slope(half, x, gamma, rstd, mean_g, mean_gx, j, CT, CT_BLOCK, ACC)
        slope = rows.inside(slope, valid, j, CT, CT_BLOCK)
        if weight is not None:
            sums = rows.add_outer(
                sums, slope, student, from_student, valid, first,
                CS, CS_BLOCK, COMPUTE, ACC, PRECISION,
            )  # fmt: skip
        sum_slope += tl.sum(slope, 0)
        sum_gamma += tl.sum(half * x, 0)
        sum_beta += tl.sum(half, 0)
    if weight is not None:
        rows.store_weight_partial(weight_partial, split, j, sums, first, CT, CS, CT_BLOCK, CS_BLOCK)
    channel = j * CT_BLOCK + tl.arange(0, CT_BLOCK)
    at = vector_partial + split * (3 * CT) + channel
    mine = (channel < CT) & (first == 0)  # every group has the same sums
    tl.store(at, sum_slope, mask=mine)
    tl.store(at + CT, sum_gamma, mask=mine)
    tl.store(at + 2 * CT, sum_beta, mask=mine)


class Parameters(NamedTuple):
    """The projector's and the LayerNorm's; None where there is none."""

    weight: Tensor | None  # (Ct, Cs)
    bias: Tensor | None  # (Ct,)
    gamma: Tensor | None  # (Ct,)
    beta: Tensor | None  # (Ct,)


def _loadable(
    student: Tensor, teacher: Tensor, parameters: Parameters
) -> tuple[Tensor, Tensor, Parameters]:
    """The same tensors, copied where their channels are not adjacent in memory."""
    adjacent = (None if p is None else channels_adjacent(p) for p in parameters)
    return channels_adjacent(student), channels_adjacent(teacher), Parameters(*adjacent)


def _tiles(config: Config, width: int) -> tuple[int, int]:
    """HB and WB: image rows of a tile and their places, `width` tokens in each."""
    places = triton.next_power_of_2(width)
    return max(1, config.rows // places), places


def _arguments(
    student: Tensor,
    teacher: Tensor,
    parameters: Parameters,
    width: int,
    compute: torch.dtype,
    config: Config,
) -> dict[str, Any]:
    """The arguments that the kernels share; a `width` of 0 is the mse."""
    batch, tokens, _ = student.shape
    columns = width or 1
    image_rows, places = _tiles(config, columns)
    weight = parameters.weight
    return {
        "student": student,
        "teacher": teacher,
        **parameters._asdict(),
        "student_image": student.stride(0),
        "student_token": student.stride(1),
        "teacher_image": teacher.stride(0),
        "teacher_token": teacher.stride(1),
        "weight_stride": 0 if weight is None else weight.stride(0),
        "tokens": tokens,
        "width": columns,
        "image_rows": batch * tokens // columns,
        **config.constants(student.shape[2], teacher.shape[2], compute),
        "HB": image_rows,
        "WB": places,
        "SPECTRAL": width > 0,
    }


def forward(
    student: Tensor,
    teacher: Tensor,
    parameters: Parameters,
    *,
    eps: float,
    width: int,
    compute: torch.dtype,
    need_student: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """sum(E H), the student's gradient without the loss's scale, and the row statistics.

    Args:
        student, teacher: (B, N, Cs) and (B, N, Ct); copied where channels are not adjacent.
        eps: LayerNorm's epsilon.
        width: columns of the patch grid for the spectral metric, 0 for the mse.
        compute: type of the products' operands.
        need_student: form dS (B, N, Cs), in the student's dtype.
        need_parameters: keep the (B N, 4) statistics that `backward` needs, where there is a norm.

    Returns:
        A scalar, dS / (2 scale) and the statistics, None where not needed.
    """
    student, teacher, parameters = _loadable(student, teacher, parameters)
    batch, tokens, channels = student.shape
    norm = parameters.gamma is not None
    config = loss_config(
        channels,
        teacher.shape[2],
        compute,
        architecture(student.device),
        triton.next_power_of_2(width or 1),
        parameters.weight is not None,
    )
    groups = config.groups(channels) if need_student and parameters.weight is not None else 1
    arguments = _arguments(student, teacher, parameters, width, compute, config)
    programs = triton.cdiv(arguments["image_rows"], arguments["HB"])
    kind = accumulation_dtype(compute)
    partial = student.new_empty(programs, dtype=kind)
    gradient = student.new_empty(student.shape) if need_student else None
    statistics = None
    if need_parameters and norm:
        statistics = student.new_empty(batch * tokens, 4, dtype=kind)
    launch(
        loss_and_student_gradient,
        (programs, groups),
        {
            **arguments,
            "gradient": gradient,
            "statistics": statistics,
            "partial": partial,
            "eps": eps,
            "HOLD": config.hold,
            "GROUPS": groups,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partial.sum(), gradient, statistics


def backward(
    student: Tensor,
    teacher: Tensor,
    parameters: Parameters,
    statistics: Tensor | None,
    factor: Tensor,
    *,
    width: int,
    compute: torch.dtype,
    exact: bool = False,
) -> list[Tensor | None]:
    """The parameters' gradients, each in its parameter's dtype; None where there is no parameter.

    Args:
        student, teacher, parameters, width, compute: as in `forward`.
        statistics: as `forward` left them.
        factor: 2 scale times the upstream gradient, a scalar in the accumulators' dtype.
        exact: leave the gradients in the accumulators' dtype.
    """
    student, teacher, parameters = _loadable(student, teacher, parameters)
    batch, tokens, channels = student.shape
    width_out, kind = teacher.shape[2], accumulation_dtype(compute)
    places = triton.next_power_of_2(width or 1)
    config = gradient_config(channels, width_out, compute, architecture(student.device), places)
    arguments = _arguments(student, teacher, parameters, width, compute, config)
    groups = 1 if parameters.weight is None else config.groups(channels)
    programs = triton.cdiv(width_out, config.teacher_block), groups
    tiles = triton.cdiv(arguments["image_rows"], arguments["HB"])
    per_split = triton.cdiv(tiles, split_count(batch * tokens, math.prod(programs)))
    splits = triton.cdiv(tiles, per_split)
    weight_partial = None
    if parameters.weight is not None:
        weight_partial = student.new_empty(splits, width_out, channels, dtype=kind)
    vector_partial = student.new_empty(splits, 3, width_out, dtype=kind)
    launch(
        parameter_gradients,
        (programs[0], splits, programs[1]),
        {
            **arguments,
            "statistics": statistics,
            "weight_partial": weight_partial,
            "vector_partial": vector_partial,
            "tiles": per_split,
            "GROUPS": groups,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    sums = (weight_partial, *vector_partial.unbind(1))
    return [
        None
        if p is None or partial is None
        else sum_times(partial, factor, kind if exact else p.dtype)
        for p, partial in zip(parameters, sums, strict=True)
    ]
