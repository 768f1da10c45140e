"""Single instructions: every form of the table, over values at the edges of their types."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import cases_bits
import cases_conversions
import cases_floats
import cases_integers
from instruction_cases import check, text

from featkd.ptx import Emulator

MODULES = {m.__name__: m for m in (cases_integers, cases_bits, cases_floats, cases_conversions)}
NUMBERED = [
    pytest.param(name, i, id=f"{name}-{i}-{c}")
    for name, module in MODULES.items()
    for i, c in enumerate(module.CASES)
]


@pytest.fixture(scope="module")
def emulators():
    return {name: Emulator(text(module.CASES)) for name, module in MODULES.items()}


@pytest.mark.parametrize(("module", "number"), NUMBERED)
def test_instruction(emulators, module, number):
    check(emulators[module], f"case{number}", MODULES[module].CASES[number])
