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
from featkd.train.recipe import (
    OptimConfig,
    Recipe,
    RecipeError,
    StudentConfig,
    TeacherConfig,
    to_dict,
)
from featkd.train.student_forward import StudentForward
from featkd.train.teacher import Teacher
from featkd.train.trainer import Trainer
from tests.train.runs import CPU, column, run


def test_a_run_learns_and_writes_its_files(recipe):
    recipe = replace(recipe, optim=replace(recipe.optim, epochs=8))
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


@pytest.mark.parametrize("layers", [[-1], [0, -1]])
@pytest.mark.parametrize("arch", ["widelast", "lift"])
def test_losses_are_the_published_objective(recipe, arch, layers):
    """One update against the formula in plain torch."""
    import torch.nn.functional as F

    recipe = replace(
        recipe,
        student=replace(recipe.student, arch=arch),
        loss=replace(recipe.loss, pairs=[(layer, layer) for layer in layers]),
    )
    trainer = Trainer(recipe, CPU)
    components = trainer.components
    components.student.eval()  # no drop-path
    batch = next(iter(components.val_loader))
    fused = type(components.student_forward).__name__ == "LiftForward"
    assert fused == (arch == "lift" and layers == [-1])
    terms = trainer.losses(batch)
    assert components.teacher_model is not None
    logits, maps = components.student.forward_with_features(batch.images, layers)
    t_logits, t_maps = components.teacher_model.forward_with_features(batch.images, layers)
    distances = []
    for s, t in zip(maps, t_maps, strict=True):
        pooled = t if s.shape == t.shape else F.avg_pool1d(t, 2)
        error = (s - pooled).transpose(1, 2)
        z = torch.fft.rfft2(error.reshape(*error.shape[:2], 4, 4), norm="ortho")
        distances.append(torch.stack((z.real, z.imag)).square().mean())
    feature = torch.stack(distances).mean()
    ce = F.cross_entropy(logits, batch.targets, label_smoothing=0.1)
    kl = F.kl_div(
        logits.log_softmax(1), t_logits.log_softmax(1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(terms.total, 0.5 * ce + 0.2 * feature + 0.5 * kl)
    torch.testing.assert_close(terms.features, feature.detach())


def test_an_update_reads_nothing_from_the_device(recipe):
    """On the meta device every read (item, bool, copy to the CPU) is an error."""
    augment = replace(recipe.data.augment, mixup=0.8, cutmix=1.0)
    data, optim = replace(recipe.data, augment=augment), replace(recipe.optim, clip_grad=1.0)
    recipe = replace(recipe, ema_decay=None, data=data, optim=optim)
    trainer = Trainer(recipe, ProcessContext(0, 1, torch.device("meta")))
    trainer.components.student.train()
    for batch in trainer.components.train_loader:
        trainer.step([batch, batch])
    assert trainer.update == 6
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer._meter.means("now")


def test_accumulation_equals_one_large_batch(alone):
    alone.student.options["drop_path_rate"] = 0.0
    alone = replace(alone, ema_decay=None)
    large = Trainer(replace(alone, batch_size=16), CPU)
    small = Trainer(replace(alone, optim=replace(alone.optim, accumulate=2)), CPU)
    assert large.components.global_batch == small.components.global_batch == 16
    (first, *_) = large.components.train_loader
    large.step([first])
    halves = [
        first._replace(images=i, targets=t, bad=[])
        for i, t in zip(first.images.split(8), first.targets.split(8), strict=True)
    ]
    small.step(halves)
    for a, b in zip(
        large.components.student.parameters(), small.components.student.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_are_reduced_once_an_update(alone):
    """Counts the buckets that DDP reduces."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        trainer = Trainer(replace(alone, optim=replace(alone.optim, accumulate=3)), CPU)
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
    optim = replace(
        alone.optim, step_on="epoch", epochs=6, warmup_epochs=2, lr=4e-3, lr_batch=16, min_lr=1e-5
    )
    run(replace(alone, optim=optim))
    peak = 4e-3 * 8 / 16
    expected = [1e-6, 1e-6 + (peak - 1e-6) / 2] + [
        1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * epoch / 6)) / 2 for epoch in (2, 3, 4, 5)
    ]
    rates = [float(x) for x in column(alone, "lr")]
    assert rates == pytest.approx([rate for rate in expected for _ in range(6)], rel=1e-6)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_gradients_are_clipped_at_their_true_norm(alone, amp):
    """With loss scaling the gradients must be unscaled first."""
    norms = []
    trainer = Trainer(
        replace(alone, amp=amp, optim=replace(alone.optim, clip_grad=1e-3), ema_decay=None), CPU
    )
    original = trainer.components.optimizer.step

    def note_norm(*args, **options):
        grads = [p.grad for p in trainer.components.student.parameters()]
        norm = torch.nn.utils.get_total_norm(grads).item()
        if math.isfinite(norm):  # a fused optimizer skips gradients that overflow
            norms.append(norm)
        return original(*args, **options)

    trainer.components.optimizer.step = note_norm  # type: ignore[method-assign]
    batch = next(iter(trainer.components.train_loader))
    for _ in range(20):  # fp16: updates are skipped until the scale no longer overflows
        trainer.step([batch])
    assert len(norms) >= 15
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-2)


def test_weight_decay_spares_biases_norms_and_embeddings(alone):
    trainer = Trainer(alone, CPU)
    names = {id(p): name for name, p in trainer.components.student.named_parameters()}
    decayed, spared = set(), set()
    for group in trainer.components.optimizer.param_groups:
        assert group["weight_decay"] in (0.0, 0.05)
        (decayed if group["weight_decay"] else spared).update(names[id(p)] for p in group["params"])
    assert decayed | spared == set(names.values())
    assert {"pos_embed", "cls_token", "head.bias", "norm.weight"} <= spared
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert {"blocks.1.proj_in.weight", "head.weight", "patch_embed.proj.weight"} <= decayed


def test_drop_path_differs_from_update_to_update(alone):
    alone.student.options["drop_path_rate"] = 0.5
    trainer = Trainer(
        replace(alone, ema_decay=None, optim=replace(alone.optim, lr=1e-30, min_lr=0)), CPU
    )
    trainer.components.student.train()
    batch = next(iter(trainer.components.train_loader))
    assert len({trainer.step([batch]).total.item() for _ in range(6)}) > 1


def test_model_errors_name_the_part_of_the_recipe(recipe):
    student, teacher = recipe.student, recipe.teacher
    with pytest.raises(RecipeError, match=r"^student: .*patchsize"):
        Trainer(replace(recipe, student=replace(student, options={"patchsize": 4})), CPU)
    with pytest.raises(RecipeError, match=r"^teacher.name: .*no model 'vit_tinny"):
        Trainer(replace(recipe, teacher=replace(teacher, name="vit_tinny_patch16_224")), CPU)
    with pytest.raises(RecipeError, match=r"optim.optimizer: timm has no 'adamv'; did you mean"):
        Trainer(replace(recipe, optim=replace(recipe.optim, optimizer="adamv")), CPU)


def test_spectral_pairs_of_a_swin_student_have_a_grid_each(recipe):
    swin = {
        "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2),
    }  # fmt: skip
    recipe = replace(
        recipe,
        student=StudentConfig(base="swin_tiny_patch4_window7_224", options=dict(swin)),
        teacher=TeacherConfig("swin_tiny_patch4_window7_224", random=True, options=dict(swin)),
        loss=replace(recipe.loss, pairs=[(0, 0), (1, 1)]),
    )
    trainer = Trainer(recipe, CPU)
    assert trainer.components.loss.features.grids == [(8, 8), (4, 4)]
    terms = trainer.losses(next(iter(trainer.components.val_loader)))
    assert terms.total.isfinite()


def test_teacher_is_not_trained(recipe):
    trainer = Trainer(recipe, CPU)
    before = {k: v.clone() for k, v in trainer.components.teacher_model.state_dict().items()}
    trainer.run(quiet=True)
    assert all(
        torch.equal(before[k], v) for k, v in trainer.components.teacher_model.state_dict().items()
    )
    assert not trainer.components.teacher_model.training


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


def test_widths_and_classes_that_do_not_fit(recipe):
    student, teacher = recipe.student, recipe.teacher
    message = r"student.teacher_dim: 36, but .* has 24 channels; expected 24"
    with pytest.raises(RecipeError, match=message):
        Trainer(replace(recipe, student=replace(student, teacher_dim=36)), CPU)
    many = replace(teacher, options=teacher.options | {"num_classes": 7})
    with pytest.raises(RecipeError, match=r"student has 3 and the teacher 7"):
        Trainer(replace(recipe, teacher=many), CPU)
    with pytest.raises(RecipeError, match=r"student.num_classes: 5, but .* 3 class folders"):
        Trainer(replace(recipe, student=replace(student, num_classes=5)), CPU)
    small = replace(recipe.optim, lr=2e-3, lr_batch=1024, min_lr=1e-4)
    with pytest.raises(RecipeError, match=r"min_lr: 0.0001 is above .* 1.56e-05 .*lr_batch: 8 if"):
        Trainer(replace(recipe, optim=small), CPU)
    with pytest.raises(RecipeError, match=r"optim.accumulate: 7 .* an epoch has 6"):
        Trainer(replace(recipe, optim=replace(recipe.optim, accumulate=7)), CPU)


def test_one_class_is_refused_before_anything_is_trained(recipe, images, tmp_path):
    """Otherwise the first evaluation would fail."""
    for split in ("train", "val"):
        shutil.copytree(images / split / "red", tmp_path / "one" / split / "red")
    one = replace(recipe, data=replace(recipe.data, path=str(tmp_path / "one")))
    with pytest.raises(RecipeError, match=r"data.path: .*/one has one class \(red\); .* two"):
        Trainer(one, CPU)
    student = replace(recipe.student, num_classes=1)
    with pytest.raises(RecipeError, match=r"student.num_classes: expected >= 2, got 1"):
        Trainer(replace(recipe, student=student), CPU)


@pytest.mark.parametrize("arch", ["widelast", "lift"])
def test_compiled_run(recipe, arch):
    recipe = replace(recipe, student=replace(recipe.student, arch=arch))
    recipe = replace(recipe, compile=True, optim=replace(recipe.optim, epochs=1, warmup_epochs=0))
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
