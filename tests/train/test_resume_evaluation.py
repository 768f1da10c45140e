"""Interrupted evaluations are repeated on resume; the run ends as an unbroken one."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from featkd.data import BadImageError
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.files import atomic_write
from featkd.runtime.remote import Location, locate
from featkd.train import trainer
from featkd.train.checkpoint import CheckpointError, CheckpointStore, load
from featkd.train.logs import RunLog, read_csv
from featkd.train.recipe import Recipe
from featkd.train.trainer import Trainer
from tests.train.runs import CPU, changed, copy_images, run, save


class Killed(BaseException):
    pass


@pytest.fixture
def four_epochs(alone: Recipe) -> Recipe:
    """Two updates each; evaluated after epochs 2 and 4, whose states are kept."""
    return changed(
        alone, batch_size=24, checkpoint=dict(every_epochs=2, keep_every=2), optim=dict(epochs=4)
    )


@pytest.fixture(scope="module")
def _kept() -> dict[str, Path]:
    return {}


@pytest.fixture
def unbroken(four_epochs: Recipe, tmp_path: Path, _kept: dict[str, Path]) -> Path:
    """Folder of that run without interruption (made once)."""
    if "out" not in _kept:
        run(replace(four_epochs, out=str(tmp_path / "unbroken")))
        _kept["out"] = tmp_path / "unbroken"
    return _kept["out"]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_ended_alike(folder: Location, unbroken: Path) -> None:
    assert (folder / "eval.csv").read_bytes() == (unbroken / "eval.csv").read_bytes()
    rows = [read_csv(place / "metrics.csv") for place in (folder, unbroken)]
    for row in (*rows[0], *rows[1]):
        row.pop("images_per_s")
    assert rows[0] == rows[1]
    names = sorted(path.name for path in unbroken.glob("*.pt"))
    assert names == ["best.pt", "epoch-0002.pt", "epoch-0004.pt", "last.pt"]
    for name in names:
        states = [load(place / name) for place in (folder, unbroken)]
        for state in states:
            del state["recipe"]["out"], state["recipe"]["data"]["path"]
        assert same(*states), name
        assert not states[0]["evaluation_pending"]


def finish_saving() -> None:
    """Waits for the checkpoint from before the evaluation."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def die_at(monkeypatch: pytest.MonkeyPatch, moment: str, epoch: int) -> None:
    """Kills the next run at a moment of the evaluation after `epoch`."""
    validate, evaluation, save = trainer.validate, RunLog.evaluation, CheckpointStore.save
    done = 0

    def score(*args: Any) -> Mapping[str, Any]:
        nonlocal done
        done += 2
        if moment == "scores" and done == epoch:
            finish_saving()
            raise Killed
        return validate(*args)

    def write(self: RunLog, row: Mapping[str, Any]) -> None:
        if moment == "second row" and (row["epoch"], row["weights"]) == (epoch, "ema"):
            finish_saving()
            raise Killed
        evaluation(self, row)

    def keep(self: CheckpointStore, state: dict[str, Any], **options: Any) -> None:
        scored = state["epoch"] == epoch and not state["evaluation_pending"]
        if scored and moment == "second save":
            raise Killed
        before = self.last.read_bytes() if scored else b""
        save(self, state, **options)
        if scored and moment == "last name":  # best.pt and epoch-n.pt are written before
            with atomic_write(self.last) as file:
                file.write(before)
            raise Killed

    monkeypatch.setattr(trainer, "validate", score)
    monkeypatch.setattr(RunLog, "evaluation", write)
    monkeypatch.setattr(CheckpointStore, "save", keep)
    monkeypatch.setattr(RunLog, "close", lambda *_, **__: None)  # nothing runs after a kill


@pytest.mark.parametrize(
    ("place", "epoch", "moment"),
    [
        ("disk", 2, "scores"),
        ("disk", 2, "second row"),
        ("disk", 2, "last name"),
        ("disk", 4, "scores"),
        ("disk", 4, "second save"),
        ("disk", 4, "last name"),
        ("store", 2, "second save"),
        ("store", 4, "second row"),
    ],
)
def test_a_kill_in_an_evaluation_costs_no_update(
    four_epochs, unbroken, monkeypatch, place, epoch, moment
):
    broken = replace(four_epochs, out="memory://bucket/run") if place == "store" else four_epochs
    with monkeypatch.context() as patch:
        die_at(patch, moment, epoch)
        with pytest.raises(Killed):
            run(broken)
    out = locate(broken.out)
    state = load(out / "last.pt")
    assert (state["update"], state["epoch"], state["evaluation_pending"]) == (
        2 * epoch,
        epoch,
        True,
    )
    run(broken)
    assert_ended_alike(out, unbroken)
    MemoryFileSystem.store.clear()


def test_a_broken_validation_image_costs_no_update(four_epochs, unbroken, tmp_path, monkeypatch):
    """Every restart fails at once, without training, until the image is repaired."""
    recipe = copy_images(four_epochs, tmp_path / "images")
    path = tmp_path / "images" / "val" / "green" / "2.png"
    content = path.read_bytes()
    path.write_bytes(b"no picture")
    steps = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda *args: steps.append(0) or step(*args))
    for _ in range(2):
        with pytest.raises(BadImageError, match=r"green/2.png"):
            run(recipe)
        assert len(steps) == 4
    path.write_bytes(content)
    run(recipe)
    assert len(steps) == 8
    assert_ended_alike(Path(recipe.out), unbroken)


def test_processes_that_disagree_on_a_pending_evaluation_are_stopped(alone, monkeypatch):
    """One process reads the state before the evaluation, the other the state after it."""
    trainer = Trainer(alone, CPU)
    trainer.evaluation_pending = True
    save(trainer)
    last = trainer.store.last
    state = torch.load(last)
    state["due"] = state.pop("evaluation_pending")  # as earlier versions named it
    torch.save(state, last)
    theirs = {"1": f"{last} after update 0 (epoch 0, batch 0)"}
    monkeypatch.setattr(ProcessContext, "merge_dicts", lambda _, facts: facts | theirs)
    with pytest.raises(CheckpointError, match=r"batch 0\), to be evaluated \(process 0\); .*"):
        Trainer(alone, CPU)._resume("auto")
