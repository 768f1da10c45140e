"""Runs with trained projectors and pooled features."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featkd.cli.main import main
from featkd.train.checkpoint import CheckpointError, load
from featkd.train.dryrun import dry_run
from featkd.train.logs import read_csv
from featkd.train.meter import TrainingDiverged
from featkd.train.recipe import (
    LossConfig,
    PooledConfig,
    Recipe,
    RecipeError,
    StudentConfig,
    TeacherConfig,
    to_yaml,
)
from featkd.train.student_forward import LiftForward
from featkd.train.trained import load_trained
from featkd.train.trainer import Trainer
from tests.test_ranks import EQUAL, succeed
from tests.train.runs import (
    CPU,
    changed,
    check_losses_close,
    column,
    interrupt,
    refuse,
    run,
    same_weights,
)


def with_loss(recipe: Recipe, arch: str = "plain", **fields) -> Recipe:
    return changed(recipe, student=dict(arch=arch), loss=dict(**fields))


@pytest.fixture
def projected(recipe) -> Recipe:
    """A plain student with a projector for its map and one for its pooled feature."""
    return with_loss(recipe, projector="linear_norm", pooled=PooledConfig(weight=0.7))


def distance(error: Tensor, metric: str) -> Tensor:
    if metric == "spectral":
        error = error.transpose(1, 2)
        z = torch.fft.rfft2(error.reshape(*error.shape[:2], 4, 4), norm="ortho")
        error = torch.stack((z.real, z.imag))
    return error.square().mean()


@pytest.mark.parametrize(
    ("arch", "layers", "fields", "projectors"),
    [
        ("plain", [-1], {"projector": "linear", "feature": "mse"}, ["0"]),
        ("plain", [0, -1], {"projector": "linear_norm", "feature": "spectral"}, ["0", "1"]),
        ("widelast", [0, -1], {"projector": "linear", "feature": "spectral"}, ["0"]),
        ("lift", [-1, 0], {"projector": "linear_norm", "feature": "mse"}, ["1"]),
        ("lift", [-1], {"pooled": PooledConfig(0.7, "mse"), "feature": "spectral"}, ["pooled"]),
        (
            "plain",
            [0, -1],
            {"projector": "linear", "feature": "mse", "pooled": PooledConfig(2.0)},
            ["0", "1", "pooled"],
        ),
        ("plain", [-1], {"feature": None, "pooled": PooledConfig(3.0)}, ["pooled"]),
        ("widelast", [-1], {"feature": "spectral"}, []),
        ("widelast", [0, -1], {"feature": "mse"}, []),
        ("lift", [-1], {"feature": "spectral"}, []),
        ("lift", [0, -1], {"feature": "spectral"}, []),
    ],
)
def test_losses_and_gradients_against_plain_torch_in_float64(
    recipe, arch, layers, fields, projectors
):
    """The maps are the models'; projection, losses and their gradients are computed anew."""
    pairs = [(layer, layer) for layer in layers]
    recipe = with_loss(recipe, arch, pairs=pairs, **fields)
    trainer = Trainer(recipe, CPU)
    components, loss = trainer.components, recipe.loss
    assert list(components.projectors) == projectors
    fused = isinstance(components.student_forward, LiftForward)
    assert fused == (arch == "lift" and layers == [-1] and not projectors)
    components.student.eval()  # no drop-path
    batch = next(iter(components.val_loader))
    terms = trainer.losses(batch)
    terms.total.backward()
    trained = dict(components.projectors.named_parameters())

    ours = {name: p.detach().double().requires_grad_() for name, p in trained.items()}
    asked = layers if loss.feature else []
    if loss.pooled is not None:
        asked = [*asked, "pooled"]
    with torch.no_grad():
        logits, maps = components.student.forward_with_features(batch.images, asked)
        t_logits, t_maps = components.teacher_model.forward_with_features(batch.images, asked)
    distances, pooled = [], torch.zeros(())
    for number, (layer, s, t) in enumerate(zip(asked, maps, t_maps, strict=True)):
        key = "pooled" if layer == "pooled" else str(number)
        s, t = s.double(), t.double()
        if key in projectors:
            s = s @ ours[f"{key}.proj.weight"].T + ours.get(f"{key}.proj.bias", 0.0)
        if f"{key}.norm.weight" in ours:
            mean, var = s.mean(-1, keepdim=True), s.var(-1, correction=0, keepdim=True)
            s = (s - mean) / (var + 1e-5).sqrt()
            s = s * ours[f"{key}.norm.weight"] + ours[f"{key}.norm.bias"]
        if s.shape != t.shape:
            t = F.avg_pool1d(t, 2)
        if layer != "pooled":
            distances.append(distance(s - t, loss.feature))
        elif loss.pooled.metric == "mse":
            pooled = (s - t).square().mean()
        else:
            cosines = (s * t).sum(-1) / (s.square().sum(-1) * t.square().sum(-1)).sqrt()
            pooled = 1 - cosines.mean()
    features = torch.stack(distances).mean() if distances else torch.zeros(())
    ce = F.cross_entropy(logits, batch.targets, label_smoothing=0.1)
    kl = F.kl_div(
        logits.log_softmax(1), t_logits.log_softmax(1), log_target=True, reduction="batchmean"
    )
    weight = 0.0 if loss.pooled is None else loss.pooled.weight
    total = 0.5 * ce + 0.5 * kl + 0.2 * features + weight * pooled
    found = (terms.total, terms.features, terms.pooled)
    for x, expected in zip(found, (total, features, pooled), strict=True):
        torch.testing.assert_close(x.double(), expected.double(), rtol=1e-5, atol=1e-6)
    if ours:
        total.backward()
    for name, p in ours.items():
        torch.testing.assert_close(trained[name].grad.double(), p.grad, rtol=1e-4, atol=1e-7)
    assert [n for n, p in components.student.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("projector", "widths"), [("linear", 16), ("none", 12)])
