"""Checkpoints are written beside training: a slow store delays no update and no other rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from featkd.data import Batch
from featkd.losses import DistillationTerms
from featkd.runtime.interrupt import Interrupt
from featkd.train.checkpoint import CheckpointError, load
from featkd.train.logs import read_csv
from featkd.train.recipe import Recipe
from featkd.train.trainer import Trainer
from tests.forking import Server
from tests.test_ranks import succeed, wait_for
from tests.train.runs import CPU, before_update, changed, save

SECONDS = 60  # a test that waits so long fails


@pytest.fixture
def remote(alone: Recipe) -> Iterator[Recipe]:
    """A run of 12 updates behind a URL, which saves every second one."""
    yield changed(alone, out="memory://slow/run", checkpoint=dict(every_updates=2))
    MemoryFileSystem.store.clear()


def on_upload(monkeypatch: pytest.MonkeyPatch, name: str, action: Callable[[], None]) -> None:
    """Calls `action` before each upload of the file `name`."""
    upload = MemoryFileSystem.pipe_file

    def pipe_file(fs: MemoryFileSystem, path: str, *args: object, **options: object) -> None:
        if path.endswith(f"/.{name}.tmp"):
            action()
        upload(fs, path, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)


@pytest.mark.parametrize("name", ["last.pt", "metrics.csv"])
def test_training_goes_on_during_an_upload(remote, monkeypatch, name):
    """The first upload ends only after update 4, and holds the state of update 2."""
    trainer = Trainer(remote, CPU)
    passed = threading.Event()
    kept: dict[str, torch.Tensor] = {}

    def wait() -> None:
        if threading.current_thread() is not threading.main_thread():
            assert passed.wait(SECONDS)

    def step(batches: list[Batch]) -> DistillationTerms:
        terms = Trainer.step(trainer, batches)
        if trainer.update == 2:
            kept.update((n, x.clone()) for n, x in trainer.components.student.state_dict().items())
        if trainer.update == 4:
            passed.set()
            trainer._saver.wait()
            found = load(trainer.store.last)
            assert found["update"] == 2
            assert all(torch.equal(x, kept[name]) for name, x in found["model"].items())
        return terms

    monkeypatch.setattr(trainer, "step", step)
    on_upload(monkeypatch, name, wait)
    assert trainer.run(quiet=True).updates == 12
    assert load(trainer.store.last)["update"] == 12


def test_a_failed_upload_ends_the_run_by_the_next_log(remote, monkeypatch):
    trainer = Trainer(remote, CPU)
    save(trainer)

    def fail() -> None:
        raise OSError("the store is gone")

    before_update(trainer, 2, lambda: trainer._saver._thread.join())
    on_upload(monkeypatch, "last.pt", fail)
    with pytest.raises(CheckpointError, match=r"could not save .*store is gone.* is unchanged"):
        trainer.run(quiet=True)
    assert trainer.update == 3
    assert load(trainer.store.last)["update"] == 0


@pytest.mark.parametrize("fails", [False, True])
def test_an_upload_is_finished_when_an_error_ends_the_run(remote, monkeypatch, capsys, fails):
    trainer = Trainer(remote, CPU)
    ended = threading.Event()

    def wait() -> None:
        assert ended.wait(SECONDS)
        if fails:
            raise OSError("the store is gone")

    def fail() -> None:
        ended.set()
        raise RuntimeError("out of memory")

    before_update(trainer, 2, fail)
    on_upload(monkeypatch, "last.pt", wait)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        trainer.run()
    assert ("the store is gone; there is no earlier" in capsys.readouterr().err) == fails
    assert trainer.store.last.exists() != fails


def test_a_stopped_run_waits_for_its_checkpoint(remote, monkeypatch):
    trainer = Trainer(remote, CPU)
    monkeypatch.setattr(Interrupt, "stop_signal", lambda *_: 15 if trainer.update == 3 else None)
    on_upload(monkeypatch, "last.pt", lambda: time.sleep(0.3))
    assert trainer.run(quiet=True).interrupted_by == 15
    assert load(trainer.store.last)["update"] == 3


SLOW = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from featkd.cli.main import main
from featkd.train.checkpoint import CheckpointStore

timeout, seconds = map(float, sys.argv[-2:])
start, write = dist.init_process_group, CheckpointStore.save
def short(*args, **options):
    start(*args, **options, timeout=timedelta(seconds=timeout))
def slow(*args, **options):
    time.sleep(seconds)
    write(*args, **options)
dist.init_process_group, CheckpointStore.save = short, slow
sys.exit(main(sys.argv[1:-2]))
"""


def test_a_slow_store_is_no_timeout_for_other_ranks(recipe_file, server: Server, tmp_path):
    """Each save takes longer than a collective may wait; the second save waits for the first."""
    words = ("distill", recipe_file, "--out", tmp_path / "run", "--optim.epochs", 1)
    succeed(server.ranks(2, *words, "--optim.warmup_epochs", 0, 4, 5, script=SLOW))
    assert load(tmp_path / "run" / "last.pt")["update"] == 3


HALF = """
import io, sys, time
import torch
from featkd.cli.main import main

save, calls = torch.save, []
def half(state, file):
    content = io.BytesIO()
    save(state, content)
    calls.append(content.getvalue())
    if len(calls) == 1:
        file.write(calls[0])
        return
    file.write(calls[1][: len(calls[1]) // 2])
    file.flush()
    time.sleep(600)
torch.save = half
sys.exit(main(sys.argv[1:]))
"""


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(recipe_file, server, tmp_path):
    """Half of the second checkpoint is written, and two more updates are done, before the kill."""
    out = tmp_path / "run"
    words = ("distill", recipe_file, "--out", out, "--checkpoint.every_updates", 2)
    process = server.start(*words, script=HALF)
    wait_for(lambda: len(read_csv(out / "metrics.csv")) >= 6, [process])
    process.kill()
    process.wait()
    assert load(out / "last.pt")["update"] == 2
    assert len(list(out.glob(".last.pt.*.tmp"))) == 1
    assert server.call(*words).returncode == 0
    assert load(out / "last.pt")["update"] == 12
    assert not list(out.glob(".*.tmp"))
