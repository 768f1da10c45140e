"""The regression check: a slow-down, a fall-back and more memory fail; noise does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from featkd.benchmarks import results
from featkd.benchmarks.compare import compare
from featkd.benchmarks.results import ResultsError


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    return tmp_path / "old.csv", tmp_path / "new.csv"


def slower(factor: float, eager: float = 1.0) -> dict[str, float]:
    """Returns the changes of a row whose time grew by `factor` while eager's grew by `eager`."""
    return {
        "median_ms": 2.0 * factor,
        "q20_ms": 1.9 * factor,
        "q80_ms": 2.1 * factor,
        "speedup": 1.5 * eager / factor,
    }


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({}, ""),
        (slower(1.1), ""),  # below the tolerance
        (slower(1.3), "takes 2.6 ms, took 2 "),
        (slower(1.3) | {"load": 3.1}, "beside eager), but at a load of 3.1: measure again"),
        (slower(0.5), ""),
        (slower(1.3, eager=1.3), ""),  # a busy machine
        (slower(1.0, eager=0.5), ""),  # eager became faster
        (slower(1.3) | {"q20_ms": 2.0}, ""),  # widely spread
        ({"backend": "reference"}, "runs on the reference, ran on triton"),
        ({"peak_bytes": 1_100_000}, ""),
        ({"peak_bytes": 1_300_000}, "holds 1300000 bytes, held 1000000"),
    ],
)
def test_what_fails(files, make_row, changes, fails):
    old, new = files
    results.append(old, [make_row(), make_row(dtype="bf16")])
    results.append(new, [make_row(**changes), make_row(dtype="bf16")])
    found = compare(old, new, tolerance=0.15)
    assert len(found.changes) == 2
    assert len(found.failures) == bool(fails)
    assert fails in "".join(found.failures)
    assert compare(old, new, tolerance=0.5).failures == [
        line for line in found.failures if "reference" in line
    ]


def test_other_variants_may_become_slower(files, make_row):
    old, new = files
    results.append(old, [make_row(), make_row(variant="compile")])
    results.append(new, [make_row(), make_row(variant="compile", **slower(3.0))])
    assert not compare(old, new, 0.15).failures


def test_cases_that_are_gone_are_named(files, make_row):
    old, new = files
    results.append(old, [make_row(), make_row(dtype="bf16")])
    results.append(new, [make_row(), make_row(dtype="fp16")])
    assert compare(old, new, 0.15).missing == ("soft_kd/indices/32x1000/bf16/both",)


def test_nothing_in_common_is_no_success(files, make_row):
    old, new = files
    results.append(old, [make_row(), make_row(variant="eager", dtype="bf16")])
    results.append(new, [make_row(dtype="bf16"), make_row(variant="eager")])
    with pytest.raises(ResultsError, match="no case of the featkd variant in common"):
        compare(old, new, 0.15)
