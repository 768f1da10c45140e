"""csrc's CUDA kernels, compiled ahead of time: registers, spills and shared memory."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..results import Measured

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "linalg" / "cuda.cu"
WARPS = 8
_BAND = 8  # rows of a band in csrc/linalg/jacobi.h
_ROWS = (64, 196, 256)
_USED = re.compile(
    r"Compiling entry function 'featkd_(spectrum|jacobi)_(float\d\d)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    flags=re.S,
)


@dataclass(frozen=True)
class Kernel:
    """A kernel compiled for an architecture."""

    op: str
    """Either spectrum or jacobi."""
    dtype: str
    """Either float32 or float64."""
    arch: int
    registers: int
    """Registers per thread."""
    stack: int
    """Bytes of stack per thread."""
    spills: int
    """Bytes that spills write and read."""

    @property
    def name(self) -> str:
        return f"csrc {self.op}/{self.dtype}"

    def shared(self, rows: int) -> int:
        """Returns the bytes of scratch memory per block."""
        size = 4 if self.dtype == "float32" else 8
        if self.op == "jacobi":
            return jacobi_bytes(_up(rows, 32), size)
        return scratch_bytes(rows, size)

    @property
    def broken(self) -> list[str]:
        """Rules of docs/linalg.md that the kernel breaks."""
        spilled = self.stack or self.spills
        return [f"spills: {self.stack} bytes of stack"] if spilled else []

    def figures(self) -> list[Measured]:
        """Returns the figures in the JSON form."""
        return [
            (self.name, f"sm_{self.arch}", metric, unit, value)
            for metric, unit, value in (
                ("registers", "count", self.registers),
                ("stack", "bytes", self.stack),
                ("spills", "bytes", self.spills),
                ("broken_rules", "count", len(self.broken)),
                *((f"shared at {n} rows", "bytes", self.shared(n)) for n in _ROWS),
            )
        ]


def scratch_bytes(rows: int, size: int) -> int:
    """Returns the bytes of Scratch in csrc/linalg/spectrum.h.

    It holds sums, slots, the largest of slab, vectors and counts.

    Args:
        size: bytes per number.
    """
    length = _up(rows, 32)
    vectors = length * (6 + 2 * WARPS) + 2 * _up(WARPS, 8) * 8 // size
    shared = max(-(-rows // 64) * 16 * 65, vectors, 2 * length)
    numbers = _up(rows * (rows + 1) // 2, 16) + 2 * length + shared
    return 8 * _up(WARPS, 8) + _up(numbers, 16) * size


def jacobi_bytes(length: int, size: int) -> int:
    """Returns the bytes of JacobiScratch in csrc/linalg/jacobi.h.

    It holds flags, three bands of rows and three of rotations.

    Args:
        length: numbers per row, a multiple of 32.
        size: bytes per number.
    """
    return 4 * _up(WARPS, 16) + 3 * 2 * _BAND * length * size


def _up(x: int, to: int) -> int:
    return -(-x // to) * to


def compile_for(arch: int) -> list[Kernel]:
    """Compiles all kernels with nvcc.

    Raises:
        RuntimeError: nvcc or the source is missing, or nvcc fails.
    """
    if shutil.which("nvcc") is None or not SOURCE.is_file():
        raise RuntimeError("csrc is left out: it needs nvcc and a checkout with csrc/linalg")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as target:
        command = ["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v"]
        done = subprocess.run(
            [*command, str(SOURCE), "-o", target.name], capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"csrc: nvcc failed:\n{done.stderr[:2000]}")
    return [
        Kernel(op, dtype, arch, int(registers), int(stack), int(stores) + int(loads))
        for op, dtype, stack, stores, loads, registers in _USED.findall(done.stderr)
    ]
