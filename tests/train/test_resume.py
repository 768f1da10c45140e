"""Checkpoints: which are kept, resuming from them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from featkd.runtime.remote import locate
from featkd.train.checkpoint import CheckpointError, load
from featkd.train.logs import RunLog, read_csv
from featkd.train.recipe import RecipeError
from featkd.train.trained import load_trained
from featkd.train.trainer import Trainer
from tests.train.runs import (
    CPU,
    changed,
    column,
    copy_images,
    full_disk,
    interrupt,
    run,
    same_weights,
    save,
    train_teacher,
)


@pytest.mark.parametrize("every_updates", [None, 4, 5])
def test_resuming_repeats_the_unbroken_run_bit_for_bit(recipe, every_updates, tmp_path):
    """A run stopped after some update and resumed has the losses and weights of one run."""
    augment = recipe.data.augment
    if every_updates == 5:  # the other cases are without mixing
        augment = replace(augment, mixup=0.8, cutmix=1.0)
    recipe = changed(
        recipe,
        data=dict(augment=augment),
        optim=dict(accumulate=2, epochs=3),
        checkpoint=dict(every_updates=every_updates),
        log_every=2,
    )
    whole = replace(recipe, out=str(tmp_path / "whole"))
    run(whole)
    interrupt(Trainer(recipe, CPU), 5)
    state = load(Path(recipe.out) / "last.pt")
    assert (state["update"], state["loader"]["batch"]) == {None: (3, 0), 4: (4, 2), 5: (5, 4)}[
        every_updates
    ]
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


def test_a_finished_run_is_not_repeated(recipe):
    first = run(recipe)
    before = (Path(recipe.out) / "last.pt").stat().st_mtime_ns
    again = run(recipe)
    assert (Path(recipe.out) / "last.pt").stat().st_mtime_ns == before
    assert again.scores == first.scores


def test_checkpoints_are_kept_by_policy(recipe):
    """Evaluated every second epoch and at the end; every fourth is kept."""
    recipe = changed(recipe, optim=dict(epochs=5), checkpoint=dict(keep_every=4, every_epochs=2))
    run(recipe)
    rows = read_csv(Path(recipe.out) / "eval.csv")
    assert [row["epoch"] for row in rows] == ["2", "2", "4", "4", "5", "5"]
    names = {p.name for p in Path(recipe.out).glob("*.pt")}
    assert names == {"last.pt", "best.pt", "epoch-0004.pt"}
    assert load(Path(recipe.out) / "epoch-0004.pt")["epoch"] == 4


def test_another_student_is_refused(recipe, tmp_path):
    run(recipe)
    other = changed(recipe, student=dict(arch="lift"))
    with pytest.raises(RecipeError, match=r"student.arch: 'widelast' -> 'lift'"):
        run(other)
    elsewhere = replace(other, out=str(tmp_path / "elsewhere"))
    with pytest.raises(RecipeError, match="another student"):
        run(elsewhere, str(Path(recipe.out) / "last.pt"))
    with pytest.raises(CheckpointError, match="with a weight average"):
        run(replace(recipe, ema_decay=None), "force")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(recipe, content):
    last = Path(recipe.out) / "last.pt"
    last.parent.mkdir()
    if content is None:
        torch.save({"format": 2, "model": torch.zeros(1000)}, last)
    last.write_bytes(last.read_bytes()[:2000] if content is None else content)
    with pytest.raises(CheckpointError, match=r"could not read the checkpoint .*last.pt"):
        run(recipe)


@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_the_old_checkpoint(recipe, monkeypatch, exists):
    """The write fails half-way; the command line's tests have a real file-size limit."""
    trainer = Trainer(recipe, CPU)
    if exists:
        save(trainer)
    before = [path.read_bytes() for path in trainer.folder.glob("*.pt")]
    monkeypatch.setattr("featkd.runtime.files.os.fsync", full_disk)
    kept = "the earlier checkpoint is unchanged" if exists else "there is no earlier checkpoint"
    with pytest.raises(CheckpointError, match=rf"could not save .*No space left.*; {kept}$"):
        save(trainer)
    assert [path.read_bytes() for path in trainer.folder.glob("*.pt")] == before
    assert not list(trainer.folder.glob(".*.tmp"))


@pytest.mark.parametrize("arch", ["plain", "lift", "widelast"])
def test_a_trained_student_comes_back_from_its_checkpoint(recipe, arch):
    recipe = changed(recipe, student=dict(arch=arch))
    trainer = Trainer(recipe, CPU)
    trainer.run(quiet=True)
    images = torch.randn(2, 3, 16, 16)
    originals = {"model": trainer.components.student, "model_ema": trainer.components.ema.module}
    top1 = {name: scores["top1"] for name, scores in trainer.scores.items()}
    originals["auto"] = originals["model" if top1["model"] >= top1["ema"] else "model_ema"]
    for weights, original in originals.items():
        loaded = load_trained(Path(recipe.out) / "last.pt", weights)
        assert not loaded.training
        assert torch.equal(loaded(images), original.eval()(images))


