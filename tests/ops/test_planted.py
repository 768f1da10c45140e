"""Slips planted in the CPU paths, their C++ and the ops are seen by the comparisons in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.ops import planted_csrc
from tests.ops.planted import SUITES, errors, plant


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("op", SUITES)
def test_every_planted_slip_is_seen(op: str, tmp_path: Path) -> None:
    unseen = {}
    for number, (what, there, slip) in enumerate([("", "", ""), *SUITES[op].slips]):
        name = f"planted_{op}_{number}"
        plant(tmp_path, name, there, slip)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(tmp_path)
            found = 0.0  # the largest relative error
            for error in errors(op, name, patch):
                found = max(found, error)
                if what and found > 1e-4:
                    break
        for module in [m for m in sys.modules if m.startswith(name)]:
            del sys.modules[module]
        if not what:
            assert found < 1e-12
        elif found <= 1e-4:
            unseen[what] = found
    assert unseen == {}


@pytest.mark.usefixtures("one_thread")
def test_every_slip_planted_in_csrc_is_seen(tmp_path: Path) -> None:
    choose = planted_csrc.build(tmp_path)
    plant(tmp_path, planted_csrc.NAME, "", "", sweeps=planted_csrc.NAME)
    unseen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        for op, slips in planted_csrc.SLIPS.items():
            choose(0)
            assert max(errors(op, planted_csrc.NAME, patch)) < 1e-12
            for number, what in slips:
                choose(number)
                if not any(error > 1e-4 for error in errors(op, planted_csrc.NAME, patch)):
                    unseen.append((op, what))
    for module in [m for m in sys.modules if m.startswith(planted_csrc.NAME)]:
        del sys.modules[module]
    assert unseen == []
