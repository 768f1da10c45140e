"""The student of a run: its number of classes, and its starting weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch

from featkd.cache import TeacherCache
from featkd.models import create_student
from featkd.models.adapters import same_values
from featkd.models.features import FeatureModel
from featkd.models.weights import read_stored_recipe
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.teacher import TeacherModel, find_weights_file, naming

# Arguments of `create_student` that are fields of the recipe's student; its errors name them first.
_FIELDS = ("base", "arch", "teacher_dim", "num_classes", "pretrained", "checkpoint", "weights")


def count_classes(
    recipe: Recipe, classes: list[str], notes: list[str], *, strict: bool = True
) -> int | None:
    """Returns the number of outputs of the student; 0 for no classifier.

    Args:
        recipe: the run.
        classes: class names of the training set; empty without labels.
        notes: notes for the user are appended here.
        strict: refuse a student with more outputs than classes instead of noting it.

    Returns:
        The number, or None if it is that of the teacher: without labels, if its logits are used.

    Raises:
        RecipeError: `student.num_classes` does not fit the training set.
    """
    asked, found = recipe.student.num_classes, len(classes)
    if not recipe.uses_logits:
        if asked:
            raise RecipeError(
                f"student.num_classes: {asked}, but nothing trains a classifier: data.labels is "
                "none and loss.alpha is 0; expected null"
            )
        return 0
    if recipe.data.labels == "none" and asked is None:
        return None
    if asked is None and found < 2:
        raise RecipeError(
            f"data.path: the training set in {recipe.data.path} has one class ({classes[0]}); "
            "expected two or more class folders"
        )
    if asked is not None and asked < 2:
        raise RecipeError(f"student.num_classes: expected >= 2, got {asked}")
    if recipe.data.labels == "none":
        return asked
    if asked is None or asked == found:
        return found
    message = (
        f"student.num_classes: {asked}, but the training set has {found} class "
        f"{'folder' if found == 1 else 'folders'}; expected {found}, or null for their number "
        "(--student.num-classes null)"
    )
    if strict or asked < found:
        raise RecipeError(message)
    notes.append(message)
    return asked


def classes_of(teacher: TeacherModel | TeacherCache) -> int:
    """Number of a teacher's logits."""
    if isinstance(teacher, TeacherCache):
        return teacher.manifest.layout.classes
    return int(cast(Any, teacher.model).num_classes)


def build_student(recipe: Recipe, num_classes: int, notes: list[str] | None = None) -> FeatureModel:
    """Creates the recipe's student, initialised from its seed.

    Args:
        recipe: the run.
        num_classes: outputs of the student.
        notes: notes for the user are appended here; None to leave out the starting weights, where
            only shapes matter or a checkpoint follows.

    Raises:
        RecipeError: the model can't be built, or its starting weights don't fit; names the field.
    """
    torch.manual_seed(recipe.seed)
    config = recipe.student
    start: dict[str, Any] = {}
    checkpoint = None
    if notes is not None:
        checkpoint = find_weights_file("student.checkpoint", config.checkpoint)
        start = {
            "pretrained": config.pretrained,
            "checkpoint": checkpoint,
            "weights": config.weights,
            "notes": notes,
        }
    options = {"img_size": recipe.data.img_size, **config.options, **start}
    try:
        with naming("student"):
            student = create_student(
                config.base, config.arch, config.teacher_dim, num_classes, **options
            )
    except RecipeError as error:
        field, _, text = str(error).removeprefix("student: ").partition(": ")
        if field in _FIELDS:
            raise RecipeError(f"student.{field}: {text}") from error.__cause__
        raise
    if notes is not None and checkpoint is not None:
        stored, source = read_stored_recipe(checkpoint), f"student.checkpoint: {config.checkpoint}"
        notes += _statistics_notes(recipe, stored.get("data") or {}, source)
        notes += _model_notes(recipe, stored.get("student") or {}, source)
    elif notes is not None and config.pretrained:
        data = cast(Any, student).pretrained_cfg
        notes += _statistics_notes(recipe, data, f"student.pretrained: {config.base}")
    return student


def _statistics_notes(recipe: Recipe, before: Mapping[str, Any], source: str) -> list[str]:
    """Notes on starting weights that were trained on images with another mean or std."""
    notes = []
    for name in ("mean", "std"):
        own, theirs = getattr(recipe.data, name), before.get(name)
        if theirs is None or same_values(own, theirs):
            continue
        notes.append(
            f"{source}: was trained with data.{name} {list(theirs)}, this run has {list(own)}; "
            "the student adapts to it in training"
        )
    return notes


def _model_notes(recipe: Recipe, before: Mapping[str, Any], source: str) -> list[str]:
    """Notes on another base or other options: the number of heads shows in no tensor's shape."""

    def model(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        options = config.get("options") or {}
        kept = {k: v for k, v in options.items() if k != "img_size" and "drop" not in k}
        return config.get("base"), {k: v for k, v in kept.items() if not k.startswith("pretrained")}

    theirs, own = model(before), model(dataclasses.asdict(recipe.student))
    if not before or theirs == own:
        return []
    described = (
        f"student.base: {base}, student.options: {options}" for base, options in (theirs, own)
    )
    return [f"{source}: was trained with {next(described)}; this run has {next(described)}"]
