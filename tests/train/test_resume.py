"""Checkpoints: what is kept, how a run goes on from them, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from featkd.train.checkpoint import CheckpointError, load
from featkd.train.engine import Trainer
from featkd.train.logs import read_csv
from featkd.train.recipe import StudentConfig
from featkd.train.trained import load_trained
from tests.train.runs import CPU, column, run, same_weights


@pytest.mark.parametrize("every_updates", [None, 4, 5])
def test_resuming_repeats_the_unbroken_run_bit_for_bit(recipe, every_updates, tmp_path):
    """Stop after some update, go on in a new Trainer: losses and weights are those of one run."""
    recipe = replace(
        recipe,
        optim=replace(recipe.optim, accumulate=2, epochs=3),
        checkpoint=replace(recipe.checkpoint, every_updates=every_updates),
        log_every=2,
    )
    whole = replace(recipe, out=str(tmp_path / "whole"))
    run(whole)
    stopped = Trainer(recipe, CPU)
    updates = 0
    step = stopped.step

    class Stop(Exception):
        pass

    def stop_after_five(batches):
        nonlocal updates
        if updates == 5:
            raise Stop
        updates += 1
        return step(batches)

    stopped.step = stop_after_five  # type: ignore[method-assign]
    with pytest.raises(Stop):
        stopped.run(quiet=True)
    state = load(Path(recipe.out) / "last.pt")
    assert (state["update"], state["batch"]) == {None: (3, 0), 4: (4, 2), 5: (5, 4)}[every_updates]
    assert state["metered"] == (2 if every_updates == 5 else 0)  # within a logged interval
    run(recipe)
    assert column(recipe, "update") == column(whole, "update")
    assert column(recipe, "loss") == column(whole, "loss")
    for name in ("last.pt", "best.pt"):
        assert same_weights(Path(recipe.out) / name, Path(whole.out) / name)
    for field in ("top1", "loss"):
        assert [r[field] for r in read_csv(Path(recipe.out) / "eval.csv")] == [
            r[field] for r in read_csv(Path(whole.out) / "eval.csv")
        ]


def test_the_best_score_survives_a_resume(recipe):
    outcome = run(recipe)
    longer = replace(recipe, optim=replace(recipe.optim, epochs=3))
    trainer = Trainer(longer, CPU)
    trainer._resume("auto")
    assert trainer.best == outcome.best
    assert trainer.update == 12


def test_a_finished_run_is_not_repeated(recipe):
    first = run(recipe)
    before = (Path(recipe.out) / "last.pt").stat().st_mtime_ns
    again = run(recipe)
    assert (Path(recipe.out) / "last.pt").stat().st_mtime_ns == before
    assert again.scores == first.scores


def test_checkpoints_are_kept_by_policy(recipe):
    recipe = replace(
        recipe,
        optim=replace(recipe.optim, epochs=5),
        checkpoint=replace(recipe.checkpoint, keep_every=2, every_epochs=1),
    )
    run(recipe)
    names = {p.name for p in Path(recipe.out).glob("*.pt")}
    assert names == {"last.pt", "best.pt", "epoch-0002.pt", "epoch-0004.pt"}
    assert load(Path(recipe.out) / "epoch-0004.pt")["epoch"] == 4


def test_never_resume_refuses_an_old_run(recipe):
    run(recipe)
    with pytest.raises(CheckpointError, match=r"resume: never, but .*last.pt exists"):
        run(recipe, "never")


def test_another_student_is_refused(recipe, tmp_path):
    run(recipe)
    other = replace(recipe, student=replace(recipe.student, arch="lift"))
    with pytest.raises(CheckpointError, match=r"student.arch: 'widelast' -> 'lift'"):
        run(other)
    elsewhere = replace(other, out=str(tmp_path / "elsewhere"))
    with pytest.raises(CheckpointError, match="another student"):
        run(elsewhere, str(Path(recipe.out) / "last.pt"))
    with pytest.raises(CheckpointError, match="with a weight average"):
        run(replace(recipe, ema_decay=None))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(recipe, content):
    run(recipe)
    last = Path(recipe.out) / "last.pt"
    last.write_bytes(last.read_bytes()[:2000] if content is None else content)
    with pytest.raises(CheckpointError, match=r"could not read the checkpoint .*last.pt"):
        run(recipe)


def test_a_full_disk_leaves_the_old_checkpoint(recipe, monkeypatch):
    """The write fails half-way, as on a full disk; test_cli.py has a real file-size limit."""
    run(recipe)
    last = Path(recipe.out) / "last.pt"
    before = last.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("featkd.files.os.fsync", full)
    longer = replace(recipe, optim=replace(recipe.optim, epochs=3))
    trainer = Trainer(longer, CPU)
    trainer._resume("auto")
    with pytest.raises(CheckpointError, match=r"could not save .*No space left.*untouched"):
        trainer._save()
    assert last.read_bytes() == before
    assert not list(Path(recipe.out).glob(".*.tmp"))


@pytest.mark.parametrize("arch", ["plain", "lift", "widelast"])
def test_a_trained_student_comes_back_from_its_checkpoint(recipe, arch):
    recipe = replace(recipe, student=replace(recipe.student, arch=arch))
    trainer = Trainer(recipe, CPU)
    trainer.run(quiet=True)
    images = torch.randn(2, 3, 16, 16)
    originals = {"model": trainer.parts.student, "model_ema": trainer.parts.ema.module}
    top1 = {name: scores["top1"] for name, scores in trainer.scores.items()}
    originals["auto"] = originals["model" if top1["model"] >= top1["ema"] else "model_ema"]
    for weights, original in originals.items():
        loaded = load_trained(Path(recipe.out) / "last.pt", weights)
        assert not loaded.training
        assert torch.equal(loaded(images), original.eval()(images))


def test_a_student_of_featkd_becomes_a_teacher(alone, recipe):
    teacher = replace(
        alone,
        out=alone.out + "-teacher",
        student=StudentConfig(
            base=recipe.teacher.name, arch="plain", options=dict(recipe.teacher.options)
        ),
    )
    run(teacher)
    checkpoint = Path(teacher.out) / "last.pt"
    for weights, key in (("model", "model"), ("model_ema", "model_ema")):
        config = replace(recipe.teacher, checkpoint=str(checkpoint), weights=weights)
        trainer = Trainer(replace(recipe, teacher=config), CPU)
        loaded, saved = trainer.parts.teacher.state_dict(), load(checkpoint)[key]
        assert all(torch.equal(loaded[k], saved[k]) for k in saved)
        assert not any(p.requires_grad for p in trainer.parts.teacher.parameters())


def test_auto_takes_the_weights_that_scored_better(alone):
    """The published average of a short run is little more than the initial weights."""
    alone = replace(alone, ema_decay=0.99996, optim=replace(alone.optim, epochs=8))
    alone.student.options["drop_path_rate"] = 0.0
    outcome = run(alone)
    assert outcome.scores["model"]["top1"] > outcome.scores["ema"]["top1"] + 20
    for name in ("best.pt", "last.pt"):
        loaded = load_trained(Path(alone.out) / name).state_dict()
        saved = load(Path(alone.out) / name)["model"]
        assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_best_stays_when_the_last_is_worse(alone):
    """Divergence after a good epoch: best.pt keeps the good weights."""
    alone = replace(alone, ema_decay=None, optim=replace(alone.optim, epochs=4))
    run(alone)
    worse = replace(
        alone, optim=replace(alone.optim, epochs=5, lr=3.0, step_on="epoch", min_lr=3.0)
    )
    outcome = run(worse)
    assert outcome.scores["model"]["top1"] < outcome.best["top1"]
    best, last = (load(Path(alone.out) / name) for name in ("best.pt", "last.pt"))
    assert best["update"] == outcome.best["update"] < last["update"] == 30
    assert not same_weights(Path(alone.out) / "best.pt", Path(alone.out) / "last.pt")


def test_evaluation_every_second_epoch_and_at_the_end(alone):
    policy = replace(alone.checkpoint, every_epochs=2)
    run(replace(alone, checkpoint=policy, optim=replace(alone.optim, epochs=5)))
    rows = read_csv(Path(alone.out) / "eval.csv")
    assert [r["epoch"] for r in rows] == ["2", "2", "4", "4", "5", "5"]


def test_other_classes_are_refused(recipe, images, tmp_path):
    run(recipe)
    renamed = tmp_path / "renamed"
    shutil.copytree(images, renamed)
    for split in ("train", "val"):
        (renamed / split / "blue").rename(renamed / split / "violet")
    moved = replace(recipe, data=replace(recipe.data, path=str(renamed)))
    with pytest.raises(CheckpointError, match=r"\(blue, green, red\) than .* \(green, red, violet"):
        run(moved)


def test_another_image_size_is_refused(recipe):
    run(recipe)
    with pytest.raises(ValueError, match=r"last.pt does not fit .*pos_embed"):
        run(replace(recipe, data=replace(recipe.data, img_size=32)))


def test_a_position_within_an_epoch_needs_the_same_batches(recipe):
    trainer = Trainer(recipe, CPU)
    trainer.step([next(iter(trainer.parts.train_loader))])
    trainer.store.prepare()
    trainer._save()
    with pytest.raises(CheckpointError, match=r"saved within an epoch with batch_size: 8"):
        run(replace(recipe, batch_size=4))


def test_out_that_is_a_file(recipe, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"out: .*file is a file, expected a folder"):
        run(replace(recipe, out=str(tmp_path / "file")))


def test_plain_student_of_another_width_is_pooled_and_said(recipe):
    plain = replace(recipe, student=replace(recipe.student, arch="plain"))
    trainer = Trainer(plain, CPU)
    assert trainer.parts.notes[-1] == (
        "layer pair [1, 1]: 12 against 24 channels: the wider map is pooled"
    )
    trainer.run(quiet=True)
