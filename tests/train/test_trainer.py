"""The training loop: updates, outputs of a run, errors."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore
from torch.nn.parallel import DistributedDataParallel

from featkd.data import BadImageError
from featkd.runtime.distributed import ProcessContext
from featkd.train.checkpoint import load
from featkd.train.logs import read_csv
from featkd.train.meter import TrainingDiverged
from featkd.train.recipe import LossConfig, OptimConfig, Recipe, to_dict
from featkd.train.student_forward import StudentForward
from featkd.train.teacher import Teacher
from featkd.train.trainer import Trainer
from tests.conftest import TEACHER
from tests.train.runs import CPU, changed, column, copy_images, refuse, run


def test_a_run_learns_and_writes_its_files(recipe):
    recipe = changed(recipe, optim=dict(epochs=8))
    outcome = run(recipe)
    out = Path(recipe.out)
    assert outcome.updates == 48
    assert outcome.scores["model"]["top1"] > 60  # chance is 33; the colours are easy
    assert {"last.pt", "best.pt", "metrics.csv", "eval.csv", "tensorboard", ".lock"} == {
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


def test_an_update_reads_nothing_from_the_device(recipe):
    """On the meta device every read (item, bool, copy to the CPU) is an error."""
    mixing = dict(augment=dict(mixup=0.8, cutmix=1.0))
    recipe = changed(recipe, ema_decay=None, data=mixing, optim=dict(clip_grad=1.0))
    trainer = Trainer(recipe, ProcessContext(0, 1, torch.device("meta")))
    trainer.components.student.train()
    for batch in trainer.components.train_loader:
        trainer.step([batch, batch])
    assert trainer.update == 6
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer._meter.means("now")


def test_gradients_are_reduced_once_an_update(alone):
    """Counts the buckets that DDP reduces."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        trainer = Trainer(changed(alone, optim=dict(accumulate=3)), CPU)
        components, reduced = trainer.components, 0
        components.student_forward = DistributedDataParallel(components.student_forward)

        def count(_, bucket):
            nonlocal reduced
            reduced += bucket.is_last()
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        components.student_forward.register_comm_hook(None, count)
        batches = list(components.train_loader)
        for update in (1, 2):
            trainer.step(batches[:3])
            assert reduced == update
    finally:
        torch.distributed.destroy_process_group()


def test_divergence_is_an_error(alone):
    wild = changed(alone, optim=dict(lr=1e30, warmup_epochs=0, epochs=3))
    with pytest.raises(TrainingDiverged, match="the loss is"):
        run(wild)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(recipe, amp):
    recipe = changed(recipe, amp=amp, optim=dict(clip_grad=1.0))
    run(recipe)
    losses = [float(x) for x in column(recipe, "loss")]
    assert all(math.isfinite(x) for x in losses)
    full = replace(recipe, amp="off", out=recipe.out + "-full")
    run(full)
    assert losses[0] == pytest.approx(float(column(full, "loss")[0]), rel=0.05)
    assert losses != [float(x) for x in column(full, "loss")]


def test_the_weight_average_is_the_closed_form(alone):
    alone.student.options["drop_path_rate"] = 0.0
    trainer = Trainer(replace(alone, ema_decay=0.75), CPU)
    history = [{k: v.clone() for k, v in trainer.components.student.state_dict().items()}]
    for batch in list(trainer.components.train_loader)[:2]:
        trainer.step([batch])
        history.append({k: v.clone() for k, v in trainer.components.student.state_dict().items()})
    for key, value in trainer.components.ema.module.state_dict().items():
        expected = 0.75**2 * history[0][key] + 0.75 * 0.25 * history[1][key]
        torch.testing.assert_close(value, expected + 0.25 * history[2][key])
        assert not torch.equal(value, history[2][key]) or torch.equal(value, history[0][key])


def test_learning_rate_by_epoch_is_warm_up_and_cosine(alone):
    """The published schedule, constant within an epoch; 2 of 6 epochs are warm-up."""
    fields = dict(step_on="epoch", epochs=6, warmup_epochs=2, lr=4e-3, lr_batch=16, min_lr=1e-5)
    run(changed(alone, optim=fields))
    peak = 4e-3 * 8 / 16
    expected = [1e-6, 1e-6 + (peak - 1e-6) / 2] + [
        1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * epoch / 6)) / 2 for epoch in (2, 3, 4, 5)
    ]
    rates = [float(x) for x in column(alone, "lr")]
    assert rates == pytest.approx([rate for rate in expected for _ in range(6)], rel=1e-6)


def test_drop_path_differs_from_update_to_update(alone):
    alone.student.options["drop_path_rate"] = 0.5
    trainer = Trainer(changed(alone, ema_decay=None, optim=dict(lr=1e-30, min_lr=0)), CPU)
    trainer.components.student.train()
    batch = next(iter(trainer.components.train_loader))
    assert len({trainer.step([batch]).total.item() for _ in range(6)}) > 1


def test_teacher_is_not_trained(recipe):
    trainer = Trainer(recipe, CPU)
    before = {k: v.clone() for k, v in trainer.components.teacher_model.state_dict().items()}
    trainer.run(quiet=True)
    teacher = trainer.components.teacher_model
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert not teacher.training


