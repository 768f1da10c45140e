"""What csrc's CUDA kernels do for a matrix, counted on their PTX, and the time that would take."""

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

from .chips import CHIPS, Chip
from .csrc_kernels import SOURCE, WARPS, Kernel, scratch_bytes
from .results import Measured
from .table import aligned

KERNELS: dict[type[np.floating[Any]], str] = {
    np.float32: "featkd_spectrum_float32",
    np.float64: "featkd_spectrum_float64",
}
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float64): 1, np.dtype(np.uint16): 2}  # 2: bfloat16
SHAPES = ((64, 64), (196, 384))
THRESHOLDS = (0.8, 0.9, 0.95, 0.99)
_TOO_MANY_BLOCKS = 2  # a multiprocessor, where the scratch is in global memory: csrc/linalg/plan.h
# an instruction's result is there after so many clocks (CUDA C++ Programming Guide, multiprocessor
# level, "typically 4 clock cycles"), and so many warps begin one in a clock
_LATENCY = 4
_SCHEDULERS = 4


def compile_ptx(folder: Path) -> str:
    """All kernels, by nvcc.

    Raises:
        FileNotFoundError: there is no nvcc.
        subprocess.CalledProcessError: nvcc fails.
    """
    target = folder / "cuda.ptx"
    command = ["nvcc", "-std=c++17", "-O3", "-ptx", "-lineinfo", "-arch=compute_80"]
    subprocess.run([*command, str(SOURCE), "-o", str(target)], check=True)
    return target.read_text()


def entry(ptx: str, kernel: str) -> str:
    """The PTX without its other kernels: much less to translate."""
    starts = [m.start() for m in re.finditer(r"^\t?\.visible \.entry ", ptx, flags=re.M)]
    ends = [*starts[1:], ptx.index("\n\t.file", starts[-1])]
    kept = ptx[: starts[0]] + ptx[ends[-1] :]
    for start, end in zip(starts, ends, strict=True):
        if kernel in ptx[start : start + 100]:
            kept = ptx[: starts[0]] + ptx[start:end] + ptx[ends[-1] :]
    return kept


@dataclass
class Results:
    """Arrays that a launch fills, a row a matrix."""

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
    """Run a kernel on the CPU.

    Args:
        x: matrices (B, N, D), also strided; bfloat16 as its bits.
        real: np.float32 or np.float64, which the kernel computes in.
        only_resolved: the kernel's argument: whether all but marked matrices are passed over.
        in_shared: whether the scratch is in shared memory.
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
    """The float32 kernel's counters for one matrix of random numbers."""

    rows: int
    columns: int
    counters: Counters

    def operations(self, kind: str) -> int:
        """Arithmetic instructions of threads in "f32" or "f64"; a division counts as one."""
        return sum(n for name, n in self.counters.instructions.items() if name.endswith(kind))

    @property
    def instructions(self) -> float:
        """A thread's; without moves, most of which are no machine code."""
        counts = self.counters.instructions
        return (sum(counts.values()) - counts.get("move", 0)) / (32 * WARPS)

    @property
    def gram_flops(self) -> int:
        """Least of the Gram matrix, of which half is computed."""
        return self.rows * (self.rows + 1) * self.columns

    @property
    def bytes(self) -> int:
        """Of the matrix and the results."""
        return self.counters.distinct_read_bytes + self.counters.distinct_write_bytes

    def rates_ms(self, chip: Chip) -> dict[str, float]:
        """Milliseconds a matrix on a full chip, if each of its units ran at its full rate."""
        clocks = 1e6 * chip.ghz * chip.multiprocessors
        warps = self.instructions * WARPS
        return {
            "memory": self.bytes / chip.gb_per_s / 1e6,
            "fp32": 2 * self.operations("f32") / chip.fp32_tflops / 1e9,
            "fp64": 2 * self.operations("f64") / chip.fp64_tflops / 1e9,
            "shared memory": self.counters.shared_wavefronts / clocks,
            "schedulers": warps / _SCHEDULERS / clocks,
        }

    def waiting_ms(self, chip: Chip, blocks: int) -> float:
        """Milliseconds a matrix if every instruction waited for its warp's one before.

        Args:
            blocks: resident on a multiprocessor.
        """
        clocks = self.instructions * _LATENCY
        return clocks / (1e6 * chip.ghz * chip.multiprocessors * (blocks or _TOO_MANY_BLOCKS))


