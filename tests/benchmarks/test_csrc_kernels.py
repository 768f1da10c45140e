"""csrc's kernels in the report, from ptxas's output."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from benchmarks.report import csrc_kernels
from benchmarks.report.csrc_kernels import Kernel

PTXAS = """
ptxas info    : Compiling entry function 'featkd_spectrum_float64' for 'sm_90'
ptxas info    : Function properties for featkd_spectrum_float64
    16 bytes stack frame, 28 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 192 registers, used 1 barriers
ptxas info    : Compiling entry function 'featkd_spectrum_float32' for 'sm_90'
ptxas info    : Function properties for featkd_spectrum_float32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
ptxas info    : Compiling entry function 'featkd_jacobi_float64' for 'sm_90'
ptxas info    : Function properties for featkd_jacobi_float64
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 126 registers, used 1 barriers
"""


def test_usage_is_read_and_a_spill_is_a_broken_rule(monkeypatch: pytest.MonkeyPatch):
    done = SimpleNamespace(returncode=0, stderr=PTXAS)
    monkeypatch.setattr(csrc_kernels.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    wide, narrow, jacobi = csrc_kernels.compile_for(90)
    assert (wide.dtype, wide.registers, wide.stack, wide.spills) == ("float64", 192, 16, 76)
    assert wide.broken == ["spills: 16 bytes of stack"]
    assert (narrow.dtype, narrow.registers, narrow.broken) == ("float32", 128, [])
    assert (jacobi.op, jacobi.dtype, jacobi.registers) == ("jacobi", "float64", 126)
    figures = {(name, metric): value for name, _, metric, _, value in wide.figures()}
    assert figures["csrc spectrum/float64", "broken_rules"] == 1
    done.returncode = 1
    with pytest.raises(RuntimeError, match="nvcc failed"):
        csrc_kernels.compile_for(90)
    monkeypatch.setattr(csrc_kernels.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="it needs nvcc"):
        csrc_kernels.compile_for(90)


def test_shared_memory_of_a_block():
    # a triangle of 196 rows, d and e2, 22 vectors of 224, 16 doubles and 8 slots
    narrow = Kernel("spectrum", "float32", 90, 128, 0, 0)
    assert narrow.shared(196) == 4 * (19312 + 2 * 224 + 22 * 224 + 32) + 64
    jacobi = Kernel("jacobi", "float64", 80, 128, 0, 0)
    assert jacobi.shared(196) == 64 + 6 * 8 * 224 * 8  # three bands and their turns