def test_pairs_of_several_widths_and_grids(recipe, projector, widths):
    """A Swin student and teacher, whose stages differ in both."""
    small = {
        "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2),
    }  # fmt: skip
    swin = "swin_tiny_patch4_window7_224"
    recipe = changed(
        recipe,
        student=StudentConfig(base=swin, options=dict(small)),
        teacher=TeacherConfig(swin, random=True, options=small | {"embed_dim": widths}),
        loss=dict(pairs=[(0, 0), (1, 1)], projector=projector, feature="spectral"),
    )
    trainer = Trainer(recipe, CPU)
    projectors, grids = trainer.components.projectors, trainer.components.loss.features.grids
    found = [(p.proj.in_features, p.proj.out_features, p.grid) for p in projectors.values()]
    if projector == "linear":
        assert found == [(12, 16, (8, 8)), (24, 32, (4, 4))]
    else:
        assert (found, grids) == ([], [(8, 8), (4, 4)])
    assert trainer.losses(next(iter(trainer.components.val_loader))).total.isfinite()


def test_a_teacher_of_another_grid_and_width_is_resized_then_compared(recipe):
    """Maps of 2 x 2 tokens, for a student of 4 x 4."""
    options = recipe.teacher.options | {"patch_size": 8}
    recipe = changed(recipe, teacher=dict(options=options))
    pairs = [(0, 0), (1, 1)]
    loss = dict(feature="mse", pairs=pairs, projector="linear", pooled=PooledConfig())
    trainer = Trainer(with_loss(recipe, **loss), CPU)
    assert list(trainer.components.projectors) == ["0", "1", "pooled"]
    trainer.components.student.eval()
    batch = next(iter(trainer.components.val_loader))
    layers, projectors = [0, 1, "pooled"], trainer.components.projectors
    terms = trainer.losses(batch)
    with torch.no_grad():
        _, maps = trainer.components.student.forward_with_features(batch.images, layers)
        _, teacher = trainer.components.teacher_model.forward_with_features(batch.images, layers)
        distances = []
        for number in range(2):
            t = teacher[number].transpose(1, 2).reshape(-1, 24, 2, 2).double()
            t = F.interpolate(t, (4, 4), mode="bilinear", antialias=True).flatten(2).mT
            distances.append((projectors[str(number)].proj(maps[number]) - t).square().mean())
        cosine = F.cosine_similarity(projectors["pooled"].proj(maps[2]), teacher[2], dim=-1)
    torch.testing.assert_close(terms.features.double(), torch.stack(distances).mean())
    torch.testing.assert_close(terms.pooled, 1 - cosine.mean())


