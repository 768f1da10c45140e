"""Random CUDA kernels, compiled by nvcc: the same bits as an evaluation in numpy."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ptx_emulator import Emulator
from random_kernels import (
    PRELUDE,
    THREADS,
    TYPES,
    Generator,
    Statement,
    assemble,
    inputs,
    one_operator,
)

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, not found")
KERNELS = 12


def draw(seed: int) -> dict[str, Statement]:
    generator = Generator(seed)
    return {f"k{i}": generator.kernel(f"k{i}") for i in range(KERNELS)}


def compiled(kernels: dict[str, Statement], folder: Path) -> str:
    (folder / "k.cu").write_text(PRELUDE + "".join(x.code for x in kernels.values()))
    command = ["nvcc", "-ptx", "-arch=compute_80", "-fmad=false", "-w", "k.cu", "-o", "k.ptx"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "k.ptx").read_text()


def differences(emulator: Emulator, name: str, kernel: Statement, seed: int) -> list[str]:
    """Returns the reports of a launch, and the wrong values that it left in memory."""
    start = inputs(seed)
    memory = [start[kind].copy() for kind in TYPES]
    launch = emulator.launch(name, memory, 1, THREADS, seed=seed % 5, time_limit=5.0)
    with np.errstate(all="ignore"):
        kernel.run(start, np.ones(THREADS, bool))
    wrong = [str(report) for report in launch.reports]
    for kind, got in zip(TYPES, memory, strict=True):
        want = start[kind]
        bits = f"u{want.itemsize}"
        same = (got.view(bits) == want.view(bits)) | ((got != got) & (want != want))
        wrong += [
            f"{kind} of thread {t}: {got[t]!r}, not {want[t]!r}" for t in np.flatnonzero(~same)
        ]
    return wrong


def test_random_kernels(tmp_path):
    """PTX_RANDOM_SEED draws others."""
    seed = int(os.environ.get("PTX_RANDOM_SEED", "1"))
    kernels = draw(seed)
    emulator = Emulator(compiled(kernels, tmp_path))
    for name, kernel in kernels.items():
        for data in (seed, seed + 1):
            wrong = differences(emulator, name, kernel, data)
            assert not wrong, "\n".join([*wrong[:5], kernel.code])


# statements, an instruction of their PTX, and its replacement
MUTATIONS = [
    (one_operator("f", "__fadd_ru"), "add.rp.f32", "add.rm.f32"),
    (one_operator("l", "shr_l"), "shr.s64", "shr.u64"),
    (one_operator("u", "max_u"), "max.u32", "max.s32"),
    (Generator(0).permutation(), "bar.sync", "// bar.sync"),
    (Generator(0).shuffle(), "shfl.sync.idx", "shfl.sync.bfly"),
]


def test_a_changed_instruction_is_detected(tmp_path):
    kernels = {f"m{i}": assemble(f"m{i}", [x]) for i, (x, _, _) in enumerate(MUTATIONS)}
    head, *entries = compiled(kernels, tmp_path).split(".visible .entry ")
    changed = []
    for i, (_, before, after) in enumerate(MUTATIONS):
        (entry,) = (x for x in entries if x.startswith(f"m{i}("))
        assert before in entry
        changed.append(f"changed_{entry.replace(before, after, 1)}")
    emulator = Emulator(".visible .entry ".join([head, *entries, *changed]))
    for name, kernel in kernels.items():
        assert differences(emulator, name, kernel, 1) == []
        assert differences(emulator, f"changed_{name}", kernel, 1) != []
