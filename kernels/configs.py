"""Launch sizes of the kernels that project rows: what compiles without a spill, by architecture.

Found by compiling ahead of time; `featkd kernels report` compiles them again and fails on a spill.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from featkd.kernels.shapes import channel_block

LARGE_TILES = (90, 100, 103)  # architectures with 227 KiB of shared memory a block


@dataclass(frozen=True)
class Config:
    """Tile sizes of a launch: places (rows) of a tile, and channels of a block."""

    rows: int
    student_block: int
    teacher_block: int
    num_warps: int = 8
    num_stages: int = 1
    hold: bool = True
    """Whether a loss tile's rows of S stay in registers from one channel block to the next."""
    group: int = 64
    """Most blocks of student channels whose dW one program adds up."""


def loss_config(
    student_width: int, teacher_width: int, compute: torch.dtype, arch: int, projected: bool = True
) -> Config:
    """Tiles of a kernel that forms the loss and dS: the most rows that compile without a spill.

    Every program reads W four times from L2, so rows are worth having. What bounds them is dS,
    rows x Cs in float32. `wgmma` and `tcgen05` read operands from shared memory and leave room
    for twice the rows. S is held only where loading it again spills: of two products in one loop
    Triton spreads the warps over rows alone, and 64 held rows were multiplied twice (counted).
    Tensor memory (sm_100) has 512 columns, which dS and a block of P share.

    Args:
        projected: whether there is a weight; without one nothing is multiplied or held.
    """
    blocks = min(64, channel_block(student_width, compute)), channel_block(teacher_width, compute)
    if compute.itemsize > 2:
        rows = 16 if projected else 32  # with fewer, a thread's loads are of 8 bytes
        return Config(rows, blocks[0], min(32, blocks[1]), hold=False)
    large = arch in LARGE_TILES
    if student_width > 384:
        return Config(32, blocks[0], min(64, blocks[1]), hold=arch in (80, 100, 103))
    if student_width > 192:
        return Config(64 if large else 32, blocks[0], min(64, blocks[1]), hold=False)
    if large:
        return Config(128, blocks[0], min(64, blocks[1]), hold=False)
    return Config(64, min(32, blocks[0]), min(32, blocks[1]), hold=False)


def gradient_config(
    student_width: int, teacher_width: int, compute: torch.dtype, arch: int
) -> Config:
    """Tiles of a kernel that forms dW: dW of a program, teacher block x group, fits registers."""
    block = min(64, channel_block(student_width, compute))
    teacher_block = channel_block(teacher_width, compute)
    if compute.itemsize > 2:
        return Config(16, block, min(32, teacher_block), group=192 // block)
    if arch in LARGE_TILES:
        return Config(64, block, min(64, teacher_block), group=192 // block)
    return Config(32, block, min(32, teacher_block), group=384 // block)


def split_count(rows: int, programs: int = 3) -> int:
    """Programs that share the rows of dW, where `programs` share its elements.

    As many as a GPU of 132 processors needs, each with at least 2,048 rows: with fewer, writing and
    reading partial sums would be more than a fifth of reading the rows (bf16, 192 -> 384). By
    default there are three channel blocks.
    """
    return max(1, min(triton.cdiv(132, programs), rows // 2048))
