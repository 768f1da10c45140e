"""Every instruction of the table, in every type, and every kind of report has a test."""

from __future__ import annotations

import shutil
import subprocess

import pytest

import cases_bits
import cases_conversions
import cases_floats
import cases_integers
import test_atomics
import test_barriers
import test_bulk
import test_checks
import test_control
import test_half_conversions
import test_matrix
import test_mbarrier
import test_memory
import test_tensor_copies
import test_warp
import test_wgmma
from instruction_cases import text
from ptx_emulator.isa.forms import INTS, Form, names
from ptx_emulator.isa.table import TABLE
from ptx_emulator.operation import Operation, Scope
from ptx_emulator.parser import Instruction, parse
from ptx_emulator.reports import KINDS

TABLES = (cases_integers, cases_bits, cases_floats, cases_conversions)
KERNELS = (
    *(test_atomics, test_barriers, test_control, test_half_conversions),
    *(test_matrix, test_memory, test_warp),
    *(test_bulk, test_mbarrier, test_tensor_copies, test_wgmma),  # sm_90
)
# PTX of the test modules that compare results with an independent evaluation
TEXTS = {m.__name__: text(m.CASES) for m in TABLES}
TEXTS |= {m.__name__: m.text() for m in KERNELS}


@pytest.fixture(scope="module")
def translated() -> dict[str, list[Operation]]:
    """The instructions that the tests translate, by opcode."""
    found: dict[str, list[Operation]] = {}
    for function in (f for ptx in TEXTS.values() for f in parse(ptx).functions):
        for statement in function.body:
            if isinstance(statement, Instruction):
                operation = Operation(statement, Scope())
                found.setdefault(statement.parts[0], []).append(operation)
    return found


def uncovered(table: dict, translated: dict[str, list[Operation]]) -> list[str]:
    """Returns the opcodes, and the types of forms, that no test translates."""
    missing = [opcode for opcode in table if opcode not in translated]
    for opcode, forms in table.items():
        operations = translated.get(opcode, ())
        for i, form in enumerate(forms):
            if isinstance(form, Form):
                # the first form that fits is used
                earlier = [f for f in forms[:i] if isinstance(f, Form)]
                used = [
                    x for x in operations if form.fits(x) and not any(f.fits(x) for f in earlier)
                ]
                seen = {x.types[0] for x in used}
                needs = "".join(f".{x}" for x in sorted(form.needs))
                missing += [f"{opcode}{needs}.{x}" for x in sorted(form.types - seen)]
    return missing


def test_every_form_of_the_table_is_tested_in_every_type(translated):
    assert uncovered(TABLE, translated) == []


def test_a_form_without_a_test_is_found(translated):
    form = Form(INTS, "{a}", names("new"))
    table = TABLE | {"neg": (*TABLE["neg"], form), "newer": (form,)}
    missing = uncovered(table, translated)
    assert "newer" in missing
    assert {x for x in missing if not x.startswith("newer")} == {f"neg.new.{x}" for x in INTS}


def test_every_kind_has_a_planted_fault():
    planted = set().union(*(f.kinds for f in (*test_checks.TABLE, *test_mbarrier.TABLE)))
    # the first kind is the planted one, others may follow from it
    planted |= {c.kinds[0] for c in test_bulk.CASES if c.kinds}
    planted |= {kind for _, kind in test_tensor_copies.BAD_MAPS.values()}
    assert planted == set(KINDS)


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas, not found")
@pytest.mark.parametrize("name", TEXTS)
def test_the_tested_ptx_is_valid(name, tmp_path):
    (tmp_path / "k.ptx").write_text(TEXTS[name])
    command = ["ptxas", "-arch=sm_90a", "-O0", str(tmp_path / "k.ptx"), "-o", str(tmp_path / "k")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:2000]
