"""Runs without labels: losses, validation, the best checkpoint, caches, resuming, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from featkd.cli.main import main
from featkd.data import build_loader
from featkd.train import load_trained
from featkd.train.checkpoint import load
from featkd.train.dryrun import dry_run
from featkd.train.logs import read_csv
from featkd.train.recipe import LossConfig, PooledConfig, Recipe, RecipeError, to_dict, to_yaml
from featkd.train.trainer import Trainer
from tests.forking import Server
from tests.test_ranks import succeed
from tests.train.runs import (
    CPU,
    changed,
    column,
    interrupt,
    knn_accuracy,
    refuse,
    run,
    same_weights,
    with_cache,
)


@pytest.fixture
def unlabelled(recipe: Recipe) -> Recipe:
    """A run of 2 epochs of 6 updates, with the feature loss alone; kNN over 3 classes."""
    return changed(
        recipe, student=dict(arch="lift"), data=dict(labels="none"), loss=LossConfig(feature="mse")
    )


@pytest.fixture
def flat(unlabelled: Recipe, tmp_path: Path) -> Recipe:
    """A run on one folder of images, of which some are held out."""
    root = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for number in range(40):
        path = root / f"day{number % 3}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    options: dict[str, Any] = {"path": str(root), "train_split": ".", "val_split": None}
    options["val_fraction"] = 0.2
    return changed(unlabelled, data=dict(**options))


def scores_of(recipe: Recipe, name: str) -> list[float]:
    return [float(row[name]) for row in read_csv(Path(recipe.out) / "eval.csv")]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize(("arch", "layers"), [("plain", [-1]), ("lift", [-1]), ("lift", [0, -1])])
def test_losses_are_those_of_features_and_logits(unlabelled, arch, layers, alpha):
    """One batch against the formula in plain torch; its labels would be an error if read."""
    pairs = [(layer, layer) for layer in layers]
    loss = LossConfig(feature="mse", beta=2.0, alpha=alpha, tau=3.0, pairs=pairs)
    trainer = Trainer(changed(unlabelled, student=dict(arch=arch), loss=loss), CPU)
    components = trainer.components
    components.student.eval()  # no drop-path
    batch = next(iter(components.train_loader))
    terms = trainer.losses(batch._replace(targets=torch.full((8,), -7)))
    logits, maps = components.student.forward_with_features(batch.images, layers)
    t_logits, t_maps = components.teacher_model.forward_with_features(batch.images, layers)
    widths = [min(s.shape[2], t.shape[2]) for s, t in zip(maps, t_maps, strict=True)]
    pooled = [F.adaptive_avg_pool1d(t, w) for t, w in zip(t_maps, widths, strict=True)]
    feature = torch.stack([F.mse_loss(s, t) for s, t in zip(maps, pooled, strict=True)]).mean()
    expected = 2 * 0.2 * feature
    if alpha:
        assert logits.shape == t_logits.shape == (8, 1000)  # the teacher's classes
        log_s, log_t = (x.div(3.0).log_softmax(1) for x in (logits, t_logits))
        kl = F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
        expected = expected + alpha * 9 * kl
    else:
        assert components.num_classes == 0
    torch.testing.assert_close(terms.total, expected)
    torch.testing.assert_close(terms.features, feature.detach())


def test_a_run_is_scored_by_the_losses_and_knn(unlabelled):
    outcome = run(unlabelled)
    out = Path(unlabelled.out)
    rows = read_csv(out / "eval.csv")
    assert [r["weights"] for r in rows] == ["model", "ema"] * 2
    assert {(r["top1"], r["top5"], r["images"]) for r in rows} == {("", "", "12")}
    losses = [float(x) for x in column(unlabelled, "feature_loss")]
    assert sum(losses[-3:]) < sum(losses[:3])
    # independently, from the stored weights
    trainer = Trainer(replace(unlabelled, out=f"{out}-other"), CPU)
    teacher, student = trainer.components.teacher_model, load_trained(out / "last.pt", "model")
    assert student.pretrained_cfg["num_classes"] == 0  # type: ignore[attr-defined]
    batches = list(trainer.components.val_loader)
    images, labels = (torch.cat([b[i] for b in batches]) for i in (0, 1))
    with torch.no_grad():
        features, (found,) = student.forward_with_features(images, [-1])
        (wanted,) = teacher.forward_maps(images, [-1])
    scores = outcome.scores["model"]
    assert scores["feature_loss"] == pytest.approx(F.mse_loss(found, wanted).item(), rel=1e-5)
    assert scores["loss"] == pytest.approx(0.2 * scores["feature_loss"])
    assert scores["logits_loss"] == 0
    assert scores["knn_top1"] == pytest.approx(knn_accuracy(features, labels))
    assert scores["knn_top1"] > 60  # chance is 33; the colours are easy
    best = load(out / "best.pt")["best"]
    assert best == outcome.best
    assert best["knn_top1"] == max(scores_of(unlabelled, "knn_top1"))
    state = load(out / "last.pt")
    assert (state["classes"], state["num_classes"]) == ([], 0)


def test_without_classes_the_lowest_loss_is_best(flat, capsys):
    path = Path(flat.out).parent / "flat.yaml"
    path.write_text(to_yaml(flat))
    assert main(["distill", str(path), "--student.arch", "plain"]) == 0
    output = capsys.readouterr()
    assert "the loss (no kNN, which needs data.val_split" in output.err
    assert "2 tensors are frozen" in output.err
    losses = scores_of(flat, "loss")
    assert {r["knn_top1"] for r in read_csv(Path(flat.out) / "eval.csv")} == {""}
    best = load(Path(flat.out) / "best.pt")["best"]
    assert best["loss"] == min(losses)
    assert f"best loss {min(losses):.4f} (best.pt: {best['weights']} weights" in output.out
    last = load(Path(flat.out) / "last.pt")["scores"]
    averaged_is_better = last["ema"]["loss"] < last["model"]["loss"]
    chosen, named = (load_trained(Path(flat.out) / "last.pt", kind).state_dict() for kind in (
        "auto", "model_ema" if averaged_is_better else "model"))  # fmt: skip
    assert all(torch.equal(chosen[name], named[name]) for name in named)


def test_a_cache_gives_the_same_losses_and_no_validation_loss(unlabelled, flat, tmp_path):
    for recipe, has_classes in ((unlabelled, True), (flat, False)):
        recipe = replace(recipe, out=f"{recipe.out}{has_classes}")
        cached = with_cache(recipe, tmp_path / f"cache{has_classes}")
        run(recipe)
        trainer = Trainer(cached, CPU)
        assert "no loss, because a cache holds" in trainer.components.notes[-1]
        outcome = trainer.run(quiet=True)
        assert column(cached, "loss") == column(recipe, "loss")
        assert same_weights(Path(cached.out) / "last.pt", Path(recipe.out) / "last.pt")
        assert (Path(cached.out) / "best.pt").exists() == bool(outcome.best) == has_classes
        if has_classes:
            assert scores_of(cached, "knn_top1") == scores_of(recipe, "knn_top1")
            assert {r["loss"] for r in read_csv(Path(cached.out) / "eval.csv")} == {""}
            refuse(cached, r"data\.labels: 'none', not None", data=dict(labels="folders"))


def test_resuming_repeats_the_unbroken_run(unlabelled, tmp_path):
    whole = replace(unlabelled, out=str(tmp_path / "whole"))
    run(whole)
    interrupt(Trainer(unlabelled, CPU), 6)
    assert len(scores_of(unlabelled, "knn_top1")) == 2
    run(unlabelled)
    for name in ("knn_top1", "loss", "feature_loss"):
        assert scores_of(unlabelled, name) == scores_of(whole, name)
    for file in ("last.pt", "best.pt"):
        assert same_weights(Path(unlabelled.out) / file, Path(whole.out) / file)
    with pytest.raises(RecipeError, match=r"data\.labels: 'none' -> 'folders'"):
        run(changed(unlabelled, data=dict(labels="folders")))


@pytest.mark.parametrize(
    ("arch", "distributed", "projects"),
    [("plain", "ddp", False), ("lift", "ddp", False), ("plain", "fsdp", True)],
)
def test_two_processes_equal_one(unlabelled, server: Server, tmp_path, arch, distributed, projects):
    """A plain student's last norm gets no gradient, which DDP would wait for."""
    path = tmp_path / "recipe.yaml"
    recipe = changed(
        unlabelled, data=dict(augment=dict(random_erasing=0.0)), distributed=distributed
    )
    if projects:
        recipe = changed(recipe, loss=dict(projector="linear", pooled=PooledConfig(weight=0.5)))
    path.write_text(to_yaml(recipe))
    words = ["distill", str(path), "--student.arch", arch, "--student.options.drop_path_rate", "0"]
    assert main([*words, "--out", str(tmp_path / "one"), "--batch_size", "16"]) == 0
    succeed(server.ranks(2, *words, "--out", tmp_path / "two", "--batch_size", 8))
    one, two = (read_csv(tmp_path / name / "eval.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert (a["images"], a["knn_top1"]) == (b["images"], b["knn_top1"]) == ("12", a["knn_top1"])
        for name in ("loss", "feature_loss", "pooled_loss"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4)
        assert (float(a["pooled_loss"]) > 0) == projects


def test_mixed_images_need_no_labels(unlabelled):
    augment = replace(unlabelled.data.augment, mixup=0.8, cutmix=1.0)
    trainer = Trainer(changed(unlabelled, data=dict(augment=augment)), CPU)
    seen = []
    trainer.components.student_forward.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    batch = next(iter(trainer.components.train_loader))
    trainer.losses(batch)
    assert not torch.equal(seen[0], batch.images)


def test_the_dry_run_names_the_objective(flat):
    report = dry_run(flat, CPU)
    assert "0.2 mse features (layers -1 <- -1)\n" in report
    assert " CE " not in report
    assert "no labels" in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.feature": None, "teacher": None}, "data.labels: none, but without labels the loss"),
        ({"student.num_classes": 10}, "student.num_classes: 10, but nothing trains a classifier"),
        (
            {"loss.alpha": 0.5, "student.num_classes": 10, "teacher.options.num_classes": 5},
            "the student has 10 and the teacher 5",
        ),
        (
            {"loss.alpha": 0.5, "teacher.options.num_classes": 0},
            "has no classifier, but loss.alpha is 0.5",
        ),
        ({"data.labels": "some"}, "data.labels"),
        ({"data.train_split": "nowhere"}, 'use data.train_split="." with data.val_split=null'),
    ],
)
def test_unusable_recipes(unlabelled, tmp_path, capsys, changes, message):
    recipe = to_dict(unlabelled)
    for field, value in changes.items():
        *sections, name = field.split(".")
        place = recipe
        for section in sections:
            place = place[section]
        place[name] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["distill", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_cache_without_classifier_has_no_logits(unlabelled, tmp_path):
    """Its rows hold the pooled feature in place of logits."""
    options = unlabelled.teacher.options | {"num_classes": 0}
    recipe = changed(unlabelled, teacher=dict(options=options))
    cached = with_cache(recipe, tmp_path / "cache")
    run(cached)
    refuse(cached, r"has no classifier, but loss\.alpha is 0\.5", loss=dict(alpha=0.5))


def test_an_unlabelled_run_is_a_teacher(unlabelled, tmp_path):
    """Its checkpoint has no classifier, so that only its maps are of use."""
    plain = changed(unlabelled, student=dict(arch="plain"))
    run(plain)
    next_run = changed(
        plain,
        teacher=dict(
            random=False, checkpoint=f"{plain.out}/last.pt", options=dict(plain.student.options)
        ),
        student=dict(arch="plain"),
        out=str(tmp_path / "next"),
    )
    loader = build_loader(plain.data, split="val", batch_size=4)
    batch = next(iter(loader))
    trainer = Trainer(next_run, CPU)
    (found,) = trainer.components.teacher_outputs(batch).maps
    (expected,) = load_trained(f"{plain.out}/last.pt").forward_maps(batch.images, [-1])
    assert torch.equal(found, expected)
    refuse(next_run, "has no classifier", loss=dict(alpha=0.5))
