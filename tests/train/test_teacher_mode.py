"""The teacher's forward pass: what is left out of it, and how its mode is chosen and remembered."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from featkd.train import teacher_mode
from featkd.train.teacher_mode import Mode, TeacherForward, fastest
from featkd.train.trainer import Trainer
from tests.train.runs import CPU, column, run

SLOW, FAST, BROKEN = Mode(), Mode(channels_last=True), Mode(True, "default")


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """Three modes, of which one is fast and one does not compile; where the answer is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(teacher_mode, "modes", lambda device: [SLOW, BROKEN, FAST])
    return tmp_path / "featkd" / "teacher_modes.json"


class Clock:
    """Time that passes only where a forward pass runs."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        self.calls = 0
        monkeypatch.setattr(teacher_mode.time, "perf_counter", lambda: self.now)

    def run(self, forward: TeacherForward) -> None:
        self.calls += 1
        if forward._compiled_call_impl is not None:
            raise RuntimeError("no C++ compiler")
        self.now += 1 if forward.channels_last else 2


def forward() -> TeacherForward:
    return TeacherForward(torch.nn.Linear(1, 1), (0,), logits=False)


def test_the_fastest_mode_is_found_and_remembered(memory, monkeypatch):
    clock = Clock(monkeypatch)
    mode, how = fastest(forward(), clock.run, ["a", 1])
    assert mode == FAST
    assert "eager 2000.0 ms; eager, channels_last 1000.0 ms" in how
    assert "torch.compile (default) failed: no C++ compiler" in how
    tried = clock.calls
    mode, how = fastest(forward(), clock.run, ["a", 1])
    assert mode == FAST
    assert clock.calls == tried
    assert str(memory) in how
    fastest(forward(), clock.run, ["a", 2])  # another batch, say: another trial
    assert clock.calls == 2 * tried
    assert len(json.loads(memory.read_text())) == 2


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        "eager",
        {},
        {"mode": None},
        {"mode": {"compile": True, "channels_first": 1}},
        {"mode": {"compile_mode": "no such mode"}},
    ],
)
def test_a_damaged_memory_is_made_anew(memory, monkeypatch, entry):
    clock = Clock(monkeypatch)
    memory.parent.mkdir()
    memory.write_text('{"half')
    assert fastest(forward(), clock.run, [])[0] == FAST
    (key,) = json.loads(memory.read_text())
    memory.write_text(json.dumps({key: entry}))
    tried = clock.calls
    assert fastest(forward(), clock.run, [])[0] == FAST
    assert clock.calls == 2 * tried
    assert json.loads(memory.read_text())[key]["mode"] == asdict(FAST)


def test_an_eager_failure_is_the_models_own(memory):
    def run(forward):
        raise ValueError("images: expected 3 channels")

    with pytest.raises(ValueError, match="expected 3 channels"):
        fastest(forward(), run, [])
    assert not memory.exists()


def test_a_run_in_the_fastest_mode_has_the_same_losses(recipe, memory, monkeypatch):
    run(recipe)
    monkeypatch.setattr(teacher_mode, "modes", lambda device: [SLOW, FAST])
    other = replace(
        recipe,
        out=recipe.out + "-fastest",
        teacher=replace(recipe.teacher, inference="fastest"),
    )
    trainer = Trainer(other, CPU)
    assert any(note.startswith("teacher.inference: eager") for note in trainer.parts.notes)
    trainer.run(quiet=True)
    assert memory.exists()
    losses = [[float(x) for x in column(r, "loss")] for r in (recipe, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_without_use_for_logits_nothing_forms_them(recipe):
    """The same maps and losses, with a head that would raise."""

    def used(*_):
        raise AssertionError("the teacher's head ran")

    assert recipe.loss.feature is not None
    for alpha in (0.5, 0.0):
        trainer = Trainer(replace(recipe, loss=replace(recipe.loss, alpha=alpha)), CPU)
        batch = next(iter(trainer.parts.train_loader))
        trainer.parts.teacher.head.register_forward_hook(used)
        if alpha:
            with pytest.raises(AssertionError, match="head ran"):
                trainer.teach(batch)
        else:
            taught = trainer.teach(batch)
            assert taught.logits is None
            layers = trainer.parts.source.layers
            assert torch.equal(
                taught.maps[0], trainer.parts.teacher.forward_maps(batch.images, layers)[0]
            )
            assert trainer.losses(batch).total.isfinite()
        trainer.parts.close()
