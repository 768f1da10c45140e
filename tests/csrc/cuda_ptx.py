"""nvcc's PTX of the spectrum kernels, launched on the CPU with checks on."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featkd.benchmarks.csrc_kernels import scratch_bytes
from featkd.ptx import Emulator, Report
from tests.spectra import THRESHOLDS

SOURCE = Path(__file__).parents[2] / "csrc/cuda.cu"
KERNELS = {np.float32: "featkd_spectrum_float32", np.float64: "featkd_spectrum_float64"}
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float64): 1, np.dtype(np.uint16): 2}  # 2: bfloat16
_MARK = r"// featkd barrier (\d+)\n"


def compile_ptx(folder: Path) -> str:
    target = folder / "cuda.ptx"
    command = ["nvcc", "-std=c++17", "-O3", "-ptx", "-lineinfo", "-arch=compute_80"]
    subprocess.run([*command, str(SOURCE), "-o", str(target)], check=True)
    return target.read_text()


def entry(ptx: str, kernel: str) -> str:
    """The PTX without its other kernel: half of the time to translate."""
    starts = [m.start() for m in re.finditer(r"^\t?\.visible \.entry ", ptx, flags=re.M)]
    ends = [*starts[1:], ptx.index("\n\t.file", starts[-1])]
    kept = ptx[: starts[0]] + ptx[ends[-1] :]
    for start, end in zip(starts, ends, strict=True):
        if kernel in ptx[start : start + 100]:
            kept = ptx[: starts[0]] + ptx[start:end] + ptx[ends[-1] :]
    return kept


def with_switches(ptx: str, kernel: str) -> str:
    """The same PTX, whose barriers of the number in the argument `only_resolved` do nothing."""
    scope = (
        "{{ .reg .pred %kept; .reg .b32 %dropped;\n"
        f"ld.param.u32 %dropped, [{kernel}_param_17];\n"
        "setp.ne.s32 %kept, %dropped, {number};\n"
        "@%kept bar.sync \t0; }}"
    )

    def switched(found: re.Match[str]) -> str:
        return found[1] + scope.format(number=found[2])

    return re.sub(rf"({_MARK}(?:(?!bar\.sync).)*?)bar\.sync \t0;", switched, ptx, flags=re.S)


def barriers(ptx: str) -> set[int]:
    return {int(number) for number in re.findall(_MARK, ptx)}


@dataclass
class Found:
    values: np.ndarray
    curve: np.ndarray
    ranks: np.ndarray
    info: np.ndarray
    resolved: np.ndarray
    reports: tuple[Report, ...]


def solve(
    emulator: Emulator,
    x: np.ndarray,
    real: type,
    *,
    blocks: int = 2,
    warps: int = 8,
    seed: int = 1,
    dropped: int = 0,
    in_shared: bool = True,
) -> Found:
    """Matrices (B, N, D), also strided; bfloat16 as its bits."""
    batch, rows, columns = x.shape
    turned, n = rows > columns, min(rows, columns)
    out = np.float64 if x.dtype == np.float64 else np.float32
    strides = [s // x.itemsize for s in x.strides]
    values, curve = np.zeros((2, batch, n), out)
    ranks = np.zeros((batch, len(THRESHOLDS)), np.int64)
    info, resolved = np.zeros(batch, np.int32), np.ones(batch, np.int32)
    residual = np.zeros(batch)
    size = np.dtype(real).itemsize
    scratch = scratch_bytes(n, size, warps)
    workspace = None if in_shared else np.zeros(-(-scratch // 256) * 256 * blocks, np.uint8)
    launch = emulator.launch(
        KERNELS[real],
        [
            *(x, TYPES[x.dtype], batch, max(rows, columns), strides[0]),
            *(strides[1 + turned], strides[2 - turned], n, 0.0, values, curve),
            *(np.array(THRESHOLDS), len(THRESHOLDS), ranks, info, residual, resolved),
            *(dropped, scratch, workspace),
        ],
        blocks,
        32 * warps,
        shared_bytes=scratch if in_shared else 0,
        outputs=[9, 10, 13, 14, 15, *([16] if dropped == 0 else [])],
        seed=seed,
    )
    return Found(values, curve, ranks, info, resolved, launch.reports)
