"""Single instructions against exact results, over values at the edges of their types."""

from __future__ import annotations

from functools import cache

import pytest

import cases_bits
import cases_conversions
import cases_floats
import cases_integers
from instruction_cases import Case, check, text
from ptx_emulator import Emulator

TABLES = {
    "integers": cases_integers.CASES,
    "bits": cases_bits.CASES,
    "floats": cases_floats.CASES,
    "conversions": cases_conversions.CASES,
}


@cache
def emulator(table: str) -> Emulator:
    return Emulator(text(TABLES[table]))


@pytest.mark.parametrize(
    ("table", "number", "case"),
    [
        pytest.param(table, i, case, id=f"{table}-{i}-{case}")
        for table, cases in TABLES.items()
        for i, case in enumerate(cases)
    ],
)
def test_instruction(table: str, number: int, case: Case):
    check(emulator(table), f"case{number}", case)
