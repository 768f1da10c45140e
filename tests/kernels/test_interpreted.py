"""The kernels in float64 under Triton's interpreter, and slips planted in them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

OPS = ("projected_feature_kd", "soft_kd", "widelast_projection", "lift_head")


def interpreted(op: str, what: str) -> str:
    """The interpreter is chosen when triton is imported: a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted", op, what],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("op", OPS)
def test_gradcheck_of_the_kernels_in_float64(op):
    assert interpreted(op, "gradcheck").strip() == "gradcheck passed"


@pytest.mark.parametrize("op", OPS)
def test_every_planted_slip_is_seen(op):
    lines = [line.split("\t") for line in interpreted(op, "mutants").splitlines()]
    (_, clean), *planted = [(name, float(error)) for name, error in lines]
    assert clean < 1e-13
    suite = importlib.import_module(f"tests.kernels.float64_{op}")
    assert [name for name, _ in planted] == [name for name, _, _ in suite.MUTANTS]
    assert [name for name, error in planted if error < 1e-4] == []
