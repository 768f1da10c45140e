"""Saves that fail: diverged weights, kills between files, full disks."""

from __future__ import annotations

import csv
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from featkd.losses import DistillationTerms
from featkd.runtime.interrupt import Interrupt
from featkd.runtime.remote import Location, locate
from featkd.train.checkpoint import CheckpointError, CheckpointStore, load
from featkd.train.logs import TRAIN_COLUMNS, RunLog, read_csv
from featkd.train.meter import TrainingDiverged
from featkd.train.trainer import Trainer
from tests.train.runs import CPU, changed, empty_state, full_disk, run, save


@pytest.mark.parametrize(
    ("first", "stopped", "message"),
    [
        (4, False, "by update 4; the last .*last.pt"),
        (4, True, "by update 4; the last .*last.pt"),
        (1, False, r"by update 1; no checkpoint was saved \("),
    ],
)
def test_a_diverged_state_is_not_saved(alone, monkeypatch, first, stopped, message):
    """NaN in an update; in the fourth, first read by the save at the epoch's end or the stop."""
    log_every = 100 if first == 4 else 1
    trainer = Trainer(changed(alone, log_every=log_every, checkpoint=dict(every_updates=2)), CPU)
    compute_loss = trainer.components.compute_loss

    def diverge(*args):
        factor = math.nan if trainer.update == first - 1 else 1.0
        return DistillationTerms(*(x * factor for x in compute_loss(*args)))

    monkeypatch.setattr(trainer.components, "compute_loss", diverge)
    monkeypatch.setattr(trainer, "apply_gradients", lambda: None)  # the weights stay finite
    signal = 15 if stopped else None
    monkeypatch.setattr(
        Interrupt, "stop_signal", lambda *_: signal if trainer.update == 4 else None
    )
    with pytest.raises(TrainingDiverged, match=f"loss is nan {message}"):
        trainer.run(quiet=True)
    last = trainer.store.last
    assert load(last)["update"] == 2 if first == 4 else not last.exists()


def test_weights_that_overflowed_are_not_saved(alone):
    """The loss of that update was finite, and the next loss is not read yet."""
    trainer = Trainer(alone, CPU)
    save(trainer)
    with torch.no_grad():
        next(trainer.components.student.parameters()).view(-1)[0] = math.inf
    trainer.update = 1
    with pytest.raises(TrainingDiverged, match=r"norm of the weights is inf by update 1; the"):
        save(trainer)
    assert load(trainer.store.last)["update"] == 0


def scored(update: int, top1: float, best: dict[str, float] | None = None) -> dict[str, Any]:
    row = {"update": update, "epoch": 1, "weights": "model", "top1": top1}
    return empty_state(update=update, best=row if best is None else best)


@pytest.fixture(params=["disk", "disk without links", "store"])
def folder(request, tmp_path, monkeypatch) -> Iterator[Location]:
    if request.param == "disk without links":

        def refuse(*_):
            raise OSError("no links here")

        monkeypatch.setattr("os.link", refuse)
    yield locate("memory://bucket") / "run" if request.param == "store" else tmp_path / "run"
    MemoryFileSystem.store.clear()


