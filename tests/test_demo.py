"""A short demo: real digits, a teacher and two comparisons, report."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from featkd.compare.pool import train, train_all
from featkd.compare.results import RunResult
from featkd.demo import run_demo
from featkd.demo.digits import write_digits
from featkd.demo.run import CASES
from featkd.runtime.environment import versions
from featkd.train.checkpoint import FORMAT, load
from featkd.train.recipe import Recipe, to_dict
from featkd.train.recipe_file import find_recipe, load_recipe
from featkd.train.trainer import Outcome
from tests.forking import Server
from tests.page import read_page
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


class InProcessPool(Executor):
    """Process pool that runs everything in this process, to save the start of others."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future


def test_a_folder_of_other_epochs_is_refused_before_the_teacher_trains(tmp_path: Path):
    recipe = load_recipe(find_recipe("demo_teacher"))
    last = tmp_path / Path(recipe.out).name / "last.pt"
    last.parent.mkdir()
    state = empty_state(recipe=to_dict(recipe), versions=versions())
    torch.save({**state, "format": FORMAT}, last)
    before = last.stat().st_mtime_ns
    with pytest.raises(
        ValueError, match=f"epochs: {tmp_path} holds a demo whose teacher .*, not 2"
    ):
        run_demo(tmp_path, epochs=2)
    assert (last.stat().st_mtime_ns, [*tmp_path.iterdir()]) == (before, [last.parent])


def write_few_digits(folder: Path) -> None:
    """Writes every eighth digit only."""
    write_digits(folder)
    for path in folder.rglob("*.png"):
        if int(path.stem) % 8:
            path.unlink()


def test_demo_end_to_end(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("featkd.demo.run.write_digits", write_few_digits)
    run_demo(tmp_path, seeds=1, epochs=1)
    printed = capsys.readouterr().out
    text = read_page(tmp_path / "report.html")
    figures = [path.read_text() for path in (tmp_path / "figures").glob("*.svg")]
    assert len(figures) == text.count("<svg") == 4
    assert all(figure.startswith("<svg") and figure in text for figure in figures)
    teacher = load(tmp_path / "teacher" / "last.pt")
    assert teacher["recipe"]["student"]["options"]["embed_dim"] == 64
    runs = 0
    for name, arms in CASES.items():
        recipe = load_recipe(find_recipe(name))
        folder = tmp_path / Path(recipe.out).name
        state = json.loads((folder / "results.json").read_text())
        assert [arm["name"] for arm in state["arms"]] == arms.split(",")
        assert state["recipe"]["teacher"]["checkpoint"] == str(tmp_path / "teacher" / "last.pt")
        assert state["finding"] in printed
        assert state["finding"] in unescape(text)
        assert f"from the student's {recipe.student.options['embed_dim']}" in state["finding"]
        updates = {load(folder / run["folder"] / "last.pt")["update"] for run in state["runs"]}
        assert updates == {teacher["update"]} == {2}
        runs += len(state["runs"])
    assert runs == 9

    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("last.pt")}
    monkeypatch.setattr("featkd.compare.pool.ProcessPoolExecutor", InProcessPool)
    run_demo(tmp_path, seeds=1, epochs=1)  # no run is trained again
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("last.pt")}


def test_the_recipes_differ_in_the_student():
    teacher, first, second = (load_recipe(find_recipe(n)) for n in ("demo_teacher", *CASES))
    assert first.data == second.data == teacher.data
    assert first.teacher == second.teacher
    assert first.teacher.options == teacher.student.options
    assert second.student.options["embed_dim"] < first.student.options["embed_dim"]
    assert replace(second, student=first.student, out=first.out) == first


def test_no_progress_bar_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("featkd.compare.pool.ProcessPoolExecutor", InProcessPool)
    monkeypatch.setattr("featkd.compare.pool.train", lambda name, _: name)
    recipe = load_recipe(find_recipe("demo"))
    assert train_all({("a", 0): recipe, ("b", 0): recipe}, "training") == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_a_process_of_the_pool_starts_no_run_after_a_signal(monkeypatch: pytest.MonkeyPatch):
    trainer = Mock()
    trainer.return_value.run.return_value = Outcome(4, {}, {}, 1.0, {}, interrupted_by=15)
    monkeypatch.setattr("featkd.compare.pool.Trainer", trainer)
    monkeypatch.setattr("featkd.compare.pool._stopped", False)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train("x", Recipe())
    assert trainer.call_count == 1


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
def test_a_second_signal_ends_the_demo_at_once(number: int, message: str, server: Server):
    demo = server.start(script=_ENDING)
    for state in ("running\n", "running\nending\n"):
        demo.wait_until(lambda expected=state: demo.stdout == expected)
        demo.kill(number)
    assert demo.wait(30) == -number
    assert demo.stderr.endswith(message)
    assert "Traceback" not in demo.stderr


def test_zero_seeds_raise(tmp_path: Path):
    with pytest.raises(ValueError, match="seeds: expected a whole number >= 1, got 0"):
        run_demo(tmp_path, seeds=0)


def test_curves_come_from_the_logs(tmp_path: Path):
    (tmp_path / "eval.csv").write_text(
        "update,epoch,weights,top1\n5,1,model,50.0\n5,1,ema,40.0\n9,2,model,75.0\n"
    )
    result = RunResult("x", 0, 1, 0.1, 75.0, 1.0, tmp_path)
    assert result.curve() == [(1, 50.0), (2, 75.0)]
