"""Launches of `widelast_projection.py`: what all take, and tiles by widths, dtype and chip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from featkd.kernels.shapes import channels_adjacent, matmul_precision, triton_type
from featkd.reference import accumulation_dtype


class Parameters(NamedTuple):
    """The projector's and both LayerNorms'."""

    weight: Tensor  # (Ct, Cs)
    gamma_p: Tensor  # (Ct,)
    beta_p: Tensor  # (Ct,)
    gamma_1: Tensor  # (Ct,)
    beta_1: Tensor  # (Ct,)


@dataclass(frozen=True)
class Config:
    """Tile sizes of a launch: rows of a tile, channels of a block of x and of h."""

    rows: int
    student_block: int
    teacher_block: int
    hold: bool = False  # h in registers (forward), x or W as operands (backward)
    group: int = 1  # blocks of x's channels that a program of dW takes; divides their number
    num_warps: int = 8
    num_stages: int = 2


def forward_config(student: int, teacher: int, compute: torch.dtype, arch: int) -> Config:
    return Config(64, 64, 128, hold=True)


def input_config(student: int, teacher: int, compute: torch.dtype, arch: int) -> Config:
    return Config(64, 64, 64)


def parameter_config(student: int, teacher: int, compute: torch.dtype, arch: int) -> Config:
    return Config(32, 64, 64, group=-(-student // 64))


def split_count(rows: int) -> int:
    """Programs that share the rows of dW: 1,024 each, as fewer would write more partial sums than
    they read rows, and no more than a GPU of 132 processors needs with three channel blocks."""
    return max(1, min(44, rows // 1024))


def loadable(x: Tensor, parameters: Parameters) -> tuple[Tensor, Parameters]:
    """The same tensors, copied where their channels, or the weight's rows, are not adjacent."""
    weight, *vectors = parameters
    adjacent = (channels_adjacent(p) for p in vectors)
    return channels_adjacent(x), Parameters(weight.contiguous(), *adjacent)


def shared_arguments(
    x: Tensor, parameters: Parameters, compute: torch.dtype, config: Config
) -> dict[str, Any]:
    """The arguments that the kernels share."""
    batch, tokens, channels = x.shape
    return {
        "x": x,
        "weight": parameters.weight,
        "gamma_p": parameters.gamma_p,
        "beta_p": parameters.beta_p,
        "gamma_1": parameters.gamma_1,
        "x_image": x.stride(0),
        "x_token": x.stride(1),
        "tokens": tokens,
        "total": batch * tokens,
        "CS": channels,
        "CT": parameters.weight.shape[0],
        "CS_BLOCK": config.student_block,
        "CT_BLOCK": config.teacher_block,
        "ROWS": config.rows,
        "HOLD": config.hold,
        "COMPUTE": triton_type(compute),
        "ACC": triton_type(accumulation_dtype(compute)),
        "PRECISION": matmul_precision(compute),
    }
