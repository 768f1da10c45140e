"""Shifts, fields, logic, comparisons and moves, over values at the edges of their types."""

from __future__ import annotations

import pytest

import cases_bits as cases
from instruction_cases import check, numbered, text
from ptx_emulator import Emulator


@pytest.fixture(scope="module")
def emulator():
    return Emulator(text(cases.CASES))


@pytest.mark.parametrize(("number", "case"), numbered(cases.CASES))
def test_instruction(emulator, number, case):
    check(emulator, f"case{number}", case)
