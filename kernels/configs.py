"""Launch sizes of the kernels that project rows: what compiles without a spill, by architecture.

Found by compiling ahead of time; `featkd kernels report` compiles them again and fails on a spill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from featkd.kernels.shapes import channel_block, matmul_precision, triton_type
from featkd.reference import accumulation_dtype


@dataclass(frozen=True)
class Config:
    """Tile sizes of a launch.

    A group is the student channels whose sums one program holds in registers; there are more
    programs, which form the rest again, where the student is wider.
    """

    rows: int
    """Places of a tile."""
    student_block: int
    teacher_block: int
    """Channels of a block of the student's map and of the teacher's."""
    group: int = 0
    """Most channels of a group, 0 for all."""
    hold: bool = False
    """Whether an operand stays in registers through the tile; see the kernel."""
    num_warps: int = 8
    num_stages: int = 2

    def groups(self, student_width: int) -> int:
        """Into how many groups the student's blocks go evenly."""
        blocks = triton.cdiv(student_width, self.student_block)
        most = max(1, self.group // self.student_block) if self.group else blocks
        return next(n for n in range(1, blocks + 1) if blocks % n == 0 and blocks // n <= most)

    def constants(self, student: int, teacher: int, compute: torch.dtype) -> dict[str, Any]:
        """Compile-time arguments of all kernels that multiply by W: widths, blocks, types."""
        return {
            "CS": student,
            "CT": teacher,
            "CS_BLOCK": self.student_block,
            "CT_BLOCK": self.teacher_block,
            "COMPUTE": triton_type(compute),
            "ACC": triton_type(accumulation_dtype(compute)),
            "PRECISION": matmul_precision(compute),
        }


def products(arch: int) -> str:
    """The instruction that an architecture's matrix products are made of.

    "mma" takes operands and leaves sums in registers (sm_80 to 89, sm_120); "wgmma" can take
    operands from shared memory (sm_90), and "tcgen05" has a memory of its own for sums (sm_100 to
    119): both leave room for larger tiles.
    """
    return "wgmma" if arch == 90 else "tcgen05" if 100 <= arch < 120 else "mma"


def loss_config(
    student_width: int,
    teacher_width: int,
    compute: torch.dtype,
    arch: int,
    places: int = 1,
    projected: bool = True,
) -> Config:
    """Tiles of a kernel that forms the loss and dS: the most rows that compile without a spill.

    Every program reads W four times from L2, so rows are worth having. What bounds them is dS,
    rows x group in float32. S is held only where loading it again spills: of two products in one
    loop Triton spreads the warps over rows alone, and 64 held rows were multiplied twice (counted).
    Tensor memory (sm_100) has 512 columns, which dS and a block of P share.

    Args:
        places: of an image row, which a tile holds whole.
        projected: whether there is a weight; without one nothing is multiplied or held.
    """
    blocks = min(64, channel_block(student_width, compute)), channel_block(teacher_width, compute)
    if compute.itemsize > 2:
        rows = max(places, 16 if projected else 32)  # with fewer, a thread loads 8 bytes at once
        narrow = 32 if rows == 16 or not projected else 16
        if rows > 32 and projected:
            blocks = min(32, blocks[0]), blocks[1]
        group = (12288 if rows < 64 else 6144) // rows
        return Config(rows, blocks[0], min(narrow, blocks[1]), group, num_stages=1)
    large = products(arch) != "mma"
    most = 768 if places <= 16 else 384 if large or places == 32 else 192
    group = most if student_width <= most else min(most, 384)
    width = min(student_width, group)
    if width > 384:
        kind = products(arch)
        stages = 2 if kind == "tcgen05" else 1  # there one spills with the spectral metric
        hold = kind != "wgmma"
        return Config(32, blocks[0], min(64, blocks[1]), group, hold, num_stages=stages)
    if width > 192:
        return Config(64 if large else 32, blocks[0], min(64, blocks[1]), group, num_stages=1)
    if large:
        return Config(128, blocks[0], min(64, blocks[1]), group, num_stages=1)
    return Config(64, min(32, blocks[0]), min(32, blocks[1]), group, num_stages=1)


def gradient_config(
    student_width: int, teacher_width: int, compute: torch.dtype, arch: int, places: int = 1
) -> Config:
    """Tiles of a kernel that forms dW: dW of a program, teacher block x group, fits registers."""
    block = min(64, channel_block(student_width, compute))
    teacher_block = channel_block(teacher_width, compute)
    if compute.itemsize > 2:
        if places > 32:
            return Config(places, min(32, block), min(16, teacher_block), 64, num_stages=1)
        narrow = 32 if places <= 16 else 16
        return Config(max(16, places), block, min(narrow, teacher_block), 192, num_stages=1)
    if products(arch) != "mma":
        rows = 64 if student_width > 32 else 32  # 64 of 32 channels take all registers
        return Config(rows, block, min(64, teacher_block), 192, num_stages=1)
    narrow = 32 if places <= 32 else 16
    return Config(max(32, places), block, min(narrow, teacher_block), 384, num_stages=1)


def split_count(rows: int, programs: int = 3) -> int:
    """Programs that share the rows of dW, where `programs` share its elements.

    As many as a GPU of 132 processors needs, each with at least 2,048 rows: with fewer, writing and
    reading partial sums would be more than a fifth of reading the rows (bf16, 192 -> 384). By
    default there are three channel blocks.
    """
    return max(1, min(triton.cdiv(132, programs), rows // 2048))
