"""Launches the CUDA kernels of csrc on the CPU: PTX by nvcc, with all checks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.report import csrc_counts
from benchmarks.report.csrc_counts import Results
from benchmarks.report.csrc_kernels import WARPS, jacobi_bytes
from ptx_emulator import Emulator, Launch
from tests.spectra import THRESHOLDS

_MARK = r"// featkd barrier (\d+)\n"
# index of the spectrum kernels' argument `only_resolved`; tests pass a barrier to skip in it
ONLY_RESOLVED = 17
JACOBI = {np.float64: "featkd_jacobi_float64"}


def with_argument(ptx: str, kernel: str, number: int) -> str:
    """Appends a u32 argument to a kernel in PTX."""
    last = rf"(\.param \.u64 {kernel}_param_{number - 1})\n\)"
    changed, count = re.subn(last, rf"\1,\n\t.param .u32 {kernel}_param_{number}\n)", ptx)
    assert count == 1
    return changed


def with_switches(ptx: str, kernel: str, argument: int = ONLY_RESOLVED) -> str:
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


def solve(
    emulator: Emulator,
    x: np.ndarray,
    real: type[np.floating[Any]],
    *,
    blocks: int = 2,
    seed: int = 1,
    dropped: int = 0,
    **options: Any,
) -> Results:
    """Calls `csrc_counts.launch` with poisoned outputs.

    Args:
        dropped: number of the barrier to skip, for PTX by `with_switches`; 0 skips none.
    """
    outputs = [9, 10, 13, 14, 15, *([16] if dropped == 0 else [])]
    options |= {"outputs": outputs, "seed": seed, "blocks": blocks, "only_resolved": dropped}
    return csrc_counts.launch(emulator, x, real, THRESHOLDS, **options)


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
    """Runs the Jacobi kernel, by `with_switches`, on matrices (B, n, n)."""
    batch, n, _ = r.shape
    length = -(-n // 32) * 32
    rows = np.zeros((batch, n, length), r.dtype)
    rows[:, :, :n] = r
    turns, sweeps = np.zeros_like(rows), np.zeros(batch, np.int32)
    scratch = jacobi_bytes(length, r.itemsize)
    workspace = None if in_shared else np.zeros(-(-scratch // 256) * 256 * blocks, np.uint8)
    done = emulator.launch(
        JACOBI[r.dtype.type],
        [rows, turns, sweeps, batch, n, length, scratch, workspace, dropped],
        blocks,
        32 * WARPS,
        shared_bytes=scratch if in_shared else 0,
        outputs=[1, 2],
        seed=seed,
    )
    assert dropped or not rows[:, :, n:].any()
    assert dropped or not turns[:, :, n:].any()
    return Turned(rows[:, :, :n], turns[:, :, :n], sweeps, done)