@pytest.mark.parametrize("labels", ["folders", "none"])
def test_bad_images(recipe, tmp_path, labels):
    loss = recipe.loss if labels == "folders" else LossConfig(feature="mse")
    recipe = changed(recipe, data=dict(labels=labels), loss=loss)
    stop = copy_images(recipe, tmp_path / "broken")
    for name in ("train/red/3.png", "val/blue/0.png"):
        path = tmp_path / "broken" / name
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(BadImageError, match=r"train/red/3.png"):
        run(stop)
    skip = changed(stop, out=recipe.out + "-skip", data=dict(on_bad_image="skip"))
    assert len(run(skip).bad_files) == 2
    assert {r["images"] for r in read_csv(Path(skip.out) / "eval.csv")} == {"11"}
    bad = load(Path(skip.out) / "last.pt")["bad_files"]
    assert sorted(Path(b).name for b in bad) == ["0.png", "3.png"]


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("loss", dict(pairs=[(2, 0)]), r"loss.pairs \(student\): .* 2 is out of .*valid: -2..1"),
        ("loss", dict(pairs=[(0, -3)]), r"loss.pairs \(teacher\): layers: -3 is out of range"),
        ("student", dict(teacher_dim=36), r"teacher_dim: 36, but .* has 24 channels; expected 24"),
        ("student", dict(num_classes=5), "student.num_classes: 5, but .* 3 class folders"),
        ("student", dict(num_classes=1), "student.num_classes: expected >= 2, got 1"),
        ("student", dict(options={"patchsize": 4}), "^student: .*patchsize"),
        ("teacher", dict(options=TEACHER | {"num_classes": 7}), "has 3 and the teacher 7"),
        ("teacher", dict(name="vit_tinny_patch16_224"), "^teacher.name: .*no model 'vit_tinny"),
        ("optim", dict(optimizer="adamv"), "optim.optimizer: timm has no 'adamv'; did you mean"),
        ("optim", dict(accumulate=7), "optim.accumulate: 7 .* an epoch has 6"),
        (
            *("optim", dict(lr=2e-3, lr_batch=1024, min_lr=1e-4)),
            "min_lr: 0.0001 is above .* 1.56e-05 .*lr_batch: 8 if",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(recipe, section, fields, message):
    refuse(recipe, message, **{section: fields})


def test_one_class_is_refused_before_anything_is_trained(recipe, images, tmp_path):
    """Otherwise the first evaluation would fail."""
    for split in ("train", "val"):
        shutil.copytree(images / split / "red", tmp_path / "one" / split / "red")
    message = r"data.path: .*/one has one class \(red\); .* two"
    refuse(recipe, message, data=dict(path=str(tmp_path / "one")))


@pytest.mark.parametrize("arch", ["widelast", "lift"])
def test_compiled_run(recipe, arch):
    recipe = changed(recipe, student=dict(arch=arch))
    recipe = changed(recipe, compile=True, optim=dict(epochs=1, warmup_epochs=0))
    recipe.student.options["drop_path_rate"] = 0.0
    run(recipe)
    eager = replace(recipe, compile=False, out=recipe.out + "-eager")
    run(eager)
    compiled, plain = ([float(x) for x in column(r, "loss")] for r in (recipe, eager))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_student_and_teacher_are_compiled_in_the_mode_asked_for(recipe, monkeypatch):
    """Checks the arguments of torch.compile; CUDA graphs need a GPU."""
    asked = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: asked.append((type(module), options))
    )
    Trainer(replace(recipe, compile=True, compile_mode="reduce-overhead"), CPU)
    assert sorted(asked, key=str) == [
        (StudentForward, {"mode": "reduce-overhead"}),
        (Teacher, {"mode": "reduce-overhead", "dynamic": False}),
    ]


@pytest.mark.parametrize(
    ("device", "fields", "world_size", "teacher", "student"),
    [
        ("cuda", {}, 1, "reduce-overhead", "reduce-overhead"),
        ("cuda", {"optim": OptimConfig(accumulate=2)}, 1, "reduce-overhead", "default"),
        ("cuda", {}, 2, "reduce-overhead", "default"),
        ("cuda", {"compile": False}, 1, None, None),
        ("cuda", {"compile_mode": "default"}, 1, "default", "default"),
        ("cpu", {}, 1, None, None),
        ("cpu", {"compile": True}, 1, "default", "default"),
    ],
)
def test_gpu_runs_are_compiled_with_cuda_graphs_where_these_are_safe(
    device, fields, world_size, teacher, student
):
    recipe = Recipe(**fields)
    modes = (
        recipe.compile_mode_on(device),
        recipe.compile_mode_on(device, world_size, recipe.optim.accumulate),
    )
    compiled = recipe.compiles_on(device)
    assert modes == (teacher, student) if compiled else (teacher, student) == (None, None)


def test_a_jump_of_the_clock_changes_nothing(recipe, monkeypatch):
    """A wall clock that is set back by an hour with each call."""
    run(recipe)
    now = time.time()

    def earlier() -> float:
        nonlocal now
        now -= 3600
        return now

    monkeypatch.setattr(time, "time", earlier)
    jumped = replace(recipe, out=recipe.out + "-jumped")
    outcome = run(jumped)
    assert 0 < outcome.images_per_s < 1e5
    for row in read_csv(Path(jumped.out) / "metrics.csv"):
        assert 0 < float(row["images_per_s"]) < 1e5
    assert column(jumped, "loss") == column(recipe, "loss")
    monkeypatch.setattr(time, "perf_counter", earlier)  # this would be noticed
    assert run(replace(recipe, out=recipe.out + "-noticed")).images_per_s < 0
