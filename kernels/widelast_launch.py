"""Launches of `widelast_projection.py`: what all take, and tiles by widths, dtype and chip.

The tiles are the largest that compile without spilling, as every tile reads W from L2; the table
in docs/kernels.md is theirs. What fits depends on where a chip's matrix products take their
operands and leave their sums: in registers both (sm_80 to 89, sm_120), operands in shared memory
(sm_90), or sums in a memory of their own too (sm_100).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from featkd.kernels.configs import Config, products
from featkd.kernels.shapes import channels_adjacent


class Parameters(NamedTuple):
    """The projector's and both LayerNorms'."""

    weight: Tensor  # (Ct, Cs)
    gamma_p: Tensor  # (Ct,)
    beta_p: Tensor  # (Ct,)
    gamma_1: Tensor  # (Ct,)
    beta_1: Tensor  # (Ct,)


def _config(
    student: int,
    teacher: int,
    rows: int,
    blocks: tuple[int, int],
    *,
    hold: bool = False,
    group: int = 1,
    stages: int = 2,
) -> Config:
    """`blocks` no wider than the maps need; `group` in blocks; `hold`: h stays in registers
    (forward), x or W as operands (backward)."""
    student_block, teacher_block = (
        min(block, max(16, triton.next_power_of_2(width)))
        for block, width in zip(blocks, (student, teacher), strict=True)
    )
    return Config(
        rows, student_block, teacher_block, group * student_block, hold, num_stages=stages
    )


def forward_config(student: int, teacher: int, compute: torch.dtype, arch: int) -> Config:
    """Tiles of `project_and_normalise`: h of the most rows that registers hold, else a sweep.

    h takes up to 128 of a thread's 255 registers; float32 operands and their tf32 parts take more
    of the rest. A sweep has 128 rows and reads W three times.
    """
    size, mma = compute.itemsize, products(arch) == "mma"
    if size == 8:
        return _config(student, teacher, 16, (16, 16), stages=1)
    if size == 2:
        middle, wide = ((32, 128), (32, 128)) if mma else ((64, 128), (32, 256))
        held = ((128, (64, 64), 192), (64, middle, 512), (32, wide, 1024))
        swept = _config(student, teacher, 128, (64, 64), stages=3)
    else:
        narrow = mma and arch != 80  # chips with 99 KB of shared memory
        held = ((32, (32, 64), 512), (16, (16 if narrow else 32, 128), 1024))
        swept = _config(student, teacher, 64, (32, 32))
    for rows, blocks, widest in held:
        if teacher <= widest:
            return _config(student, teacher, rows, blocks, hold=True)
    return swept


def input_config(student: int, teacher: int, compute: torch.dtype, arch: int) -> Config:
    """Tiles of `input_gradient`: dx of a tile, (rows, Cs), stays in registers."""
    size, kind = compute.itemsize, products(arch)
    if size == 8:
        return _config(student, teacher, 16, (16, 16), stages=1)
    if size == 4 and kind == "tcgen05" and student <= 384:
        # where two thread blocks might share a processor, ptxas spills for it
        return _config(student, teacher, 64, (32, 32 if student >= 192 else 16))
    if size == 4:
        rows, stages = (32, 2) if student <= 192 else (16, 3)
        block = 32 if student < 128 else 64  # 96 channels as 128 spill
        return _config(student, teacher, rows, (block, 32), stages=stages)
    if student > 384 or kind == "mma":
        rows = 64 if student <= 192 else 32 if student <= 768 else 16
        return _config(student, teacher, rows, (32 if student <= 192 else 64, 32))
    rows = 128 if student <= 192 else 64
    if kind == "wgmma":
        return _config(student, teacher, rows, (64, 32), hold=True)
    return _config(student, teacher, rows, (64, 32 if rows == 128 else 64), hold=True, stages=1)


def parameter_config(student: int, teacher: int, compute: torch.dtype, arch: int) -> Config:
    """Tiles of `parameter_gradients`: dW of a block, (teacher_block, group), stays in registers."""
    size, kind = compute.itemsize, products(arch)
    if size == 8:
        return _config(student, teacher, 16, (16, 16), group=2, stages=1)
    if size == 4:
        return _config(student, teacher, 16, (32, 32), group=4)
    if arch == 80 and 64 < student <= 192:
        return _config(student, teacher, 32, (64, 64), group=3, stages=3)
    if kind == "mma" or student > 768:
        rows = 32 if student > 32 else 64  # 32 rows of 32 channels are 8 bytes a thread
        return _config(student, teacher, rows, (64, 32), group=6)
    if kind == "wgmma":  # beside x in float32, W of a wider block fits in no shared memory
        return _config(student, teacher, 32, (64, 64), hold=student <= 384, group=6)
    rows = 64 if student <= 384 else 32
    return _config(student, teacher, rows, (64, 64), hold=True, group=6, stages=1)


def loadable(x: Tensor, parameters: Parameters, compute: torch.dtype) -> tuple[Tensor, Parameters]:
    """The same tensors, copied where their channels, or the weight's rows, are not adjacent.

    W in the products' type: every tile reads it, so a cast of its own is the cheaper one.
    """
    weight, *vectors = parameters
    adjacent = (channels_adjacent(p) for p in vectors)
    return channels_adjacent(x), Parameters(weight.to(compute).contiguous(), *adjacent)


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
        **config.constants(channels, len(parameters.weight), compute),
        "ROWS": config.rows,
        "HOLD": config.hold,
    }
