"""The commands that time featkd.linalg and featkd.diagnostics, on little work."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from featkd.benchmarks import diagnostics, spectrum


def figures(path: Path, meta: set[str]) -> dict[tuple[str, str, str], tuple[str, float]]:
    """(unit, value) by (name, variant, metric), each there once."""
    content = json.loads(path.read_text())
    assert set(content["meta"]) == {"time", "commit", "versions", "machine"} | meta
    found = {
        (row["name"], row["variant"], row["metric"]): (row["unit"], row["value"])
        for row in content["rows"]
    }
    assert len(found) == len(content["rows"])
    return found


def test_spectrum(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spectrum, "SHAPES", ((16, 12), (8, 8)))
    monkeypatch.setattr(spectrum, "NUMBERS_A_CALL", 1000)
    out, form = tmp_path / "s.csv", tmp_path / "s.json"
    spectrum.main(["--min-seconds", "0.001", "--out", str(out), "--json", str(form)])
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(spectrum.VARIANTS)
    found = figures(form, set())
    rows = list(csv.DictReader(out.open()))
    assert len(found) == 8 * len(rows) == 8 * 2 * len(spectrum.VARIANTS)
    for row in rows:
        unit, value = found[f"spectrum/{row['shape']}", row["variant"], "median_ms"]
        assert unit == "ms/matrix"
        assert value == pytest.approx(float(row["median_ms"]), rel=1e-5)
    assert found["spectrum/8x8", "featkd svdvals", "over_svdvals"] == ("ratio", 1)
    assert found["spectrum/8x8", "numpy svd", "matrices"] == ("count", 15)


def test_diagnostics(tmp_path, capsys):
    out, form = tmp_path / "d.csv", tmp_path / "d.json"
    words = ["--images", "3", "--min-seconds", "0.001", "--out", str(out), "--json", str(form)]
    diagnostics.main(words)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * 4 + 1
    found = figures(form, {"images"})
    assert json.loads(form.read_text())["meta"]["images"] == 3
    rows = list(csv.DictReader(out.open()))
    assert len(found) == 6 * len(rows) + 1 == 6 * 2 * 4 + 1
    for row in rows:
        for metric, unit in (("q80_ms", "ms/image"), ("numpy_over_this", "ratio")):
            known = found[f"diagnostics/{row['part']}", row["variant"], metric]
            assert known == (unit, pytest.approx(float(row[metric]), rel=1e-5))
    unit, peak = found["diagnostics", "process", "peak_bytes"]
    assert unit == "bytes"
    assert f"{peak / 2**20:.0f} MiB" in printed[-1]


@pytest.mark.parametrize("command", [spectrum, diagnostics])
def test_a_folder_that_is_not_there(command, tmp_path):
    with pytest.raises(FileNotFoundError, match="--json: no folder"):
        command.main(["--json", str(tmp_path / "none" / "f.json")])
