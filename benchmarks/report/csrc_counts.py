"""Work of csrc's spectrum kernel on one matrix, counted on its PTX, and the time it implies."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptx_emulator import Counters, Emulator, Launch

from ..results import Measured
from .chips import CHIPS, Chip
from .csrc_kernels import SOURCE, WARPS, Kernel, scratch_bytes

KERNELS: dict[type[np.floating[Any]], str] = {
    np.float32: "featkd_spectrum_float32",
    np.float64: "featkd_spectrum_float64",
}
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float64): 1, np.dtype(np.uint16): 2}  # 2: bfloat16
SHAPES = ((64, 64), (196, 384))
THRESHOLDS = (0.8, 0.9, 0.95, 0.99)
# blocks per multiprocessor if the scratch is in global memory: csrc/linalg/plan.h
_BLOCKS_IN_GLOBAL = 2
# clocks until an instruction's result is available (CUDA C++ Programming Guide, multiprocessor
# level, "typically 4 clock cycles"), and warps that start an instruction per clock
_LATENCY = 4
_SCHEDULERS = 4


def compile_ptx(folder: Path) -> str:
    """Compiles all kernels with nvcc and returns their PTX.

    Raises:
        FileNotFoundError: nvcc is missing.
        subprocess.CalledProcessError: nvcc fails.
    """
    target = folder / "cuda.ptx"
    command = ["nvcc", "-std=c++17", "-O3", "-ptx", "-lineinfo", "-arch=compute_80"]
    subprocess.run([*command, str(SOURCE), "-o", str(target)], check=True)
    return target.read_text()


def entry(ptx: str, kernel: str) -> str:
    """Returns the PTX without the other kernels, which is much faster to translate."""
    starts = [m.start() for m in re.finditer(r"^\t?\.visible \.entry ", ptx, flags=re.M)]
    ends = [*starts[1:], ptx.index("\n\t.file", starts[-1])]
    kept = ptx[: starts[0]] + ptx[ends[-1] :]
    for start, end in zip(starts, ends, strict=True):
        if kernel in ptx[start : start + 100]:
            kept = ptx[: starts[0]] + ptx[start:end] + ptx[ends[-1] :]
    return kept


@dataclass
class Results:
    """Arrays that a launch fills, one row per matrix."""

    values: np.ndarray
    curve: np.ndarray
    ranks: np.ndarray
    info: np.ndarray
    resolved: np.ndarray
    launch: Launch


def launch(
    emulator: Emulator,
    x: np.ndarray,
    real: type[np.floating[Any]],
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    blocks: int = 1,
    warps: int = WARPS,
    only_resolved: int = 0,
    in_shared: bool = True,
    **options: Any,
) -> Results:
    """Runs a kernel on the CPU.

    Args:
        x: matrices (B, N, D), also strided; bfloat16 as its bits.
        real: np.float32 or np.float64, the kernel's own type.
        only_resolved: the kernel's argument that skips all but marked matrices.
        in_shared: puts the scratch in shared memory, otherwise in global memory.
        options: further arguments of `Emulator.launch`.
    """
    batch, rows, columns = x.shape
    turned, n = rows > columns, min(rows, columns)
    strides = [s // x.itemsize for s in x.strides]
    values, curve = np.zeros((2, batch, n), np.float64 if x.dtype == np.float64 else np.float32)
    ranks = np.zeros((batch, len(thresholds)), np.int64)
    info, resolved = np.zeros(batch, np.int32), np.ones(batch, np.int32)
    scratch = scratch_bytes(n, np.dtype(real).itemsize, warps)
    workspace = None if in_shared else np.zeros(-(-scratch // 256) * 256 * blocks, np.uint8)
    done = emulator.launch(
        KERNELS[real],
        [
            *(x, TYPES[x.dtype], batch, max(rows, columns), strides[0]),
            *(strides[1 + turned], strides[2 - turned], n, 0.0, values, curve),
            *(np.array(thresholds), len(thresholds), ranks, info, np.zeros(batch), resolved),
            *(only_resolved, scratch, workspace),
        ],
        blocks,
        32 * warps,
        shared_bytes=scratch if in_shared else 0,
        **options,
    )
    return Results(values, curve, ranks, info, resolved, done)


@dataclass(frozen=True)
class Counted:
    """Counters of the float32 kernel for one matrix of random numbers."""

    rows: int
    columns: int
    counters: Counters

    @property
    def name(self) -> str:
        return f"csrc spectrum/float32/{self.rows}x{self.columns}"

    def operations(self, kind: str) -> int:
        """Returns the arithmetic instructions of all threads in "f32" or "f64".

        A division counts as one.
        """
        return sum(n for name, n in self.counters.instructions.items() if name.endswith(kind))

    @property
    def instructions(self) -> float:
        """Instructions per thread, without moves, most of which become no machine code."""
        counts = self.counters.instructions
        return (sum(counts.values()) - counts.get("move", 0)) / (32 * WARPS)

    @property
    def bytes(self) -> int:
        """Bytes of the matrix and the results."""
        return self.counters.distinct_read_bytes + self.counters.distinct_write_bytes

    def rates_ms(self, chip: Chip) -> dict[str, float]:
        """Returns milliseconds per matrix on a full chip if one unit at its full rate is the limit.

        "gram" is the least that the Gram matrix takes, of which half is computed.
        """
        clocks = 1e6 * chip.ghz * chip.multiprocessors
        return {
            "memory": self.bytes / chip.gb_per_s / 1e6,
            "gram": self.rows * (self.rows + 1) * self.columns / chip.fp32_tflops / 1e9,
            "fp32": 2 * self.operations("f32") / chip.fp32_tflops / 1e9,
            "fp64": 2 * self.operations("f64") / chip.fp64_tflops / 1e9,
            "shared memory": self.counters.shared_wavefronts / clocks,
            "schedulers": self.instructions * WARPS / _SCHEDULERS / clocks,
        }

    def waiting_ms(self, chip: Chip, blocks: int) -> float:
        """Returns milliseconds per matrix if every instruction waits for its warp's previous one.

        Args:
            blocks: blocks that a multiprocessor holds; 0 if the scratch is in global memory.
        """
        clocks = self.instructions * _LATENCY
        blocks = blocks or _BLOCKS_IN_GLOBAL
        return clocks / (1e6 * chip.ghz * chip.multiprocessors * blocks)

    def counted(self) -> list[Measured]:
        """Returns the counters in the JSON form."""
        c, floor = self.counters, 4 * self.rows * self.columns
        return [
            (self.name, "counted", metric, unit, number)
            for metric, unit, number in (
                ("fp32_operations", "count", self.operations("f32")),
                ("fp64_operations", "count", self.operations("f64")),
                ("moved", "bytes", self.bytes),
                ("over_floor", "ratio", self.bytes / floor),
                ("shared_wavefronts", "count", c.shared_wavefronts),
                ("bank_conflicts", "count", c.shared_conflicts),
                ("barriers", "count", c.barriers),
                ("instructions", "count", self.instructions),
            )
        ]

    def modelled(self, kernels: Sequence[Kernel]) -> list[Measured]:
        """Returns the modelled times on the chips for which the kernel was compiled."""
        found: list[Measured] = []
        for chip in CHIPS:
            for kernel in kernels:
                if (kernel.op, kernel.dtype, kernel.arch) == ("spectrum", "float32", chip.arch):
                    times = self.rates_ms(chip)
                    times["all wait"] = self.waiting_ms(chip, kernel.blocks(self.rows))
                    variant = f"{chip.name} modelled, not measured"
                    found += [(self.name, variant, unit, "ms", ms) for unit, ms in times.items()]
        return found


def count(rows: int, columns: int) -> Counted:
    """Compiles the float32 kernel and runs it on one matrix; takes about two minutes for 196x384.

    Raises:
        FileNotFoundError: nvcc is missing.
    """
    kernel = KERNELS[np.float32]
    with tempfile.TemporaryDirectory() as folder:
        emulator = Emulator(entry(compile_ptx(Path(folder)), kernel), check=False, count=True)
    x = np.random.default_rng(0).standard_normal((1, rows, columns)).astype(np.float32)
    found = launch(emulator, x, np.float32, time_limit=3600).launch
    assert found.counters is not None
    return Counted(rows, columns, found.counters)