def count(rows: int, columns: int) -> Counted:
    """Compile the float32 kernel and run it on one matrix; about two minutes for 196x384.

    Raises:
        FileNotFoundError: there is no nvcc.
    """
    kernel = KERNELS[np.float32]
    with tempfile.TemporaryDirectory() as folder:
        emulator = Emulator(entry(compile_ptx(Path(folder)), kernel), check=False, count=True)
    x = np.random.default_rng(0).standard_normal((1, rows, columns)).astype(np.float32)
    found = launch(emulator, x, np.float32, time_limit=3600).launch
    assert found.counters is not None
    return Counted(rows, columns, found.counters)


COUNTED_HEADER = (
    *("counted: spectrum float32, one matrix", "fp32", "fp64", "bytes", "/floor"),
    *("shared passes", "conflicts", "barriers", "instructions a thread"),
)


def counted_rows(counted: Sequence[Counted]) -> list[tuple[object, ...]]:
    """Of the first table."""
    rows: list[tuple[object, ...]] = []
    for x in counted:
        c = x.counters
        rows.append(
            (
                *(f"{x.rows}x{x.columns}", x.operations("f32"), x.operations("f64"), x.bytes),
                f"{x.bytes / (4 * x.rows * x.columns):.2f}",
                *(c.shared_wavefronts, f"{c.shared_conflicts / c.shared_wavefronts:.3f}"),
                *(c.barriers, f"{x.instructions:.0f}"),
            )
        )
    return rows


MODELLED_HEADER = (
    *("modelled, not measured: ms per 1,000 matrices", "blocks an SM"),
    *("floor: memory", "floor: Gram at fp32", "every unit at its rate", "the slowest"),
    "every instruction waits",
)


def _blocks(kernels: Sequence[Kernel], chip: Chip, rows: int) -> int | None:
    """Of the float32 kernel; None where it was not compiled for the chip."""
    asked = ("spectrum", "float32", chip.arch)
    found = [k.blocks(rows) for k in kernels if (k.op, k.name, k.arch) == asked]
    return found[0] if found else None


def modelled_rows(counted: Sequence[Counted], kernels: Sequence[Kernel]) -> list[tuple[str, ...]]:
    """Of the second table: floors, a bound from below, and what little parallelism would cost."""
    rows = []
    for x in counted:
        for chip in CHIPS:
            blocks = _blocks(kernels, chip, x.rows)
            if blocks is None:
                continue
            rates = x.rates_ms(chip)
            slowest = max(rates, key=rates.__getitem__)
            gram = x.gram_flops / chip.fp32_tflops / 1e9
            times = (rates["memory"], gram, rates[slowest])
            shown = [f"{1000 * t:.3f}" for t in (*times, x.waiting_ms(chip, blocks))]
            shown.insert(3, slowest)
            rows.append((f"{x.rows}x{x.columns} {chip.name}", str(blocks), *shown))
    return rows


def tables(counted: Sequence[Counted], kernels: Sequence[Kernel]) -> str:
    """Both, as text."""
    first = aligned(COUNTED_HEADER, counted_rows(counted))
    return f"{first}\n\n{aligned(MODELLED_HEADER, modelled_rows(counted, kernels))}"


def figures(counted: Sequence[Counted], kernels: Sequence[Kernel]) -> list[Measured]:
    """Every figure as (name, variant, metric, unit, value)."""
    found: list[Measured] = []
    for x in counted:
        name, c = f"spectrum/float32/{x.rows}x{x.columns}", x.counters
        for metric, unit, number in (
            ("fp32_operations", "count", x.operations("f32")),
            ("fp64_operations", "count", x.operations("f64")),
            ("moved", "bytes", x.bytes),
            ("floor", "bytes", 4 * x.rows * x.columns),
            ("shared_wavefronts", "count", c.shared_wavefronts),
            ("bank_conflicts", "count", c.shared_conflicts),
            ("barriers", "count", c.barriers),
            ("instructions", "count", x.instructions),
        ):
            found.append((name, "sm_80 counted", metric, unit, number))
        for chip in CHIPS:
            blocks = _blocks(kernels, chip, x.rows)
            if blocks is not None:
                variant = f"{chip.name} modelled, not measured"
                for unit_name, ms in x.rates_ms(chip).items():
                    found.append((name, variant, f"time at the rate of {unit_name}", "ms", ms))
                waiting = x.waiting_ms(chip, blocks)
                found.append((name, variant, "time if every instruction waits", "ms", waiting))
    return found
