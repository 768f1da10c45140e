"""The command that times featkd.linalg, on little work."""

from __future__ import annotations

import csv
import re

import pytest

from featkd.benchmarks import spectrum
from featkd.benchmarks.results import describe_run


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spectrum, "SHAPES", ((16, 12), (8, 8)))
    monkeypatch.setattr(spectrum, "NUMBERS_PER_CALL", 1000)
    out = tmp_path / "s.csv"
    spectrum.main(["--min-seconds", "0.001", "--out", str(out)])
    rows = list(csv.DictReader(out.open()))
    names = [(shape, variant) for shape in ("16x12", "8x8") for variant in spectrum.VARIANTS]
    assert [(row["shape"], row["variant"]) for row in rows] == names
    assert set(describe_run("cpu")) < set(rows[0])
    for row, line in zip(rows, capsys.readouterr().out.splitlines(), strict=True):
        assert float(row["q20_ms"]) <= float(row["median_ms"]) <= float(row["q80_ms"])
        (printed,) = re.findall(r"([\d.]+) ms per matrix", line)
        assert float(printed) == pytest.approx(float(row["median_ms"]), abs=1e-4)
    found = {(row["shape"], row["variant"]): row for row in rows}
    assert float(found["8x8", "featkd svdvals"]["over_svdvals"]) == 1
    assert float(found["8x8", "featkd energy_ranks"]["over_ranks"]) == 1
    assert int(found["8x8", "numpy svd"]["matrices"]) == 15


def test_a_missing_folder_is_refused_before_the_work(tmp_path, capsys):
    with pytest.raises(SystemExit):
        spectrum.main(["--out", str(tmp_path / "none" / "s.csv")])
    assert "--out: no folder" in capsys.readouterr().err