def test_projectors_depend_on_the_seed_alone(projected):
    def weights(recipe: Recipe) -> Tensor:
        projectors = Trainer(recipe, CPU).components.projectors
        return nn.utils.parameters_to_vector(projectors.parameters())

    first = weights(projected)
    deeper = projected.teacher.options | {"depth": 3}
    assert torch.equal(first, weights(changed(projected, teacher=dict(options=deeper))))
    assert not torch.equal(first, weights(replace(projected, seed=1)))


def test_the_optimizer_decays_matrices_alone(projected):
    """Decays those of student and projectors, but no embedding."""
    recipe = with_loss(projected, "widelast", pairs=[(0, 0), (1, 1)])
    components = Trainer(recipe, CPU).components
    modules = (components.projectors, components.student)
    names = {id(p): name for module in modules for name, p in module.named_parameters()}
    decayed, spared = set(), set()
    for group in components.optimizer.param_groups:
        assert group["weight_decay"] in (0.0, 0.05)
        (decayed if group["weight_decay"] else spared).update(names[id(p)] for p in group["params"])
    assert decayed | spared == set(names.values())
    assert len(names) == len(components.parameters)
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert {"blocks.1.proj_in.weight", "head.weight", "patch_embed.proj.weight"} <= decayed
    assert {"0.proj.weight", "pooled.proj.weight"} <= decayed
    assert {"0.norm.weight", "0.norm.bias", "pooled.proj.bias", "head.bias"} <= spared
    assert {"pos_embed", "cls_token", "norm.weight"} <= spared


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_projectors_are_trained_clipped_and_checked(projected, amp):
    """Gradients are clipped at the norm of student and projectors together."""
    trainer = Trainer(changed(projected, amp=amp, optim=dict(clip_grad=1e-2)), CPU)
    components, norms = trainer.components, []
    before = [p.clone() for p in components.projectors.parameters()]
    step = components.optimizer.step

    def note_norm(*args, **options):
        norms.append(nn.utils.get_total_norm(p.grad for p in components.parameters).item())
        return step(*args, **options)

    components.optimizer.step = note_norm
    components.student.train()
    batch = next(iter(components.train_loader))
    terms = [trainer.step([batch]) for _ in range(12)]
    norms = [norm for norm in norms if math.isfinite(norm)]  # fp16: until none overflows
    assert norms == pytest.approx([1e-2] * len(norms), rel=1e-2)
    assert len(norms) > 5
    after = list(components.projectors.parameters())
    assert {p.dtype for p in after} == {torch.float32}
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert terms[-1].pooled < terms[0].pooled
    assert {terms[-1].pooled.dtype, terms[-1].features.dtype} == {torch.float32}
    exact = Trainer(projected, CPU)
    exact.components.student.train()
    assert terms[0].pooled.item() == pytest.approx(exact.step([batch]).pooled.item(), rel=0.05)
    with torch.no_grad():
        after[-1][0] = math.inf
    with pytest.raises(TrainingDiverged, match="norm of the weights"):
        trainer._save(None)


