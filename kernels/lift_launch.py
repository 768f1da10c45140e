"""Launches of `lift_head.py`: what all take, and tiles by widths, dtype and chip.

Tiles are chosen by compilation ahead of time: the largest, to read W from L2 as seldom as possible,
that leave a thread without a stack, spectral metric included. Products of 64 rows and more read
their operands from shared memory on sm_90 and sm_100, and sm_100 keeps sums in tensor memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from featkd.kernels.configs import Config, products
from featkd.kernels.shapes import channel_block, channels_adjacent


def _config(
    student: int,
    teacher: int,
    compute: torch.dtype,
    sizes: tuple[int, int, int],
    *,
    stages: int = 2,
) -> Config:
    """`sizes` (rows, channels of a teacher's block, of a group), with blocks that fit the maps."""
    tile, block, group = sizes
    return Config(
        tile,
        min(64 if compute.itemsize == 2 else 32, channel_block(student, compute)),
        min(block, channel_block(teacher, compute)),
        group,
        num_stages=stages,
    )


def distance_config(
    student: int, teacher: int, width: int, compute: torch.dtype, arch: int
) -> Config:
    """Tiles of `pool_and_distance`."""
    if compute.itemsize > 2:
        # where two thread blocks might share a processor, ptxas spills for it
        return _config(student, teacher, compute, (64, 32 if student >= 192 else 16, 0))
    large = width == 0 and products(arch) != "tcgen05"
    return _config(student, teacher, compute, (128 if large else 64, 64, 0))


def features_config(
    student: int, teacher: int, width: int, compute: torch.dtype, arch: int
) -> Config:
    """Tiles of `features_gradient`: a group of df, (rows, group), stays in registers."""
    if compute.itemsize > 2:
        sizes = 64, 32 if products(arch) == "tcgen05" else 16, 192
        return _config(student, teacher, compute, sizes, stages=1 if student <= 64 else 2)
    if products(arch) != "mma":
        return _config(student, teacher, compute, (64, 64 if student <= 192 else 32, 384))
    if width > 32:  # of the patch grid: a tile holds whole image rows, 64 places of them here
        return _config(student, teacher, compute, (64, 32, 128))
    if student <= 192:
        return _config(student, teacher, compute, (64, 32, 192))
    return _config(student, teacher, compute, (32, 64, 384))


def head_config(student: int, teacher: int, width: int, compute: torch.dtype, arch: int) -> Config:
    """Tiles of `head_gradients`: dW of a block and group, (block, group), stays in registers."""
    kind = products(arch)
    if compute.itemsize > 2:
        return _config(student, teacher, compute, (32, 16, 64 if width > 32 else 192))
    if kind == "tcgen05" or (kind == "wgmma" and student <= 192):
        return _config(student, teacher, compute, (64, 64, 384))
    if kind == "wgmma" or student <= 192:
        return _config(student, teacher, compute, (64, 32, 384))
    return _config(student, teacher, compute, (64, 16, 384) if width > 32 else (32, 32, 384))


class Head(NamedTuple):
    """The projector's weight and the LayerNorm's parameters."""

    weight: Tensor  # (Ct, Cs)
    gamma: Tensor  # (Ct,)
    beta: Tensor  # (Ct,)


def loadable(
    features: Tensor, head: Head, teacher: Tensor | None
) -> tuple[Tensor, Head, Tensor | None]:
    """The same tensors, copied where their channels are not adjacent in memory."""
    adjacent = Head(*map(channels_adjacent, head))
    target = None if teacher is None else channels_adjacent(teacher)
    return channels_adjacent(features), adjacent, target


def shared_arguments(
    features: Tensor,
    head: Head,
    teacher: Tensor | None,
    width: int,
    compute: torch.dtype,
    config: Config,
) -> dict[str, Any]:
    """The arguments that the kernels share; a `width` of 0 is the mse."""
    _, tokens, channels = features.shape
    columns = width or 1
    places = triton.next_power_of_2(columns)
    image_rows = tokens // columns
    tile = min(config.rows // places, triton.next_power_of_2(image_rows))
    tile = max(tile, triton.cdiv(16, places))  # a product on the tensor cores has 16 rows or more
    return {
        "features": features,
        "teacher": teacher,
        **head._asdict(),
        "features_image": features.stride(0),
        "features_token": features.stride(1),
        "teacher_image": 0 if teacher is None else teacher.stride(0),
        "teacher_token": 0 if teacher is None else teacher.stride(1),
        "weight_stride": head.weight.stride(0),
        "tokens": tokens,
        "width": columns,
        "image_rows": image_rows,
        "tiles": triton.cdiv(image_rows, tile),
        **config.constants(channels, len(head.weight), compute),
        "HB": tile,
        "WB": places,
        "SPECTRAL": width > 0,
    }
