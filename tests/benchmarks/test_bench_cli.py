"""`featkd bench` as a user meets it: one real run, what follows from its file, mistakes."""

from __future__ import annotations

import json

import pytest

from featkd.benchmarks import results
from featkd.cli import main


@pytest.mark.usefixtures("tiny")
def test_run_then_plot_table_and_compare(tmp_path, capsys):
    stored, again = tmp_path / "stored.csv", tmp_path / "again.csv"
    words = ["bench", "run", "--ops", "soft_kd", "--directions", "both"]
    words += ["--min-seconds", "0.001", "--json", str(tmp_path / "run.json")]
    assert main([*words, "--out", str(stored)]) == 0
    assert "soft_kd/soft/2x12/fp32/both" in capsys.readouterr().out
    rows = results.read(stored)
    assert [(r.form, r.variant) for r in rows] == [
        (form, v) for form in ("indices", "soft") for v in ("eager", "compile", "featkd")
    ]
    assert {r.backend for r in rows if r.variant != "featkd"} == {"torch"}
    assert all(r.rounds >= 10 and r.q20_ms <= r.median_ms <= r.q80_ms for r in rows)
    assert all(r.peak_bytes > 0 and r.roofline_share > 0 for r in rows)
    assert rows[0].speedup == 1
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["meta"]["backends"] == {r.case: r.backend for r in rows if r.variant == "featkd"}
    assert {"commit", "versions", "machine"} <= set(written["meta"])
    figures = {(r["name"], r["variant"], r["metric"]): r["value"] for r in written["rows"]}
    assert len(figures) == len(written["rows"])
    for row in rows:
        assert figures[row.case, row.variant, "peak_bytes"] == row.peak_bytes

    for command, file in (("plot", "p.svg"), ("table", None)):
        done = ["bench", command, str(stored), "--json", str(tmp_path / f"{command}.json")]
        assert main([*done, *(["--out", str(tmp_path / file)] if file else [])]) == 0
        content = json.loads((tmp_path / f"{command}.json").read_text())
        assert content["meta"]["results"] == str(stored)
        assert content["rows"]
    assert (tmp_path / "p.svg").stat().st_size > 0
    assert "| soft_kd/soft/2x12/fp32/both |" in capsys.readouterr().out

    worse = [r for r in rows if r.form == "indices"]
    slow = dict(median_ms=1e3, q20_ms=1e3, q80_ms=1e3, speedup=1e-6)
    results.append(again, [*worse[:2], type(worse[2])(**{**vars(worse[2]), **slow})])
    report = tmp_path / "compare.json"
    assert main(["bench", "compare", str(stored), str(stored)]) == 0
    capsys.readouterr()
    assert main(["bench", "compare", str(stored), str(again), "--json", str(report)]) == 1
    said = capsys.readouterr().out
    assert f"{worse[0].case}: takes 1e+03 ms" in said
    assert f"not in {again}: soft_kd/soft/2x12/fp32/both" in said
    assert "1 cases compared, 1 worse" in said
    content = json.loads(report.read_text())
    assert content["meta"]["old"]["commit"] == rows[0].commit
    flags = {r["metric"]: r["value"] for r in content["rows"]}
    assert (flags["is_slower"], flags["fell_back"]) == (1, 0)


MISTAKES = {
    "no command": (["rum"], "bench: expected one of run, plot, table, compare; got 'rum'; did you"),
    "no op": (
        ["run", "--ops", "softkd"],
        "ops: expected projected_feature_kd, widelast_projection",
    ),
    "no shapes": (["run", "--shapes", "tiny"], "shapes: expected small, published, large, all"),
    "no dtype": (["run", "--dtypes", "fp32", "fp64"], "dtypes: expected fp32, bf16, fp16; got"),
    "no direction": (["run", "--directions", "back"], "directions: expected forward, backward, bo"),
    "batches": (["run", "--batches", "many"], "batches"),
    "seconds": (["run", "--min-seconds=-1"], "--min-seconds: expected a finite number > 0, got -1"),
    "device": (["run", "--device", "tpu"], "--device: expected auto, cpu or cuda; got 'tpu'"),
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
