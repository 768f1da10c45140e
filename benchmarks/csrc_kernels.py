"""csrc's CUDA kernels, compiled ahead of time: registers, spills and blocks a multiprocessor."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .chips import chip_of
from .results import Measured

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "linalg" / "cuda.cu"
WARPS = 8
_BAND = 8  # rows, of csrc/linalg/jacobi.h
_ROWS = (64, 196, 256)
_USED = re.compile(
    r"Compiling entry function 'featkd_(spectrum|jacobi)_(float\d\d)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    flags=re.S,
)


@dataclass(frozen=True)
class Kernel:
    """One of the kernels on an architecture."""

    op: str
    """spectrum or jacobi."""
    name: str
    """float32 or float64."""
    arch: int
    registers: int
    stack: int
    """Bytes a thread."""
    spills: int
    """Bytes written and read by spills."""

    def shared(self, rows: int) -> int:
        """Bytes of scratch memory of a block."""
        size = 4 if self.name == "float32" else 8
        if self.op == "jacobi":
            return jacobi_bytes(_up(rows, 32), size)
        return scratch_bytes(rows, size)

    def blocks(self, rows: int) -> int:
        """Resident at once on a multiprocessor; 0 where the scratch is in global memory."""
        chip = chip_of(self.arch)
        if self.shared(rows) > chip.shared_bytes:
            return 0
        return chip.blocks(self.registers, WARPS, self.shared(rows))

    @property
    def broken(self) -> list[str]:
        """What docs/linalg.md rules out."""
        spilled = self.stack or self.spills
        return [f"spills: {self.stack} bytes of stack"] if spilled else []


def scratch_bytes(rows: int, size: int, groups: int = WARPS) -> int:
    """Bytes by Scratch of csrc/linalg/spectrum.h: sums, slots, largest of slab, vectors, counts.

    Args:
        size: bytes of a number.
    """
    length = _up(rows, 32)
    vectors = length * (6 + 2 * groups) + 2 * _up(groups, 8) * 8 // size
    shared = max(-(-rows // 64) * 16 * 65, vectors, 2 * length)
    numbers = _up(rows * (rows + 1) // 2, 16) + 2 * length + shared
    return 8 * _up(groups, 8) + _up(numbers, 16) * size


def jacobi_bytes(length: int, size: int, groups: int = WARPS) -> int:
    """Bytes by JacobiScratch of csrc/linalg/jacobi.h: flags, three bands of rows and of turns.

    Args:
        length: of a row, whole vectors of 32 numbers.
        size: bytes of a number.
    """
    return 4 * _up(groups, 16) + 3 * 2 * _BAND * length * size


def _up(x: int, to: int) -> int:
    return -(-x // to) * to


def compile_for(arch: int) -> list[Kernel]:
    """All of them, by nvcc.

    Raises:
        RuntimeError: there is no nvcc or no source, or nvcc fails.
    """
    if shutil.which("nvcc") is None or not SOURCE.is_file():
        raise RuntimeError("csrc: needs nvcc and a checkout with csrc/linalg/cuda.cu")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as target:
        command = ["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v"]
        done = subprocess.run(
            [*command, str(SOURCE), "-o", target.name], capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"csrc: nvcc failed:\n{done.stderr[:2000]}")
    return [
        Kernel(op, name, arch, int(registers), int(stack), int(stores) + int(loads))
        for op, name, stack, stores, loads, registers in _USED.findall(done.stderr)
    ]


def rows(kernels: Sequence[Kernel]) -> list[tuple[object, ...]]:
    """Of the table in `featkd kernels report`."""
    return [
        (
            *(f"{k.op} {k.name}", k.arch, k.registers, k.stack, k.spills),
            *(f"{k.shared(n)} ({k.blocks(n)})" for n in _ROWS),
            "; ".join(k.broken) or "ok",
        )
        for k in kernels
    ]


HEADER = (
    *("csrc kernel", "sm", "regs", "stack", "spills"),
    *(f"shared at {n} rows (blocks an SM)" for n in _ROWS),
    "",
)


def figures(kernels: Sequence[Kernel]) -> list[Measured]:
    """Every figure as (name, variant, metric, unit, value)."""
    found: list[Measured] = []
    for k in kernels:
        name, variant = f"{k.op}/{k.name}", f"sm_{k.arch}"
        found += [
            (name, variant, "registers", "count", k.registers),
            (name, variant, "stack", "bytes", k.stack),
            (name, variant, "spills", "bytes", k.spills),
            (name, variant, "broken_rules", "count", len(k.broken)),
        ]
        for n in _ROWS:
            found.append((f"{name}/{n}", variant, "shared", "bytes", k.shared(n)))
            found.append((f"{name}/{n}", variant, "blocks", "count", k.blocks(n)))
    return found
