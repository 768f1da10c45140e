"""The kernels in float64 under Triton's interpreter, and slips planted in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.interpreted import MUTANTS


def interpreted(what: str) -> str:
    """The interpreter is chosen when triton is imported: a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted", what],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_gradcheck_of_the_kernels_in_float64():
    assert interpreted("gradcheck").strip() == "gradcheck passed"


def test_every_planted_slip_is_seen():
    lines = [line.split("\t") for line in interpreted("mutants").splitlines()]
    (_, clean), *planted = [(name, float(error)) for name, error in lines]
    assert clean < 1e-13
    assert len(planted) == len(MUTANTS)
    assert [name for name, error in planted if error < 1e-4] == []
