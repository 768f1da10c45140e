"""The training loop: what an update computes, what a run writes, how it stops and goes on."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from featkd.data import BadImageError
from featkd.train.checkpoint import CheckpointError, load
from featkd.train.distributed import ProcessContext
from featkd.train.engine import Outcome, Trainer, TrainingDiverged
from featkd.train.logs import read_csv
from featkd.train.recipe import Recipe, RecipeError, StudentConfig, TeacherConfig, to_dict
from featkd.train.trained import load_trained

CPU = ProcessContext(0, 1, torch.device("cpu"))


def run(recipe: Recipe, resume: str = "auto") -> Outcome:
    return Trainer(recipe, CPU).run(resume, quiet=True)


def column(recipe: Recipe, name: str) -> list[str]:
    return [row[name] for row in read_csv(Path(recipe.out) / "metrics.csv")]


def same_weights(one: Path, other: Path) -> bool:
    a, b = load(one)["model"], load(other)["model"]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_learns_and_writes_what_it_says(recipe):
    recipe = replace(recipe, optim=replace(recipe.optim, epochs=8))
    outcome = run(recipe)
    out = Path(recipe.out)
    assert outcome.updates == 48
    assert outcome.scores["model"]["top1"] > 60  # chance is 33; the colours are easy
    assert {"last.pt", "best.pt", "metrics.csv", "eval.csv", "tensorboard"} == {
        p.name for p in out.iterdir()
    }
    assert list(out.glob("tensorboard/events*"))
    losses = [float(x) for x in column(recipe, "loss")]
    assert len(losses) == 48
    assert sum(losses[-6:]) < sum(losses[:6])
    rates = [float(x) for x in column(recipe, "lr")]
    assert rates[0] == pytest.approx(1e-6)
    assert max(rates) <= 2e-3
    assert rates[6] == pytest.approx(2e-3, rel=0.1)  # the end of the warm-up
    assert rates[-1] < 2e-4
    rows = read_csv(out / "eval.csv")
    assert [r["weights"] for r in rows] == ["model", "ema"] * 8
    assert {r["images"] for r in rows} == {"12"}
    best = max(rows, key=lambda r: float(r["top1"]))
    assert float(best["top1"]) == outcome.best["top1"] == load(out / "best.pt")["best"]["top1"]
    state = load(out / "last.pt")
    assert state["recipe"] == to_dict(recipe)
    assert state["versions"]["torch"] == torch.__version__.split("+")[0]


def test_losses_are_the_published_objective(recipe):
    """One update against the formula written out with torch's own functions."""
    import torch.nn.functional as F

    trainer = Trainer(recipe, CPU)
    parts = trainer.parts
    parts.student.eval()  # no drop-path
    batch = next(iter(parts.val_loader))
    terms = trainer.losses(batch)
    assert parts.teacher is not None
    logits, (s,) = parts.student.forward_with_features(batch.images, [-1])
    t_logits, (t,) = parts.teacher.forward_with_features(batch.images, [-1])
    z = torch.fft.rfft2((s - t).transpose(1, 2).reshape(len(s), 24, 4, 4), norm="ortho")
    feature = torch.stack((z.real, z.imag)).square().mean()
    ce = F.cross_entropy(logits, batch.targets, label_smoothing=0.1)
    kl = F.kl_div(
        logits.log_softmax(1), t_logits.log_softmax(1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(terms.total, 0.5 * ce + 0.2 * feature + 0.5 * kl)


def test_an_update_reads_nothing_from_the_device(recipe):
    """On the meta device every read (item, bool, copy to the host) is an error."""
    recipe = replace(recipe, ema_decay=None, optim=replace(recipe.optim, clip_grad=1.0))
    trainer = Trainer(recipe, ProcessContext(0, 1, torch.device("meta")))
    trainer.parts.student.train()
    for batch in trainer.parts.train_loader:
        trainer.step([batch, batch])
    assert trainer.update == 6
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer._meter.tolist()


def test_accumulation_equals_one_large_batch(alone):
    alone.student.options["drop_path_rate"] = 0.0
    alone = replace(alone, ema_decay=None)
    large = Trainer(replace(alone, batch_size=16), CPU)
    small = Trainer(replace(alone, optim=replace(alone.optim, accumulate=2)), CPU)
    assert large.parts.global_batch == small.parts.global_batch == 16
    (first, *_) = large.parts.train_loader
    large.step([first])
    halves = [
        first._replace(images=i, targets=t, bad=[])
        for i, t in zip(first.images.split(8), first.targets.split(8), strict=True)
    ]
    small.step(halves)
    for a, b in zip(
        large.parts.student.parameters(), small.parts.student.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("every_updates", [None, 4])
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
    assert (state["update"], state["batch"]) == ((3, 0) if every_updates is None else (4, 2))
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


def test_divergence_is_an_error(alone):
    wild = replace(alone, optim=replace(alone.optim, lr=1e30, warmup_epochs=0, epochs=3))
    with pytest.raises(TrainingDiverged, match="the loss is"):
        run(wild)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(recipe, amp):
    recipe = replace(recipe, amp=amp, optim=replace(recipe.optim, clip_grad=1.0))
    run(recipe)
    losses = [float(x) for x in column(recipe, "loss")]
    assert all(math.isfinite(x) for x in losses)
    full = replace(recipe, amp="off", out=recipe.out + "-full")
    run(full)
    assert losses[0] == pytest.approx(float(column(full, "loss")[0]), rel=0.05)
    assert losses != [float(x) for x in column(full, "loss")]


@pytest.mark.parametrize("arch", ["plain", "lift", "widelast"])
def test_a_trained_student_comes_back_from_its_checkpoint(recipe, arch):
    recipe = replace(recipe, student=replace(recipe.student, arch=arch))
    trainer = Trainer(recipe, CPU)
    trainer.run(quiet=True)
    images = torch.randn(2, 3, 16, 16)
    originals = {"model": trainer.parts.student, "model_ema": trainer.parts.ema.module}
    originals["auto"] = originals["model_ema"]
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
    for weights, key in (("model", "model"), ("model_ema", "model_ema"), ("auto", "model_ema")):
        config = replace(recipe.teacher, checkpoint=str(checkpoint), weights=weights)
        trainer = Trainer(replace(recipe, teacher=config), CPU)
        loaded, saved = trainer.parts.teacher.state_dict(), load(checkpoint)[key]
        assert all(torch.equal(loaded[k], saved[k]) for k in saved)
        assert not any(p.requires_grad for p in trainer.parts.teacher.parameters())


def test_teacher_is_not_trained(recipe):
    trainer = Trainer(recipe, CPU)
    before = {k: v.clone() for k, v in trainer.parts.teacher.state_dict().items()}
    trainer.run(quiet=True)
    assert all(torch.equal(before[k], v) for k, v in trainer.parts.teacher.state_dict().items())
    assert not trainer.parts.teacher.training


def test_bad_images(recipe, images, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(images, broken)
    for name in ("train/red/3.png", "val/blue/0.png"):
        path = broken / name
        path.write_bytes(path.read_bytes()[:60])
    stop = replace(recipe, data=replace(recipe.data, path=str(broken)))
    with pytest.raises(BadImageError, match=r"train/red/3.png"):
        run(stop)
    skip = replace(stop, out=recipe.out + "-skip", data=replace(stop.data, on_bad_image="skip"))
    run(skip)
    assert {r["images"] for r in read_csv(Path(skip.out) / "eval.csv")} == {"11"}
    bad = load(Path(skip.out) / "last.pt")["bad_files"]
    assert sorted(Path(b).name for b in bad) == ["0.png", "3.png"]


UNFIT = {
    r"loss.pairs \(student\): layers: 2 is out of range.*valid: -2..1": dict(pairs=[(2, 0)]),
    r"loss.pairs \(teacher\): layers: -3 is out of range": dict(pairs=[(0, -3)]),
}


@pytest.mark.parametrize("message", UNFIT)
def test_layers_out_of_range(recipe, message):
    with pytest.raises(RecipeError, match=message):
        Trainer(replace(recipe, loss=replace(recipe.loss, **UNFIT[message])), CPU)


def test_widths_grids_and_classes_that_do_not_fit(recipe):
    student, teacher = recipe.student, recipe.teacher
    with pytest.raises(RecipeError, match=r"student.teacher_dim: 36, but .* has 24 channels"):
        Trainer(replace(recipe, student=replace(student, teacher_dim=36)), CPU)
    coarse = TeacherConfig(name=teacher.name, options=teacher.options | {"patch_size": 8})
    with pytest.raises(RecipeError, match=r"16 tokens, the teacher's 4; image and patch sizes"):
        Trainer(replace(recipe, teacher=coarse), CPU)
    many = TeacherConfig(name=teacher.name, options=teacher.options | {"num_classes": 7})
    with pytest.raises(RecipeError, match=r"student has 3 and the teacher 7"):
        Trainer(replace(recipe, teacher=many), CPU)
    with pytest.raises(RecipeError, match=r"student.num_classes: 5, but .* 3 class folders"):
        Trainer(replace(recipe, student=replace(student, num_classes=5)), CPU)
    with pytest.raises(RecipeError, match=r"optim.accumulate: 7 .* an epoch has 6"):
        Trainer(replace(recipe, optim=replace(recipe.optim, accumulate=7)), CPU)


def test_plain_student_of_another_width_is_pooled_and_said(recipe):
    plain = replace(recipe, student=replace(recipe.student, arch="plain"))
    trainer = Trainer(plain, CPU)
    assert trainer.parts.notes == [
        "layer pair [1, 1]: 12 against 24 channels: the wider map is pooled"
    ]
    trainer.run(quiet=True)


def test_compiled_run(recipe):
    recipe = replace(recipe, compile=True, optim=replace(recipe.optim, epochs=1, warmup_epochs=0))
    recipe.student.options["drop_path_rate"] = 0.0
    run(recipe)
    eager = replace(recipe, compile=False, out=recipe.out + "-eager")
    run(eager)
    compiled, plain = ([float(x) for x in column(r, "loss")] for r in (recipe, eager))
    assert compiled == pytest.approx(plain, rel=1e-4)
