"""The frozen teacher: unneeded computation, and weights that don't fit the run."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from fsspec.implementations.memory import MemoryFileSystem

from featkd.cache import CacheConfig
from featkd.cli.main import main
from featkd.models import create_teacher
from featkd.models.features import BlockFeatures
from featkd.runtime.remote import locate
from featkd.train.build_cache import build_cache
from featkd.train.recipe import LossConfig, Recipe, RecipeError, to_yaml
from featkd.train.teacher_checks import check_synsets
from featkd.train.trainer import Trainer
from tests.train.runs import CPU, changed, copy_images, train_teacher


def test_unused_logits_are_not_computed(recipe):
    """With loss.alpha 0, the head does not run; the maps are the same."""

    def used(*_):
        raise AssertionError("the teacher's head ran")

    assert recipe.loss.feature is not None
    for alpha in (0.5, 0.0):
        trainer = Trainer(changed(recipe, loss=dict(alpha=alpha)), CPU)
        batch = next(iter(trainer.components.train_loader))
        model, layers = trainer.components.teacher_model, trainer.components.teacher.layers
        model.head.register_forward_hook(used)
        if alpha:
            with pytest.raises(AssertionError, match="head ran"):
                trainer.components.teacher_outputs(batch)
        else:
            outputs = trainer.components.teacher_outputs(batch)
            assert outputs.logits is None
            assert torch.equal(outputs.maps[0], model.forward_maps(batch.images, layers)[0])
            assert trainer.losses(batch).total.isfinite()


def refuse(recipe: Recipe, message: str) -> None:
    """Checks that training and `featkd cache` raise the error and write nothing."""
    with pytest.raises(RecipeError, match=message):
        Trainer(recipe, CPU)
    with pytest.raises(RecipeError, match=message):
        build_cache(recipe, CacheConfig(), CPU, Path(recipe.out) / "cache", quiet=True)
    assert not Path(recipe.out).exists()


@pytest.fixture
def trained(recipe: Recipe) -> Recipe:
    """`recipe` with a checkpoint of featkd as teacher."""
    return changed(recipe, teacher=dict(checkpoint=train_teacher(recipe), random=False))


def test_a_teacher_of_other_classes_is_refused(trained, tmp_path):
    other = tmp_path / "other"
    there = copy_images(trained, other)
    for split in ("train", "val"):
        (other / split / "green").rename(other / split / "zebra")
    refuse(there, r"last\.pt: was trained on other classes .* class 1 is 'green' there and 'red'")
    for split in ("train", "val"):
        shutil.rmtree(other / split / "zebra")
    refuse(there, r"class 1 is 'green' there and 'red' here; loss.alpha is 0.5")
    maps_only = changed(there, loss=dict(alpha=0.0))
    trainer = Trainer(maps_only, CPU)  # the logits are not used
    assert trainer.components.teacher_model.num_classes == 3
    Trainer(trained, CPU)


def test_a_teacher_is_downloaded_and_tried_once(trained, monkeypatch):
    """`featkd cache` downloads it a second time, for its SHA-256."""
    place = locate("memory://teachers/last.pt")
    place.replace_with(Path(trained.teacher.checkpoint).read_bytes())
    downloads, tried = [], []
    cat_file, forward = MemoryFileSystem.cat_file, BlockFeatures.forward_with_features

    def counted(self, path, *args, **kwargs):
        downloads.append(path)
        return cat_file(self, path, *args, **kwargs)

    def counted_forward(self, images, layers):
        if len(images) == 1 and self.embed_dim == there.teacher.options["embed_dim"]:
            tried.append(layers)
        return forward(self, images, layers)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    monkeypatch.setattr(BlockFeatures, "forward_with_features", counted_forward)
    there = changed(trained, teacher=dict(checkpoint=str(place)))
    Trainer(there, CPU)
    assert (len(downloads), len(tried)) == (1, 1)
    build_cache(there, CacheConfig(), CPU, Path(there.out) / "cache", quiet=True)
    assert (len(downloads), len(tried)) == (3, 2)


def test_a_new_classifier_beside_pretrained_weights_is_refused(recipe, tmp_path):
    """timm reads a file in place of the download."""
    base = timm.create_model("vit_tiny_patch16_224", img_size=16, **recipe.teacher.options)
    file = tmp_path / "pretrained.pth"
    torch.save(base.state_dict(), file)
    mean, std = recipe.data.mean, recipe.data.std
    overlay = {"file": str(file), "num_classes": 1000, "mean": mean, "std": std}

    def pretrained(num_classes: int | None = None, **cfg: object) -> Recipe:
        options = {**recipe.teacher.options, "pretrained_cfg_overlay": {**overlay, **cfg}}
        if num_classes is not None:
            options["num_classes"] = num_classes
        return changed(recipe, teacher=dict(pretrained=True, random=False, options=options))

    refuse(pretrained(3), r"num_classes: 3, but the pretrained .* 1000 classes: .* random")
    refuse(pretrained(0), r"has no classifier, but loss.alpha is 0.5")
    refuse(pretrained(), r"the student has 3 and the teacher 1000")
    maps_only = replace(pretrained(3), loss=replace(recipe.loss, alpha=0.0))
    assert Trainer(maps_only, CPU).components.teacher_model.num_classes == 3


def test_synsets_in_another_order_than_the_weights_are_refused(recipe):
    cfg = timm.get_pretrained_cfg("cait_s24_224").to_dict()
    names = sorted(timm.data.ImageNetInfo("imagenet-1k").label_names())
    check_synsets(recipe, cfg, names)
    check_synsets(recipe, cfg, [f"class{n}" for n in range(1000)])  # their meaning is unknown
    swapped = [*names[:7], names[8], names[7], *names[9:]]
    for classes in (swapped, [*names[:7], "n00000001", *names[8:]]):
        with pytest.raises(RecipeError, match=f"class 7 is '{names[7]}' there and '{classes[7]}'"):
            check_synsets(recipe, cfg, classes)
        check_synsets(replace(recipe, loss=LossConfig(feature="mse")), cfg, classes)


def test_a_teacher_without_classifier_has_no_classes(recipe):
    options = {**recipe.teacher.options, "num_classes": 0}
    teacher = replace(recipe.teacher, options=options)
    refuse(replace(recipe, teacher=teacher), r"^teacher: vit_tiny_patch16_224 has no classifier")
    Trainer(replace(recipe, teacher=teacher, loss=LossConfig(feature="mse")), CPU)


def test_a_teacher_without_weights_is_refused(recipe, capsys, tmp_path):
    recipe = changed(recipe, teacher=dict(random=False))
    refuse(recipe, r"vit_tiny_patch16_224 has no weights; expected teacher.checkpoint \(a file\)")
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    assert main(["distill", str(file)]) == 2
    assert main(["distill", str(file), "--teacher.random", "true", "--optim.epochs", "2"]) == 0
    assert "vit_tiny_patch16_224 has random weights (teacher.random)" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_that_is_not_finite_is_blamed(trained, value, tmp_path):
    model = create_teacher(
        "vit_tiny_patch16_224", img_size=16, num_classes=3, **trained.teacher.options
    )
    state = model.state_dict()
    state["blocks.1.norm1.weight"][3] = value
    for file in (tmp_path / "t.pth", tmp_path / "t.pt"):
        torch.save(state if file.suffix == ".pth" else {"model": state}, file)
        refuse(
            changed(trained, teacher=dict(checkpoint=str(file))),
            rf"{file}: 1 tensors .* blocks.1.norm1.weight",
        )
