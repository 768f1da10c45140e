"""Every instruction of the table, in every type, and every kind of report is in some test."""

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
from ptx_emulator import isa
from ptx_emulator.parser import Instruction, parse
from ptx_emulator.reports import KINDS
from ptx_emulator.site import Scope, Site

TABLES = (cases_integers, cases_bits, cases_floats, cases_conversions)
KERNELS = (
    *(test_atomics, test_barriers, test_control, test_half_conversions),
    *(test_matrix, test_memory, test_warp),
    *(test_bulk, test_mbarrier, test_tensor_copies, test_wgmma),  # sm_90
)
# what each test module compiles and compares with an evaluation of its own
TEXTS = {m.__name__: text(m.CASES) for m in TABLES}
TEXTS |= {m.__name__: m.text() for m in KERNELS}


def instructions() -> list[Instruction]:
    functions = [f for ptx in TEXTS.values() for f in parse(ptx).functions]
    return [x for f in functions for x in f.body if isinstance(x, Instruction)]


@pytest.fixture(scope="module")
def translated() -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    for instruction in instructions():
        found.setdefault(instruction.parts[0], []).append(instruction)
    return found


def uncovered(table: dict, translated: dict[str, list[Instruction]]) -> list[str]:
    """Opcodes, and types of an opcode's forms, that no test translates."""
    missing = [opcode for opcode in table if opcode not in translated]
    for opcode, forms in table.items():
        sites = [Site(x, Scope()) for x in translated.get(opcode, ())]
        for i, form in enumerate(forms):
            if isinstance(form, isa.Form):
                # the first form that fits is the one used
                earlier = [f for f in forms[:i] if isinstance(f, isa.Form)]
                used = [s for s in sites if form.fits(s) and not any(f.fits(s) for f in earlier)]
                seen = {s.types[0] for s in used}
                needs = "".join(f".{x}" for x in sorted(form.needs))
                missing += [f"{opcode}{needs}.{x}" for x in sorted(form.types - seen)]
    return missing


def test_every_form_of_the_table_is_tested_in_every_type(translated):
    assert uncovered(isa.TABLE, translated) == []


def test_a_form_without_a_test_is_found(translated):
    form = isa.Form(isa.INTS, "{a}", isa.fs("new"))
    table = isa.TABLE | {"neg": (*isa.TABLE["neg"], form), "newer": (form,)}
    missing = uncovered(table, translated)
    assert "newer" in missing
    assert {x for x in missing if not x.startswith("newer")} == {f"neg.new.{x}" for x in isa.INTS}


def test_every_kind_has_a_planted_fault():
    planted = set().union(*(f.kinds for f in (*test_checks.TABLE, *test_mbarrier.TABLE)))
    # the first kind is the planted one, others may follow from it; a bulk copy's clean twin is
    # the case with a result that its fault was made from
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
