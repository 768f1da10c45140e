"""A short demo: real digits, five models through the trainer, table and report."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from featkd.compare.pool import train, train_all
from featkd.compare.results import RunResult, spread
from featkd.demo import run_demo
from featkd.demo.digits import write_digits
from featkd.demo.report import STUDENTS
from featkd.demo.run import keep_or_clear
from featkd.runtime.environment import versions
from featkd.train.checkpoint import FORMAT, load
from featkd.train.recipe import Recipe, to_dict
from featkd.train.recipe_file import find_recipe, load_recipe
from featkd.train.trainer import Outcome
from tests.page import Page
from tests.train.runs import empty_state


def test_digits_equal_scikit_learns(tmp_path: Path):
    write_digits(tmp_path)
    files = {s: sorted((tmp_path / s).rglob("*.png")) for s in ("train", "val")}
    assert {s: len(f) for s, f in files.items()} == {"train": 1437, "val": 360}
    digits = load_digits()
    seen = set()
    for path in files["train"] + files["val"]:
        number = int(path.stem)
        seen.add(number)
        assert digits.target[number] == int(path.parent.name)
        pixels = np.asarray(Image.open(path), dtype=float) * 16 / 255
        assert np.abs(pixels - digits.images[number]).max() < 0.04
    assert len(seen) == 1797


def test_spread():
    assert spread([90.0, 94.0]) == (92.0, pytest.approx(2.8284271))
    assert spread([90.0]) == (90.0, 0.0)


class InProcessPool:
    """Process pool that runs everything in this process, to save the start of others."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> InProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., object], *arguments: object) -> Future[object]:
        future: Future[object] = Future()
        future.set_result(work(*arguments))
        return future


def write_few_digits(folder: Path) -> None:
    """Writes every eighth digit only."""
    write_digits(folder)
    for path in folder.rglob("*.png"):
        if int(path.stem) % 8:
            path.unlink()


def test_demo_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("featkd.demo.run.write_digits", write_few_digits)
    assert run_demo(tmp_path, seeds=1, epochs=1) == 0
    assert_table(capsys.readouterr().out, "1")
    states = {p.parent.name: load(p) for p in tmp_path.glob("*-seed*/last.pt")}
    assert len(states) == len(STUDENTS)
    assert {s["update"] for s in states.values()} == {2}  # equal for all runs
    for name, (arch, distilled) in STUDENTS.items():
        state = states[f"{name.replace(', ', '-').replace(' ', '-')}-seed0"]
        assert state["recipe"]["student"]["arch"] == arch
        assert (state["recipe"]["teacher"] is not None) == distilled

    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.external == []
    assert not re.search(r"url\(https?:|src=", text)
    assert page.tags.count("svg") == 2
    for name in STUDENTS:
        assert name in text
    assert 'href="diagnostics/report.html"' in text
    assert "What the student can reach" in (tmp_path / "diagnostics" / "report.html").read_text()

    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("last.pt")}
    monkeypatch.setattr("featkd.compare.pool.ProcessPoolExecutor", InProcessPool)
    monkeypatch.setattr("featkd.demo.run.compare_maps", lambda *_: 3)
    assert run_demo(tmp_path, seeds=1, epochs=1) == 3  # no run is trained again
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("last.pt")}


def assert_table(printed: str, seeds: str) -> None:
    for name in ("teacher", *STUDENTS):
        (line,) = [x for x in printed.splitlines() if x.startswith(name)]
        figures = line.removeprefix(name).split()
        assert len(figures) == 5
        assert figures[3] == ("1" if name == "teacher" else seeds)
        assert 0 <= float(figures[1]) <= 100


def test_each_student_has_a_run_per_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    seeds = []

    def train(name: str, recipe: Recipe) -> RunResult:
        seeds.append((name, recipe.seed))
        return RunResult(name, recipe.seed, 1000, 0.1, 75.0 + recipe.seed, 1.0, Path(recipe.out))

    monkeypatch.setattr("featkd.compare.pool.ProcessPoolExecutor", InProcessPool)
    monkeypatch.setattr("featkd.compare.pool.train", train)
    monkeypatch.setattr("featkd.demo.run.write_digits", lambda _: None)
    monkeypatch.setattr("featkd.demo.run.write_report", lambda out, *_: out)
    monkeypatch.setattr("featkd.demo.run.compare_maps", lambda *_: 0)
    assert run_demo(tmp_path, seeds=2) == 0
    assert_table(capsys.readouterr().out, "2")
    assert seeds == [("teacher", 0), *((name, seed) for seed in (0, 1) for name in STUDENTS)]


