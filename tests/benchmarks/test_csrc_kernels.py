"""What `featkd kernels report` says of csrc's kernels, from ptxas's own words."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from featkd.benchmarks import csrc_kernels
from featkd.benchmarks.csrc_kernels import Kernel

SAID = """
ptxas info    : Compiling entry function 'featkd_spectrum_float64' for 'sm_90'
ptxas info    : Function properties for featkd_spectrum_float64
    16 bytes stack frame, 28 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 192 registers, used 1 barriers
ptxas info    : Compiling entry function 'featkd_spectrum_float32' for 'sm_90'
ptxas info    : Function properties for featkd_spectrum_float32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
"""


def test_usage_is_read_and_a_spill_is_a_broken_rule(monkeypatch: pytest.MonkeyPatch):
    done = SimpleNamespace(returncode=0, stderr=SAID)
    monkeypatch.setattr(csrc_kernels.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    wide, narrow = csrc_kernels.compile_for(90)
    assert (wide.name, wide.registers, wide.stack, wide.spills) == ("float64", 192, 16, 76)
    assert wide.broken == ["spills: 16 bytes of stack"]
    assert (narrow.name, narrow.registers, narrow.broken) == ("float32", 128, [])
    done.returncode = 1
    with pytest.raises(RuntimeError, match="nvcc failed"):
        csrc_kernels.compile_for(90)
    monkeypatch.setattr(csrc_kernels.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="needs nvcc"):
        csrc_kernels.compile_for(90)


def test_blocks_a_multiprocessor():
    narrow, wide = Kernel("float32", 90, 128, 0, 0), Kernel("float64", 90, 192, 0, 0)
    # a triangle of 196 rows, d and e2, 22 vectors of 224, 16 doubles and 8 slots
    assert narrow.shared(196) == 4 * (19312 + 2 * 224 + 22 * 224 + 32) + 64
    assert narrow.blocks(196) == 2
    assert Kernel("float32", 80, 152, 0, 0).blocks(196) == 1
    assert wide.blocks(196) == 1
    assert wide.blocks(256) == 0  # 263 KB and more
    assert narrow.blocks(64) == 2  # the registers hold no third
