"""Arithmetic and functions of floats and halves: ties, subnormals, infinities, NaN."""

from __future__ import annotations

import pytest

import cases_floats as cases
from instruction_cases import check, numbered, text
from ptx_emulator import Emulator


@pytest.fixture(scope="module")
def emulator():
    return Emulator(text(cases.CASES))


@pytest.mark.parametrize(("number", "case"), numbered(cases.CASES))
def test_instruction(emulator, number, case):
    check(emulator, f"case{number}", case)