def test_no_progress_bar_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("featkd.compare.pool.ProcessPoolExecutor", InProcessPool)
    monkeypatch.setattr("featkd.compare.pool.train", lambda name, _: name)
    recipe = load_recipe(find_recipe("demo"))
    assert train_all({("a", 0): recipe, ("b", 0): recipe}, "training") == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_a_process_of_the_pool_starts_no_run_after_a_signal(monkeypatch: pytest.MonkeyPatch):
    started = []

    class Stopped:
        def __init__(self, *_: object) -> None:
            started.append(self)

        def run(self, **_: object) -> Outcome:
            return Outcome(4, {}, {}, 1.0, {}, interrupted_by=15)

    monkeypatch.setattr("featkd.compare.pool.Trainer", Stopped)
    monkeypatch.setattr("featkd.compare.pool._stopped", False)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train("x", Recipe())
    assert len(started) == 1


_ENDING = """
import signal, sys, threading, time
import featkd.demo

def run_demo(*_, **__):  # its end waits for a thread, as that of a process pool
    threading.Thread(target=time.sleep, args=(60,)).start()
    threading.Thread(target=report).start()
    print("running", flush=True)
    time.sleep(60)

def report():
    threading.main_thread().join()
    print("ending", flush=True)

featkd.demo.run_demo = run_demo
signal.signal(signal.SIGINT, signal.default_int_handler)
from featkd.cli.main import main
sys.exit(main(["demo"]))
"""


@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGINT, "featkd: interrupted\n"), (signal.SIGTERM, "")]
)
def test_a_second_signal_ends_the_demo_at_once(number: int, message: str):
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", _ENDING]
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as demo:
        try:
            assert demo.stdout is not None
            for state in ("running\n", "ending\n"):
                assert demo.stdout.readline() == state
                demo.send_signal(number)
            _, errors = demo.communicate(timeout=30)
        finally:
            demo.kill()
    assert demo.returncode == -number
    assert errors.endswith(message)
    assert "Traceback" not in errors


def test_runs_of_another_recipe_are_deleted(tmp_path: Path):
    recipe = load_recipe(find_recipe("demo"))
    recipe.out = str(tmp_path / "run")
    last = tmp_path / "run" / "last.pt"
    last.parent.mkdir()

    def save(**changes: object) -> None:
        state = empty_state(recipe=to_dict(recipe), versions=versions())
        state |= {"format": FORMAT, **changes}
        last.parent.mkdir(exist_ok=True)
        torch.save(state, last)

    save()
    assert keep_or_clear(recipe)
    assert last.exists()
    for wrong in ({"recipe": {}}, {"versions": {"featkd": "0.0.1"}}, {"format": 1}):
        save(**wrong)
        assert not keep_or_clear(recipe)
        assert not last.exists()
    save()
    assert not keep_or_clear(recipe, wanted=False)
    assert not last.exists()


def test_zero_seeds_raise(tmp_path: Path):
    with pytest.raises(ValueError, match="seeds: expected a whole number >= 1, got 0"):
        run_demo(tmp_path, seeds=0)


def test_curves_come_from_the_logs(tmp_path: Path):
    (tmp_path / "eval.csv").write_text(
        "update,epoch,weights,top1\n5,1,model,50.0\n5,1,ema,40.0\n9,2,model,75.0\n"
    )
    (tmp_path / "metrics.csv").write_text("update,feature_loss\n5,0.5\n9,0.25\n")
    result = RunResult("x", 0, 1, 0.1, 75.0, 1.0, tmp_path)
    assert result.curve() == [(1, 50.0), (2, 75.0)]
    assert result.feature_losses() == [(5, 0.5), (9, 0.25)]
