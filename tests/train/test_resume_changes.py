"""Resuming with another recipe, or from files that differ between processes."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from featkd.runtime.distributed import ProcessContext
from featkd.train.checkpoint import CheckpointError
from featkd.train.logs import RunLog
from featkd.train.recipe import Recipe
from featkd.train.trainer import Trainer
from tests.train.runs import CPU, run


def saved(recipe: Recipe) -> Trainer:
    """Runs one update and saves."""
    trainer = Trainer(recipe, CPU)
    trainer.components.student.train()
    trainer.step([next(iter(trainer.components.train_loader))])
    trainer.store.prepare()
    trainer._save(RunLog(None, 0, 0))
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
def test_another_weight_decay_and_eps_are_used(alone, optimizer):
    optim = replace(alone.optim, optimizer=optimizer)
    before = saved(replace(alone, optim=optim)).components.optimizer.param_groups
    assert [group["weight_decay"] for group in before] == [0.0, 0.05]
    other = replace(alone, optim=replace(optim, weight_decay=0.2, eps=1e-6))
    trainer = Trainer(other, CPU)
    trainer._resume("auto")
    groups = trainer.components.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.2]
    assert {group.get("eps") for group in groups} == {1e-6 if optimizer == "adamw" else None}
    assert trainer.components.optimizer.state  # restored


@pytest.mark.parametrize(("before", "after"), [("bf16", "fp16"), ("fp16", "off"), ("fp16", "fp16")])
def test_another_precision(alone, before, after):
    scaler = saved(replace(alone, amp=before)).components.scaler
    trainer = Trainer(replace(alone, amp=after), CPU)
    fresh = trainer.components.scaler.state_dict()
    trainer._resume("auto")
    assert trainer.components.scaler.is_enabled() == (after == "fp16")
    if before == after:  # halved by an overflow, or with a growth count
        assert trainer.components.scaler.state_dict() == scaler.state_dict()
        assert scaler.state_dict() != fresh
    trainer.components.student.train()
    assert trainer.step([next(iter(trainer.components.train_loader))]).total.isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "sgd"}, r"last.pt: optim.optimizer: 'adamw' -> 'sgd': .*expected 'adamw'"),
        ({"optimizer": "lion"}, r"last.pt: optim.optimizer: 'adamw' -> 'lion'"),
        ({"weight_decay": 0.0}, r"last.pt: optim.weight_decay: 0.05 -> 0: .* more than 0"),
    ],
)
def test_an_optimizer_that_the_state_does_not_fit_is_refused(alone, change, message):
    saved(alone)
    with pytest.raises(CheckpointError, match=message):
        Trainer(replace(alone, optim=replace(alone.optim, **change)), CPU)._resume("auto")


def test_another_number_of_images_is_noted_between_epochs_and_refused_within(
    alone, images, tmp_path
):
    fewer = tmp_path / "fewer"
    shutil.copytree(images, fewer)
    for number in range(8):
        (fewer / "train" / "red" / f"{number}.png").unlink()
    run(replace(alone, optim=replace(alone.optim, epochs=1, warmup_epochs=0)))
    there = replace(alone, data=replace(alone.data, path=str(fewer)))
    note = "training images: 48 -> 40 (5 updates per epoch)"
    assert note in Trainer(there, CPU)._resume("auto")[1]
    assert "training images" not in Trainer(alone, CPU)._resume("auto")[1]
    saved(alone)
    with pytest.raises(CheckpointError, match=r"last.pt: num_images: 48 when .*, now 40"):
        Trainer(there, CPU)._resume("auto")


def test_processes_that_read_different_files_are_stopped(alone, monkeypatch):
    """All of three processes raise an error that lists the positions."""
    others: dict[str, str] = {}
    monkeypatch.setattr(ProcessContext, "merge_dicts", lambda _, facts: facts | others)
    last = saved(alone).store.last
    ours = f"{last} after update 1 (epoch 0, batch 1)"
    others = {"1": ours, "2": ours}
    Trainer(alone, CPU)._resume("auto")
    for theirs in (ours.replace("update 1", "update 0"), "the start"):
        others = {"1": theirs, "2": ours}
        with pytest.raises(CheckpointError) as raised:
            Trainer(alone, CPU)._resume("auto")
        assert f"{ours} (processes 0, 2); {theirs} (process 1); a node" in str(raised.value)
    with pytest.raises(CheckpointError, match=r"the start \(processes 0, 1\); .* \(process 2\)"):
        Trainer(replace(alone, out=alone.out + "-none"), CPU)._resume("auto")


@pytest.mark.parametrize("inference", ["recipe", "fastest"])
def test_a_checkpoint_of_an_earlier_recipe_is_resumed(recipe, inference):
    """With a field that recipes no longer have."""
    last = saved(recipe).store.last
    state = torch.load(last)
    state["recipe"]["teacher"]["inference"] = inference
    torch.save(state, last)
    messages = Trainer(recipe, CPU)._resume("auto")
    notes = [message for message in messages if "teacher.inference: 'fastest' was" in message]
    assert len(notes) == (inference == "fastest")
    assert len(messages) == 1 + len(notes)