def test_a_student_of_featkd_becomes_a_teacher(recipe):
    checkpoint = train_teacher(recipe)
    for weights in ("model", "model_ema"):
        trainer = Trainer(
            changed(recipe, teacher=dict(checkpoint=checkpoint, weights=weights)), CPU
        )
        model, saved = trainer.components.teacher_model, load(checkpoint)[weights]
        assert all(torch.equal(model.state_dict()[k], saved[k]) for k in saved)
        assert not any(p.requires_grad for p in model.parameters())


def test_auto_takes_the_weights_that_scored_better(alone):
    """After a short run, the published average is close to the initial weights."""
    alone = changed(alone, ema_decay=0.99996, optim=dict(epochs=8))
    alone.student.options["drop_path_rate"] = 0.0
    outcome = run(alone)
    assert outcome.scores["model"]["top1"] > outcome.scores["ema"]["top1"] + 20
    for name in ("best.pt", "last.pt"):
        loaded = load_trained(Path(alone.out) / name).state_dict()
        saved = load(Path(alone.out) / name)["model"]
        assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_best_stays_when_the_last_is_worse(alone):
    """After a bad epoch, best.pt has the weights of the good one."""
    alone = changed(alone, ema_decay=None, optim=dict(epochs=4))
    run(alone)
    worse = changed(alone, optim=dict(epochs=5, lr=3.0, step_on="epoch", min_lr=3.0))
    outcome = run(worse, "force")
    assert outcome.scores["model"]["top1"] < outcome.best["top1"]
    best, last = (load(Path(alone.out) / name) for name in ("best.pt", "last.pt"))
    assert best["update"] == outcome.best["update"] < last["update"] == 30
    assert not same_weights(Path(alone.out) / "best.pt", Path(alone.out) / "last.pt")


def test_other_classes_are_refused(recipe, tmp_path):
    run(recipe)
    moved = copy_images(recipe, tmp_path / "renamed")
    for split in ("train", "val"):
        (tmp_path / "renamed" / split / "blue").rename(tmp_path / "renamed" / split / "violet")
    with pytest.raises(CheckpointError, match=r"\(blue, green, red\) than .* \(green, red, violet"):
        run(moved)


def test_another_image_size_is_refused(recipe):
    run(recipe)
    with pytest.raises(ValueError, match=r"last.pt does not fit .*pos_embed"):
        run(changed(recipe, data=dict(img_size=32)), "force")


def test_out_that_is_a_file(recipe, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"out: .*file is a file, expected a folder"):
        run(replace(recipe, out=str(tmp_path / "file")))


def test_a_run_in_an_object_store_resumes_bit_for_bit(recipe, monkeypatch):
    """A kill within the second epoch loses its rows, which the resumed run writes again."""
    run(recipe)
    store = replace(recipe, out="memory://resumed/run")
    out = locate(store.out)
    log = Trainer._log
    rows = []

    def die_at_nine(self, *args):
        rows.append(len(read_csv(out / "metrics.csv")))
        if self.update == 9:
            raise KeyboardInterrupt
        log(self, *args)

    monkeypatch.setattr(Trainer, "_log", die_at_nine)
    monkeypatch.setattr(RunLog, "close", lambda *_, **__: None)  # nothing runs after a kill
    with pytest.raises(KeyboardInterrupt):
        run(store)
    assert rows == [0] * 6 + [6] * 3  # uploaded with each checkpoint
    assert load(out / "last.pt")["update"] == 6
    monkeypatch.undo()
    run(store)
    for name in ("metrics.csv", "eval.csv"):
        there, here = (read_csv(folder / name) for folder in (out, Path(recipe.out)))
        for row in (*there, *here):
            row.pop("images_per_s", None)
        assert there == here
    names = {str(path).rpartition("/run/")[2] for path in out.fs.find(out.path)}
    assert {"last.pt", "best.pt", "metrics.csv", "eval.csv"} < names
    assert len([name for name in names if name.startswith("tensorboard/events")]) == 2
    for name in ("last.pt", "best.pt"):
        assert same_weights(out / name, Path(recipe.out) / name)
    trained = load_trained(f"{store.out}/best.pt", "model").state_dict()
    assert all(torch.equal(trained[k], v) for k, v in load(out / "best.pt")["model"].items())
    with pytest.raises(RecipeError, match=r"teacher.checkpoint: no file 'memory://resumed/none"):
        Trainer(changed(recipe, teacher=dict(checkpoint="memory://resumed/none.pt")), CPU)


def test_a_plain_student_of_another_width_is_pooled_with_a_note(recipe):
    plain = changed(recipe, student=dict(arch="plain"))
    trainer = Trainer(plain, CPU)
    note = (
        "layer pair [1, 1]: the student's map has 12 channels, the teacher's 24: the wider map is "
        "pooled (loss.projector trains a projector instead)"
    )
    assert note in trainer.components.notes
    trainer.run(quiet=True)
