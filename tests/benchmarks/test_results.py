"""The results file: rows come back; other machines and damaged files are refused."""

from __future__ import annotations

import json

import pytest

from featkd.benchmarks import results
from featkd.benchmarks.results import ResultsError


def test_rows_come_back(tmp_path, make_row):
    path = tmp_path / "r.csv"
    first, second = make_row(), make_row(variant="eager", median_ms=3.25)
    results.append(path, [first])
    results.append(path, [second])
    assert results.read(path) == [first, second]
    assert path.read_text().splitlines()[0] == ",".join(results.COLUMNS)
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_newest_row_of_a_case_counts(make_row):
    old, other, new = make_row(), make_row(dtype="bf16"), make_row(median_ms=1.0)
    assert list(results.newest([old, other, new]).values()) == [new, other]


@pytest.mark.parametrize("column", results.MACHINE)
def test_another_machine_is_refused(tmp_path, make_row, column):
    path = tmp_path / "r.csv"
    results.append(path, [make_row()])
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=f"another machine \\({column}: .* and other\\)"):
        results.append(path, [make_row(**{column: "other"})])
    assert path.read_bytes() == before


def test_damaged_files(tmp_path, make_row):
    path = tmp_path / "r.csv"
    with pytest.raises(FileNotFoundError, match="no results file"):
        results.read(path)
    results.append(path, [make_row()])
    whole = path.read_text()
    path.write_text(whole.replace(",20,", ",twenty,"))
    with pytest.raises(ResultsError, match="line 2: rounds: expected int, got 'twenty'"):
        results.read(path)
    path.write_text(whole[: whole.rindex(",")])
    with pytest.raises(ResultsError, match="line 2: roofline_share: expected float, got None"):
        results.read(path)
    path.write_text(whole.splitlines()[0] + "\n")
    with pytest.raises(ResultsError, match="expected at least one row"):
        results.read(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ResultsError, match="expected the columns time, commit"):
        results.read(path)


def test_json_form(tmp_path, make_row):
    path = tmp_path / "r.json"
    row = make_row()
    results.write_json(path, results.meta_of(row), results.measured([row]))
    content = json.loads(path.read_text())
    assert set(content) == {"meta", "rows"}
    assert content["meta"]["commit"] == row.commit
    assert content["meta"]["versions"]["torch"] == "2.14.1"
    assert content["meta"]["machine"] == row.machine
    assert {tuple(r) for r in content["rows"]} == {("name", "variant", "metric", "unit", "value")}
    median = next(r for r in content["rows"] if r["metric"] == "median_ms")
    assert median == {
        "name": "soft_kd/indices/32x1000/fp32/both",
        "variant": "featkd",
        "metric": "median_ms",
        "unit": "ms",
        "value": 2.0,
    }


def test_this_run_describes_itself():
    run = results.describe_run("cpu")
    assert set(results.COLUMNS) >= set(run)
    assert results.meta_of(run)["machine"] == results.this_machine("cpu")
    assert run["accelerator"] == "none"
