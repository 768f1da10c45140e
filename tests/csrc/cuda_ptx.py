"""Launches the CUDA kernels of csrc on the CPU: PTX by nvcc, with all checks."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report.csrc_kernels import SOURCE, WARPS, jacobi_bytes, scratch_bytes
from ptx_emulator import Emulator, Launch
from tests.spectra import THRESHOLDS

SPECTRUM: dict[type[np.floating[Any]], str] = {
    np.float32: "featkd_spectrum_float32",
    np.float64: "featkd_spectrum_float64",
}
JACOBI = "featkd_jacobi_float64"
_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float64): 1, np.dtype(np.uint16): 2}  # 2: bfloat16
_MARK = r"// featkd barrier (\d+)\n"
# index of the spectrum kernels' argument `only_resolved`; tests pass a barrier to skip in it
_ONLY_RESOLVED = 17


def compile_ptx(folder: Path) -> str:
    """Compiles all kernels with nvcc and returns their PTX."""
    target = folder / "cuda.ptx"
    command = ["nvcc", "-std=c++17", "-O3", "-ptx", "-lineinfo", "-arch=compute_80"]
    subprocess.run([*command, str(SOURCE), "-o", str(target)], check=True)
    return target.read_text()


def entry(ptx: str, kernel: str) -> str:
    """Returns the PTX without the other kernels, which is much faster to translate."""
    head, *kernels = re.split(r"^(?=\t?\.visible \.entry )", ptx, flags=re.M)
    (kept,) = (text for text in kernels if kernel in text[:100])
    tables = ptx[ptx.index("\n\t.file", len(ptx) - len(kernels[-1])) :]
    return head + kept.removesuffix(tables) + tables


def with_argument(ptx: str, kernel: str, number: int) -> str:
    """Appends a u32 argument to a kernel in PTX."""
    last = rf"(\.param \.u64 {kernel}_param_{number - 1})\n\)"
    changed, count = re.subn(last, rf"\1,\n\t.param .u32 {kernel}_param_{number}\n)", ptx)
    assert count == 1
    return changed


def with_switches(ptx: str, kernel: str, argument: int = _ONLY_RESOLVED) -> str:
    """Changes PTX so that barriers whose number is in an argument do nothing."""
    scope = (
        "{{ .reg .pred %kept; .reg .b32 %dropped;\n"
        f"ld.param.u32 %dropped, [{kernel}_param_{argument}];\n"
        "setp.ne.s32 %kept, %dropped, {number};\n"
        "@%kept bar.sync \t0; }}"
    )

    def switched(found: re.Match[str]) -> str:
        return found[1] + scope.format(number=found[2])

    return re.sub(rf"({_MARK}(?:(?!bar\.sync).)*?)bar\.sync \t0;", switched, ptx, flags=re.S)


def barriers(ptx: str) -> set[int]:
    return {int(number) for number in re.findall(_MARK, ptx)}


@dataclass
class Solved:
    """Arrays that a spectrum kernel fills, one row per matrix."""

    values: np.ndarray
    curve: np.ndarray
    ranks: np.ndarray
    info: np.ndarray
    resolved: np.ndarray
    launch: Launch


def solve(
    emulator: Emulator,
    x: np.ndarray,
    real: type[np.floating[Any]],
    *,
    blocks: int = 2,
    seed: int = 1,
    dropped: int = 0,
    in_shared: bool = True,
) -> Solved:
    """Runs a spectrum kernel with poisoned outputs.

    Args:
        x: matrices (B, N, D), also strided; bfloat16 as its bits.
        real: np.float32 or np.float64, the kernel's own type.
        dropped: number of the barrier to skip, for PTX by `with_switches`; 0 skips none.
        in_shared: puts the scratch in shared memory, otherwise in global memory.
    """
    batch, rows, columns = x.shape
    turned, n = rows > columns, min(rows, columns)
    strides = [s // x.itemsize for s in x.strides]
    values, curve = np.zeros((2, batch, n), np.float64 if x.dtype == np.float64 else np.float32)
    ranks = np.zeros((batch, len(THRESHOLDS)), np.int64)
    info, resolved = np.zeros(batch, np.int32), np.ones(batch, np.int32)
    scratch = scratch_bytes(n, np.dtype(real).itemsize)
    launch = emulator.launch(
        SPECTRUM[real],
        [
            *(x, _TYPES[x.dtype], batch, max(rows, columns), strides[0]),
            *(strides[1 + turned], strides[2 - turned], n, 0.0, values, curve),
            *(np.array(THRESHOLDS), len(THRESHOLDS), ranks, info, np.zeros(batch), resolved),
            *(dropped, scratch, None if in_shared else _workspace(scratch, blocks)),
        ],
        blocks,
        32 * WARPS,
        shared_bytes=scratch if in_shared else 0,
        outputs=[9, 10, 13, 14, 15, *([16] if dropped == 0 else [])],
        seed=seed,
    )
    return Solved(values, curve, ranks, info, resolved, launch)


def _workspace(scratch: int, blocks: int) -> np.ndarray:
    """Creates scratch in global memory."""
    return np.zeros(-(-scratch // 256) * 256 * blocks, np.uint8)


@dataclass
class Turned:
    """Results of the Jacobi kernel; rows and rotations without padding."""

    rows: np.ndarray
    turns: np.ndarray
    sweeps: np.ndarray
    launch: Launch


def jacobi(
    emulator: Emulator,
    r: np.ndarray,
    *,
    blocks: int = 2,
    seed: int = 1,
    dropped: int = 0,
    in_shared: bool = True,
) -> Turned:
    """Runs the Jacobi kernel, by `with_switches`, on matrices (B, n, n) in float64."""
    batch, n, _ = r.shape
    length = -(-n // 32) * 32
    rows = np.zeros((batch, n, length), r.dtype)
    rows[:, :, :n] = r
    turns, sweeps = np.zeros_like(rows), np.zeros(batch, np.int32)
    scratch = jacobi_bytes(length, r.itemsize)
    workspace = None if in_shared else _workspace(scratch, blocks)
    launch = emulator.launch(
        JACOBI,
        [rows, turns, sweeps, batch, n, length, scratch, workspace, dropped],
        blocks,
        32 * WARPS,
        shared_bytes=scratch if in_shared else 0,
        outputs=[1, 2],
        seed=seed,
    )
    assert dropped or not rows[:, :, n:].any()
    assert dropped or not turns[:, :, n:].any()
    return Turned(rows[:, :, :n], turns[:, :, :n], sweeps, launch)