def test_a_compiled_run_has_the_losses_of_an_eager_one(projected, monkeypatch):
    """With the graphs of torch.compile, but not Inductor, which takes minutes."""
    projected.student.options["drop_path_rate"] = 0.0
    compile_module, compiled = nn.Module.compile, []

    def compile_fast(module: nn.Module, **_: object) -> None:
        compiled.append(type(module).__name__)
        if compiled[-1] != "Teacher":
            compile_module(module, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", compile_fast)
    recipe = changed(projected, optim=dict(epochs=1, warmup_epochs=0))
    found = []
    for compile in (True, False):
        trainer = Trainer(replace(recipe, compile=compile), CPU)
        trainer.components.student.train()
        found.append([trainer.step([batch]).total.item() for batch in trainer.batches(0)])
    assert compiled == ["Teacher", "StudentForward"]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("distributed", ["ddp", "fsdp"])
def test_two_processes_train_the_projectors_of_one(projected, server, tmp_path, distributed):
    """Equal to one process with the whole batch, but for the order of sums; then resumed."""
    path = tmp_path / "projected.yaml"
    path.write_text(to_yaml(projected))
    words = ["distill", path, *EQUAL, "--optim.clip_grad", 0.5]
    words += ["--optim.epochs", 1, "--optim.warmup_epochs", 0]
    assert main([*map(str, words), "--out", str(tmp_path / "one"), "--batch_size", "16"]) == 0
    words += ["--batch_size", 4, "--optim.accumulate", 2, "--distributed", distributed]
    succeed(server.ranks(2, *words, "--out", tmp_path / "two"))
    one, two = (load(tmp_path / name / "last.pt")["projectors"] for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=2e-5)
    initial = Trainer(projected, CPU).components.projectors.state_dict()
    assert not any(torch.equal(initial[name], x) for name, x in one.items())
    check_losses_close(tmp_path / "one", tmp_path / "two", "pooled_loss")
    succeed(server.ranks(2, *words, "--out", tmp_path / "two", "--optim.epochs", 2))


def test_a_resumed_run_is_bit_equal_and_the_student_is_saved_without(projected, tmp_path):
    loss = dict(pairs=[(0, 1), (-1, -1)], projector="linear")
    policy = dict(optim=dict(accumulate=2), checkpoint=dict(every_updates=2))
    projected = changed(projected, loss=loss, **policy)
    whole = replace(projected, out=str(tmp_path / "whole"))
    run(whole)
    interrupt(Trainer(projected, CPU), 5)
    run(projected)
    for name in ("loss", "feature_loss", "pooled_loss"):
        assert column(projected, name) == column(whole, name)
    one, other = (load(Path(out) / "last.pt") for out in (projected.out, whole.out))
    assert sorted(one["projectors"]) == sorted(
        f"{part}.proj.{kind}" for part in ("0", "1", "pooled") for kind in ("weight", "bias")
    )
    assert all(torch.equal(x, other["projectors"][n]) for n, x in one["projectors"].items())
    assert same_weights(Path(projected.out) / "last.pt", Path(whole.out) / "last.pt")
    names = set(load_trained(Path(projected.out) / "last.pt").state_dict())
    assert names == set(one["model"]) == set(one["model_ema"])
    assert not [name for name in names if "proj.weight" in name and "attn" not in name][1:]


@pytest.mark.parametrize(
    ("change", "field", "forced"),
    [
        (
            {"projector": "none"},
            "loss.projector: 'linear_norm' -> 'none'",
            r"has projectors of layer pairs 0 \(linear_norm, 12 -> 24\), pooled \(.*\), the recipe "
            r"asks for projectors of layer pairs pooled",
        ),
        (
            {"projector": "linear"},
            "loss.projector: 'linear_norm' -> 'linear'",
            r"pairs 0 \(linear_norm, 12 -> 24\), .* asks for .* pairs 0 \(linear, 12 -> 24\)",
        ),
        ({"pooled": None}, "loss.pooled: .* -> null", r"pooled \(linear, 12 -> 24\), the recipe"),
        ({"pairs": [(0, 0), (1, 1)]}, "loss.pairs", r"asks for projectors of layer pairs 0 .*, 1"),
    ],
)
def test_other_projectors_are_another_experiment(projected, change, field, forced):
    run(changed(projected, optim=dict(epochs=1, warmup_epochs=0)))
    other = changed(projected, loss=dict(**change))
    other = changed(other, optim=dict(warmup_epochs=0))
    with pytest.raises(RecipeError, match=f"another experiment: {field}"):
        run(other)
    with pytest.raises(CheckpointError, match=forced):
        run(other, "force")


def test_a_run_of_an_earlier_version_continues(recipe):
    """Its checkpoint has three mean losses and other recipe fields, its tables fewer columns."""
    recipe = changed(recipe, checkpoint=dict(every_updates=4), log_every=3)
    run(changed(recipe, optim=dict(epochs=2)))
    last = Path(recipe.out) / "last.pt"
    state = torch.load(last)
    assert "projectors" not in state
    state["meter"] = state["meter"][:3]
    for name in ("projector", "pooled"):
        del state["recipe"]["loss"][name]
    torch.save(state, last)
    tables = [Path(recipe.out) / "metrics.csv", Path(recipe.out) / "eval.csv"]
    for table in tables:  # the last columns of metrics.csv and of eval.csv are of later versions
        lines = [line.split(",")[:7] for line in table.read_text().splitlines()]
        table.write_text("".join(",".join(line) + "\n" for line in lines))
    before = [read_csv(table) for table in tables]
    assert [len(row) for rows in before for row in rows] == [7] * 8
    run(changed(recipe, optim=dict(epochs=3)))
    rows, scores = map(read_csv, tables)
    assert [row["update"] for row in rows] == ["3", "6", "9", "12", "15", "18"]
    assert [row["pooled_loss"] for row in rows] == [""] * 4 + ["0.0"] * 2
    assert [row["weights"] for row in scores] == ["model", "ema"] * 3
    for old, new in zip(before, (rows, scores), strict=True):
        for row, kept in zip(old, new, strict=False):
            assert kept | row == kept
    assert not list(Path(recipe.out).glob("*.bak"))


def test_the_dry_run_lists_projectors(projected):
    report = dry_run(projected, CPU)
    assert "layer pair [1, 1]: projector (linear_norm) from 12 to 24 channels, 336 param" in report
    assert "pooled features: projector (linear) from 12 to 24 channels, 312 parameters" in report
    assert "0.7 cosine pooled features" in report


def test_a_projector_that_nothing_needs_is_noted(recipe):
    components = Trainer(with_loss(recipe, "lift", projector="linear"), CPU).components
    note = "loss.projector: linear is not used: the widths of pairs agree"
    assert note in components.notes
    assert not components.projectors


def test_a_last_map_of_another_width_than_asked_for_is_refused(recipe):
    wrong = changed(recipe, student=dict(teacher_dim=36), loss=dict(projector="linear"))
    refuse(wrong, r"student.teacher_dim: 36, .* 24 channels; expected 24")


@pytest.mark.parametrize(("side", "more"), [("student", {}), ("teacher", {"num_classes": 0})])
def test_a_model_that_does_not_pool_is_refused(projected, side, more):
    """Under timm's global_pool '' a head returns every token."""
    options = getattr(projected, side).options | {"global_pool": ""} | more
    fields = {side: dict(options=options), "loss": dict(alpha=0.0)}
    refuse(projected, rf"loss.pooled: .*{side}", **fields)


def test_pooled_features_alone_are_a_use_of_the_teacher():
    assert Recipe(teacher=TeacherConfig(), loss=LossConfig(pooled=PooledConfig())).teacher