def test_a_kill_between_two_names_leaves_none_missing(folder, monkeypatch):
    """After a kill before each of the moves, best.pt is not older than last.pt."""
    store = CheckpointStore(folder, keep_every=1)
    store.folder.mkdir(parents=True)
    store.save(scored(1, 10.0), is_best=True, ended_epoch=1)
    moves = {"os.replace": os.replace, "memory": MemoryFileSystem.mv}
    left = 0

    class Killed(BaseException):
        pass

    def move(name):
        def count_down(*args, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return moves[name](*args, **options)

        return count_down

    monkeypatch.setattr("featkd.runtime.files.os.replace", move("os.replace"))
    monkeypatch.setattr(MemoryFileSystem, "mv", move("memory"))
    for done in range(3):
        left = done
        with pytest.raises(Killed):
            store.save(scored(2, 20.0), is_best=True, ended_epoch=2)
        assert load(store.last)["best"] == scored(1, 10.0)["best"]
        assert load(store.best)["update"] == (1 if done == 0 else 2)
    left = 3
    store.save(scored(2, 20.0), is_best=True, ended_epoch=2)
    for name in ("last.pt", "best.pt", "epoch-0002.pt"):
        assert load(folder / name)["update"] == 2
    assert load(folder / "epoch-0001.pt")["update"] == 1


def test_a_link_that_fails_leaves_last(folder, monkeypatch):
    store = CheckpointStore(folder, keep_every=1)
    store.folder.mkdir(parents=True)
    store.save(scored(1, 10.0), ended_epoch=1)

    monkeypatch.setattr("featkd.runtime.files.atomic_link", full_disk)
    monkeypatch.setattr(MemoryFileSystem, "copy", full_disk)
    with pytest.raises(CheckpointError, match=r"could not save .*last.pt: .*space.*unchanged"):
        store.save(scored(2, 20.0), ended_epoch=1)
    names = ("last.pt", "epoch-0001.pt")
    assert [load(folder / name)["update"] for name in names] == [1, 1]


def test_the_best_state_is_restored(folder, tmp_path):
    """In another folder, from the checkpoint or the best.pt beside it; and after a loss."""
    old = CheckpointStore(folder)
    old.folder.mkdir(parents=True)
    old.save(scored(1, 10.0), is_best=True)
    for name, last in ("same", scored(1, 10.0)), ("later", scored(2, 5.0, scored(1, 10.0)["best"])):
        old.save(last)
        for place in (tmp_path / name, locate(f"memory://other/{name}")):
            new = CheckpointStore(place)
            new.folder.mkdir(parents=True)
            assert new.restore_best(old.last, last) == last["best"]
            assert load(new.best)["update"] == 1
    for there, at_best in itertools.product((None, 7.0, 30.0), (True, False)):
        (tmp_path / "lost").mkdir(exist_ok=True)
        (tmp_path / "lost" / "best.pt").unlink(missing_ok=True)
        lost = CheckpointStore(tmp_path / "lost")
        if there is not None:
            lost.save(scored(4, there), is_best=True)
        last = scored(5, 20.0) if at_best else scored(6, 3.0, scored(5, 20.0)["best"])
        lost.save(last)
        kept = {} if there is None else scored(4, there)["best"]
        expected = last["best"] if at_best and there != 30.0 else kept
        assert lost.restore_best(lost.last, last) == expected
        assert lost.best.exists() == bool(expected)
        if expected:
            assert load(lost.best)["best"] == expected


def test_a_run_resumed_elsewhere_has_its_best(alone, tmp_path):
    first = Trainer(alone, CPU)
    first.best = {"update": 0, "epoch": 0, "weights": "model", "top1": 50.0}
    save(first, is_best=True)
    trainer = Trainer(replace(alone, out=str(tmp_path / "elsewhere")), CPU)
    trainer.folder.mkdir()
    last = first.store.last
    assert trainer._resume(str(last)) == [f"resumed from {last} after update 0 (epoch 0)"]
    assert trainer.best == first.best == load(trainer.store.best)["best"]
    first.update = 1  # the state of the best is lost below
    save(first)
    first.store.best.unlink()
    trainer = Trainer(replace(alone, out=str(tmp_path / "without")), CPU)
    messages = trainer._resume(str(last))
    assert trainer.best == {}
    assert "without/best.pt: the best score is none, not top-1 50.00 % as in" in messages[1]


NOT_NEEDED = {"pixels", "evaluation_pending"}  # absent from checkpoints of earlier versions


def test_a_checkpoint_with_any_wrong_entry_is_named_and_changes_nothing(alone, tmp_path):
    """Each entry of a run's checkpoint is removed, and replaced by values of other types."""
    run(alone)
    out = Path(alone.out)
    last = out / "last.pt"
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    state = torch.load(last)
    broken = tmp_path / "broken.pt"
    for name, value in state.items():
        if name == "format":
            continue
        replacements = [{1: {}}, torch.zeros(2, 2), "text", -1, None, [{}]]
        for wrong in replacements:
            fitting = {"model_ema": type(None), "job": (type(None), str)} | {
                "pixels": str,
                "versions": dict,
            }
            if isinstance(wrong, fitting.get(name, ())):
                continue
            torch.save({**state, name: wrong}, broken)
            with pytest.raises(CheckpointError, match=rf"broken.pt: damaged: .*entry {name}"):
                load(broken)
        torch.save({k: v for k, v in state.items() if k != name}, broken)
        if name in NOT_NEEDED:
            load(broken)
            continue
        message = rf"broken.pt: damaged: has no entry {name}; expected"
        with pytest.raises(CheckpointError, match=message):
            load(broken)
        assert value is state[name]
    torch.save({k: v for k, v in state.items() if k != "optimizer"}, last)
    before[last] = last.read_bytes()
    with pytest.raises(CheckpointError, match=r"last.pt: damaged: has no entry optimizer"):
        run(changed(alone, optim=dict(epochs=3)))
    assert before == {path: path.read_bytes() for path in out.iterdir() if path.is_file()}


def optimizer_of(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A parameter group and the state of the first parameter."""
    return state["optimizer"]["param_groups"][0], state["optimizer"]["state"][0]


BROKEN_OPTIMIZERS: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "optimizer.param_groups.0.betas: expected 2 values": lambda group, _: group.update(betas=0.9),
    "optimizer.param_groups.0: expected .* parameters": lambda group, _: group["params"].pop(),
    "optimizer has no entry state.0.exp_avg": lambda _, first: first.pop("exp_avg"),
    "optimizer.state.0.exp_avg: expected a tensor of shape": lambda _, first: first.update(
        exp_avg=torch.zeros(1)
    ),
    # last, because torch finds it in the restored optimizer
    "has no entry optimizer.param_groups.0.betas": lambda group, _: group.pop("betas"),
}


def test_an_optimizer_state_that_does_not_fit_is_named(alone, tmp_path):
    run(alone)
    broken = tmp_path / "broken.pt"
    elsewhere = Trainer(replace(alone, out=str(tmp_path / "elsewhere")), CPU)
    for message, breaks in BROKEN_OPTIMIZERS.items():
        state = torch.load(Path(alone.out) / "last.pt")
        breaks(*optimizer_of(state))
        torch.save(state, broken)
        with pytest.raises(CheckpointError, match=f"broken.pt: damaged: {message}"):
            elsewhere._resume(str(broken))


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_checkpoint_that_is_no_regular_file_is_refused(tmp_path, kind):
    path = tmp_path / "last.pt"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(CheckpointError, match=r"last.pt: not a regular file"):
        load(path)


HOLD = """\
import sys
from pathlib import Path
from featkd.runtime.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_the_same_folder_is_refused(alone):
    out = Path(alone.out)
    out.mkdir()
    hold = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        message = f"out: {out} is in use by process {other.pid} on host .*choose another folder"
        with pytest.raises(CheckpointError, match=message):
            run(alone)
        assert [path.name for path in out.iterdir()] == [".lock"]
        other.kill()
    assert run(alone).updates == 12


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", ["csv", "events"])
def test_a_disk_filled_by_the_logs_is_an_error_that_names_them(tmp_path, capsys, kind):
    """/dev/full fails every write as a full disk does."""
    log = RunLog(tmp_path, 0, 1)
    row = dict.fromkeys(TRAIN_COLUMNS, 1)
    writer = log._board._board.file_writer.event_writer._async_writer
    if kind == "csv":
        log._train._file = open("/dev/full", "w")  # noqa: SIM115
        log._train._writer = csv.DictWriter(log._train._file, TRAIN_COLUMNS)
        path = tmp_path / "metrics.csv"
    else:
        writer._writer._writer = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        path = tmp_path / "tensorboard"

    def fill() -> None:
        try:
            deadline = time.monotonic() + 10  # TensorBoard's thread raises it with a later event
            while time.monotonic() < deadline:
                log.train(row)
        finally:
            log.close()

    with pytest.raises(OSError, match=f"No space left on device: '{path}'") as raised:
        fill()
    writer._worker.join(10)  # its error reaches pytest last, which ignores it
    assert not writer._worker.is_alive()
    assert raised.value.errno == 28
    assert f"the end of the logs is missing: {raised.value}" in capsys.readouterr().err
    assert log._eval._file.closed


STRAY = {
    "a row": (b"total,1,2\n", "line 3 is 'total,1,2', expected 8 values, update a whole number"),
    "text": (b"see below\n", "line 3 is 'see below'"),
    "bytes": (b"\xff\0,,,,,,\n", "line 3 is "),
    "a field of 1 MB": (b"x" * 1_000_000 + b"\n", "line 3 is "),
}


@pytest.mark.parametrize("folder", ["disk", "store"], indirect=True)
@pytest.mark.parametrize("kind", STRAY)
def test_a_stray_row_in_a_log_is_set_aside(folder, kind):
    content, message = STRAY[kind]
    folder.mkdir(parents=True)
    log = RunLog(folder, 0, 9, quiet=True)
    for update in (1, 2, 3):
        log.train({**dict.fromkeys(TRAIN_COLUMNS, 1), "update": update})
    log.close()
    path = folder / "metrics.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    edited = b"".join([*lines[:2], content, *lines[2:]])
    if isinstance(path, Path):
        path.write_bytes(edited)
    else:
        path.replace_with(edited)
    for number in (1, 2):
        log = RunLog(folder, 2, 9, quiet=True)
        log.close()
        assert [row["update"] for row in read_csv(path)] == ["1", "2"]
        if number == 1:
            (note,) = log.notes
            assert note.startswith(f"{path}: {message}")
            assert f"kept as {path}.1.bak" in note
        else:
            assert log.notes == []  # the log has been cleaned
    assert (folder / "metrics.csv.1.bak").read_bytes() == edited


def test_a_run_goes_on_beside_a_stray_row(alone, capsys):
    run(alone)
    metrics = Path(alone.out) / "metrics.csv"
    rows = read_csv(metrics)
    with metrics.open("a") as file:
        file.write("mean,,0.5,,,,\n")
    longer = changed(alone, optim=dict(epochs=3))
    Trainer(longer, CPU).run()
    assert f"{metrics}: line 14 is 'mean,,0.5,,,,'" in capsys.readouterr().err
    assert read_csv(metrics)[: len(rows)] == rows
    assert len(read_csv(metrics)) == 18
