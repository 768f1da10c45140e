"""`featkd bench` as a user meets it: one real run, what follows from its file, mistakes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from featkd.benchmarks import results
from featkd.cli.main import main


@pytest.fixture
def ran(tiny, tmp_path, capsys):
    """The file of one real run, its JSON, and its rows."""
    stored, report = tmp_path / "stored.csv", tmp_path / "run.json"
    words = ["bench", "run", "--ops", "widelast_projection", "--directions", "both"]
    words += ["--min-seconds", "0.001", "--json", str(report), "--out", str(stored)]
    assert main(words) == 0
    assert "widelast_projection/two-norms/2x8x6to10/fp32/both" in capsys.readouterr().out
    return stored, json.loads(report.read_text()), results.read(stored)


def test_run_then_plot_table_and_compare(ran, tmp_path, capsys):
    stored, written, rows = ran
    assert [row.variant for row in rows] == ["eager", "compile", "reference", "featkd"]
    assert [row.backend for row in rows[:2]] == ["torch", "torch"]
    assert all(r.rounds >= 10 and r.q20_ms <= r.median_ms <= r.q80_ms for r in rows)
    assert all(r.peak_bytes > 0 and r.roofline_share > 0 and r.error < 1e-5 for r in rows)
    assert rows[0].speedup == 1
    assert written["meta"]["backends"] == {rows[3].case: rows[3].backend}
    assert {"commit", "versions", "machine"} <= set(written["meta"])
    figures = {(r["name"], r["variant"], r["metric"]): r["value"] for r in written["rows"]}
    assert len(figures) == len(written["rows"])
    for row in rows:
        assert figures[row.case, row.variant, "peak_bytes"] == row.peak_bytes

    for command, out in (("plot", ["--out", str(tmp_path / "p.svg")]), ("table", [])):
        report = tmp_path / f"{command}.json"
        assert main(["bench", command, str(stored), *out, "--json", str(report)]) == 0
        content = json.loads(report.read_text())
        assert content["meta"]["results"] == str(stored)
        assert content["rows"]
    assert (tmp_path / "p.svg").stat().st_size > 0
    assert f"| {rows[0].case} |" in capsys.readouterr().out

    assert main(["bench", "compare", str(stored), str(stored)]) == 0
    again, report = tmp_path / "again.csv", tmp_path / "compare.json"
    results.append(stored, [replace(rows[3], form="gone")])
    slow = replace(rows[3], median_ms=1e3, q20_ms=1e3, q80_ms=1e3, speedup=1e-6)
    results.append(again, [*rows[:3], slow])
    capsys.readouterr()
    assert main(["bench", "compare", str(stored), str(again), "--json", str(report)]) == 1
    said = capsys.readouterr().out
    assert f"{rows[0].case}: takes 1e+03 ms" in said
    assert f"not in {again}: widelast_projection/gone/2x8x6to10/fp32/both" in said
    assert "1 cases compared, 1 worse" in said
    content = json.loads(report.read_text())
    assert content["meta"]["old"]["commit"] == rows[0].commit
    flags = {r["metric"]: r["value"] for r in content["rows"]}
    assert (flags["is_slower"], flags["fell_back"]) == (1, 0)


def test_a_wrong_variant_ends_the_run(tiny, monkeypatch, capsys):
    monkeypatch.setattr("featkd.benchmarks.soft_kd.soft_kd", lambda *_, **__: torch.ones(()))
    monkeypatch.setattr("featkd.benchmarks.variants.VARIANTS", ("eager", "featkd"))
    assert main(["bench", "run", "--ops", "soft_kd", "--directions", "forward"]) == 1
    assert "featkd differs from eager in output 0" in capsys.readouterr().err


MISTAKES = {
    "no command": (
        ["rum"],
        "bench: expected one of run, plot, table, compare, loader, step; got",
    ),
    "no op": (
        ["run", "--ops", "softkd"],
        "ops: expected projected_feature_kd, widelast_projection, lift_head, soft_kd, "
        "talking_heads_attention; got 'softkd'; did you mean 'soft_kd'?",
    ),
    "no shapes": (
        ["run", "--shapes", "tiny"],
        "shapes: expected small, published, large, grids, all",
    ),
    "no dtype": (
        ["run", "--dtypes", "fp32", "fp64"],
        "dtypes: expected fp32, bf16, fp16, autocast-bf16, autocast-fp16; got",
    ),
    "no direction": (["run", "--directions", "back"], "directions: expected forward, backward, bo"),
    "batch sizes": (["run", "--batch-sizes", "many"], "--batch-sizes: expected a whole number"),
    "no batch": (["run", "--batch-sizes", "7"], "the chosen problems have 1, 4 images; got 7"),
    "seconds": (["run", "--min-seconds=-1"], "--min-seconds: expected a finite number > 0, got -1"),
    "device": (["run", "--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N; got 'tpu'"),
    "ending": (["run", "--out", "x.txt"], "--out: expected a name that ends in .csv, got x.txt"),
    "folder": (["run", "--json", "/no/such/x.json"], "--json: no folder /no/such to write"),
    "option": (["run", "--opps", "soft_kd"], "opps"),
    "no file": (["plot", "/no/such.csv", "--out", "x.svg"], "no results file /no/such.csv"),
    "no picture": (
        ["plot", "OTHER", "--out", "x.pdf"],
        "out: expected a name that ends in .svg or",
    ),
    "no out": (["plot", "OTHER"], "out"),
    "machine": (["run", "--out", "OTHER"], "holds results of another machine (processor: "),
    "machines": (["compare", "OTHER", "THIRD"], "results of different machines (cores: 2 and 8)"),
    "tolerance": (["compare", "OTHER", "OTHER", "--tolerance", "0"], "--tolerance: expected a"),
    "document": (["table", "OTHER", "--out", "none.md"], "no document none.md"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_clear_message(mistake, tmp_path, make_row, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results.append(tmp_path / "OTHER.csv", [make_row()])
    results.append(tmp_path / "THIRD.csv", [make_row(cores="8")])
    words, message = MISTAKES[mistake]
    words = [f"{word}.csv" if word in ("OTHER", "THIRD") else word for word in words]
    assert main(["bench", *words]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_help(capsys):
    assert main(["bench", "--help"]) == 0
    assert main(["bench"]) == 2
    assert "compare" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["bench", "run", "--help"])
    assert stop.value.code == 0
    assert "--min-seconds" in capsys.readouterr().out
