"""Resuming with another recipe, or from files that differ between processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from featkd.runtime.distributed import ProcessContext
from featkd.train.checkpoint import CheckpointError
from featkd.train.recipe import LossConfig, Recipe, RecipeError
from featkd.train.trainer import Trainer
from tests.train.runs import CPU, changed, copy_images, run, trained


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
def test_another_weight_decay_and_eps_are_used(alone, optimizer):
    optim = replace(alone.optim, optimizer=optimizer)
    before = trained(replace(alone, optim=optim)).components.optimizer.param_groups
    assert [group["weight_decay"] for group in before] == [0.0, 0.05]
    other = replace(alone, optim=replace(optim, weight_decay=0.2, eps=1e-6))
    trainer = Trainer(other, CPU)
    trainer._resume("force")
    groups = trainer.components.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.2]
    assert {group.get("eps") for group in groups} == {1e-6 if optimizer == "adamw" else None}
    assert trainer.components.optimizer.state  # restored


@pytest.mark.parametrize(("before", "after"), [("bf16", "fp16"), ("fp16", "off"), ("fp16", "fp16")])
def test_another_precision(alone, before, after):
    scaler = trained(replace(alone, amp=before)).components.scaler
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
    trained(alone)
    with pytest.raises(CheckpointError, match=message):
        Trainer(changed(alone, optim=dict(**change)), CPU)._resume("force")


def test_another_number_of_images_is_refused_or_forced_between_epochs(alone, tmp_path):
    alone = with_field(alone, "optim.warmup_epochs", 0)
    run(with_field(alone, "optim.epochs", 1))
    there = copy_images(alone, tmp_path / "fewer")
    for number in range(8):
        (tmp_path / "fewer" / "train" / "red" / f"{number}.png").unlink()
    note = "training images: 48 -> 40 (5 updates per epoch)"
    with pytest.raises(RecipeError, match=r"another experiment: training images: 48 -> 40"):
        Trainer(there, CPU)._resume("auto")
    assert note in Trainer(there, CPU)._resume("force")[1]
    assert "training images" not in Trainer(alone, CPU)._resume("auto")[1]
    trained(alone)
    with pytest.raises(CheckpointError, match=r"last.pt: num_images: 48 when .*, now 40"):
        Trainer(there, CPU)._resume("force")


def test_processes_that_read_different_files_are_stopped(alone, monkeypatch):
    """All of three processes raise an error that lists the positions."""
    others: dict[str, str] = {}
    monkeypatch.setattr(ProcessContext, "merge_dicts", lambda _, facts: facts | others)
    last = trained(alone).store.last
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


def with_field(recipe: Recipe, field: str, value: object) -> Recipe:
    """The recipe with one field, "section.name" or "name", set to another value."""
    section, _, name = field.rpartition(".")
    return changed(recipe, **{section: {name: value}} if section else {name: value})


EXPERIMENT = {
    "seed": (5, "seed: 0 -> 5"),
    "loss.alpha": (0.25, "loss.alpha: 0.5 -> 0.25"),
    "loss.feature": ("mse", "loss.feature: 'spectral' -> 'mse'"),
    "teacher.weights": ("model", "teacher.weights: 'auto' -> 'model'"),
    "student.arch": ("fixed_step", "student.arch: 'widelast' -> 'fixed_step'"),
    "optim.lr": (1e-3, "optim.lr: 0.002 -> 0.001"),
    "optim.optimizer": ("sgd", "optim.optimizer: 'adamw' -> 'sgd'"),
    "optim.epochs": (3, "optim.epochs: 4 -> 3"),
    "data.crop_pct": (1.0, "data.crop_pct: 0.875 -> 1.0"),
    "data.mean": ((0.5, 0.5, 0.5), r"data.mean: \[0.485, 0.456, 0.406\] -> \[0.5, 0.5, 0.5\]"),
    "ema_decay": (0.5, "ema_decay: 0.9 -> 0.5"),
}


def test_another_experiment_is_refused(recipe):
    """Every field that changes the experiment; the folder is left as it was."""
    recipe = with_field(recipe, "optim.epochs", 4)
    last = trained(recipe).store.last

    def content() -> tuple[bytes, list[str]]:
        return last.read_bytes(), sorted(p.name for p in last.parent.iterdir() if p.name != ".lock")

    before = content()
    alone = replace(recipe, teacher=None, loss=LossConfig(alpha=0.0))
    cases = [(with_field(recipe, f, value), text) for f, (value, text) in EXPERIMENT.items()]
    for other, text in [*cases, (alone, "teacher: 'vit_tiny_patch16_224' -> null")]:
        with pytest.raises(RecipeError, match=rf"last\.pt: .*{text}.*; expected another --out"):
            Trainer(other, CPU).run(quiet=True)
    assert content() == before
    for field in ("loss.alpha", "data.crop_pct"):
        value, text = EXPERIMENT[field]
        assert text in Trainer(with_field(recipe, field, value), CPU)._resume("force")[-1]


ALLOWED = {
    "log_every": (7, ""),
    "data.workers": (1, ""),
    "device": ("auto", ""),
    "optim.epochs": (5, "optim.epochs: 4 -> 5"),
    "batch_size": (4, "batch_size: 8 -> 4"),
    "data.on_bad_image": ("skip", "data.on_bad_image: 'error' -> 'skip'"),
}


@pytest.mark.parametrize("field", ALLOWED)
def test_a_change_within_the_experiment_goes_on(alone, field):
    alone = with_field(alone, "optim.epochs", 4)
    trained(alone)
    value, note = ALLOWED[field]
    messages = Trainer(with_field(alone, field, value), CPU)._resume("auto")
    assert messages[0].startswith("resumed from")
    assert messages[1:] == ([f"changed since that checkpoint: {note}"] if note else [])


@pytest.mark.parametrize("inference", ["recipe", "fastest"])
def test_a_checkpoint_of_an_earlier_recipe_is_resumed(recipe, inference):
    """With a field that recipes no longer have, and without fields that they did not have."""
    last = trained(recipe).store.last
    state = torch.load(last)
    state["recipe"]["teacher"]["inference"] = inference
    for section, field in (("data", "on_bad_image"), ("teacher", "random"), ("loss", "tau")):
        del state["recipe"][section][field]
    del state["recipe"]["cache_epochs"]
    torch.save(state, last)
    messages = Trainer(recipe, CPU)._resume("auto")
    notes = [message for message in messages if "teacher.inference: 'fastest' was" in message]
    assert len(notes) == (inference == "fastest")
    assert len(messages) == 1 + len(notes)
    with pytest.raises(RecipeError, match=r"loss.tau: 1.0 -> 2.0"):
        Trainer(with_field(recipe, "loss.tau", 2.0), CPU)._resume("auto")
