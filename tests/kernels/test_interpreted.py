"""Kernels in float64 under Triton's interpreter: accuracy and gradcheck."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_in_float64():
    """Runs in a separate process, because triton selects the interpreter at import."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["lift_head", "widelast_projection", "soft_kd"]
