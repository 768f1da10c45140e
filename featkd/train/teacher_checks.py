"""Checks that a teacher's weights belong to the images and classes of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg
from torch import nn

from featkd.models.features import FeatureModel
from featkd.models.students import check_timm_name
from featkd.runtime.remote import AnyPath, Location, locate, seekable
from featkd.train.recipe import Recipe, RecipeError


def check_teacher(
    recipe: Recipe, classes: Sequence[str], checkpoint: Location | None = None
) -> dict[str, Any]:
    """Checks the teacher's source of weights against the run, before the teacher is built.

    Args:
        recipe: the run; its teacher is not null.
        classes: class names of the training set.
        checkpoint: location of `teacher.checkpoint` if it is known.

    Returns:
        Result of `read_run`.

    Raises:
        RecipeError: the teacher has no weights and `teacher.random` is false; or it is a
            checkpoint of featkd that was trained on other classes and the loss uses its logits.
    """
    teacher = recipe.required_teacher
    try:
        check_timm_name("teacher.name", teacher.name)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if not (teacher.random or teacher.has_weights):
        raise RecipeError(
            f"teacher: {teacher.name} has no weights; expected teacher.checkpoint (a file), "
            "teacher.pretrained: true, or teacher.random: true for a test with random weights"
        )
    run = read_run(checkpoint or teacher.checkpoint)
    own = run.get("classes") if recipe.data.labels == "folders" else None
    if recipe.loss.alpha > 0 and own is not None and list(own) != list(classes):
        raise RecipeError(
            f"teacher.checkpoint: {teacher.checkpoint}: was trained on other classes than the "
            f"class folders of this run: {_first_difference(own, classes)}; loss.alpha is "
            f"{recipe.loss.alpha:g}, which compares logits class by class; expected the same "
            "classes in the same order, or loss.alpha: 0"
        )
    return run


def check_classifier(recipe: Recipe, model: FeatureModel) -> None:
    """Checks that a teacher whose logits are used has a trained classifier.

    Raises:
        RecipeError: the model has no classifier, or a new one beside pretrained weights.
    """
    teacher, alpha = recipe.required_teacher, recipe.loss.alpha
    if alpha == 0:
        return
    classes = getattr(model, "num_classes", None)
    if classes == 0:
        raise _no_classifier(recipe)
    trained = getattr(model, "pretrained_cfg", {}).get("num_classes")
    if teacher.pretrained and trained is not None and classes != trained:
        has = f"{trained} classes" if trained else "no classifier"
        raise RecipeError(
            f"teacher.options.num_classes: {classes}, but the pretrained weights of {teacher.name} "
            f"have {has}: the classifier would be random, and loss.alpha is {alpha:g}; expected "
            "a teacher trained on these classes, or loss.alpha: 0"
        )


def check_cached_classifier(recipe: Recipe, run: Mapping[str, Any]) -> None:
    """Checks that the teacher of a cache has a classifier if its logits are used.

    Without one, timm's models return their pooled feature in place of logits, and caches store it.

    Args:
        recipe: the run; its teacher is not null.
        run: result of `read_run`.

    Raises:
        RecipeError: it has none, as far as its checkpoint or timm's record of the model tells.
    """
    teacher = recipe.required_teacher
    classes = teacher.options.get("num_classes", run.get("num_classes"))
    if classes is None and (record := get_pretrained_cfg(teacher.name)) is not None:
        classes = record.num_classes
    if recipe.loss.alpha > 0 and classes == 0:
        raise _no_classifier(recipe)


def _no_classifier(recipe: Recipe) -> RecipeError:
    return RecipeError(
        f"teacher: {recipe.required_teacher.name} has no classifier, but loss.alpha is "
        f"{recipe.loss.alpha:g}; expected a teacher with a classifier, or loss.alpha: 0"
    )


def check_synsets(
    recipe: Recipe, pretrained_cfg: Mapping[str, Any], classes: Sequence[str]
) -> None:
    """Checks that class folders named by ImageNet's synsets are in the order of timm's weights.

    Args:
        recipe: the run; its teacher is pretrained.
        pretrained_cfg: timm's record of the weights.
        classes: class names of the training set.

    Raises:
        RecipeError: they are 1000 other synsets, or in another order, and the loss uses logits.
    """
    if recipe.loss.alpha == 0 or infer_imagenet_subset(pretrained_cfg) != "imagenet-1k":
        return
    trained = ImageNetInfo("imagenet-1k").label_names()
    are_synsets = all(re.fullmatch(r"n\d{8}", name) for name in classes)
    if are_synsets and len(classes) == len(trained) and list(classes) != trained:
        raise RecipeError(
            f"teacher.pretrained: {recipe.required_teacher.name} was trained on ImageNet's "
            f"classes, and {_first_difference(trained, classes)}; expected the 1000 synsets in "
            "sorted order, or loss.alpha: 0"
        )


def check_finite(recipe: Recipe, model: FeatureModel) -> None:
    """Checks that a teacher's weights are finite.

    Raises:
        RecipeError: a value is NaN or infinite; names the file and the tensor.
    """
    teacher = recipe.required_teacher
    if not teacher.has_weights:
        return
    module: Any = model
    assert isinstance(module, nn.Module)
    bad = [name for name, x in module.named_parameters() if not torch.isfinite(x).all()]
    if bad:
        source = (
            f"teacher.checkpoint: {teacher.checkpoint}"
            if teacher.checkpoint is not None
            else f"teacher: the pretrained weights of {teacher.name}"
        )
        raise RecipeError(
            f"{source}: {len(bad)} tensors hold values that are not finite, first {bad[0]}; "
            "expected a checkpoint of a run that has not diverged"
        )


def read_run(file: AnyPath | None) -> dict[str, Any]:
    """Reads what a teacher's file tells of the run that saved it.

    Returns:
        Entries "recipe", "classes" and "num_classes" of a checkpoint of featkd. Empty for other
        files; a missing or damaged one is left to `create_teacher`, which describes it.
    """
    where = None if file is None else locate(file, "teacher.checkpoint")
    if where is None or where.name.endswith(".safetensors") or not where.is_file():
        return {}
    # With mmap no tensor is read, but some files and file systems don't support it.
    for mapped in (True, False) if isinstance(where, Path) else (False,):
        try:
            state = torch.load(seekable(where), map_location="cpu", weights_only=True, mmap=mapped)
        except Exception:  # any error of torch.load: unpickling, zip, missing classes
            continue
        if isinstance(state, dict) and isinstance(state.get("recipe"), dict):
            return {name: state.get(name) for name in ("recipe", "classes", "num_classes")}
        return {}
    return {}


def _first_difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Describes the first class that differs."""
    for number, (one, other) in enumerate(zip(theirs, ours, strict=False)):
        if one != other:
            return f"class {number} is {one!r} there and {other!r} here"
    return f"{len(theirs)} classes there and {len(ours)} here"
