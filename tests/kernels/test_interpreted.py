"""Kernels in float64 under Triton's interpreter: accuracy and gradcheck."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("op", ["feature_distance", "two_layer_norms", "soft_kd"])
def test_kernels_in_float64(op):
    """Runs in a separate process, because triton selects the interpreter at import."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted", op],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "passed"
