"""Image statistics and size that a run's teacher was trained with, and the maps' grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from featkd.models.adapters import ImageAdapter, same_values
from featkd.models.base import pretrained_config
from featkd.train.recipe import Recipe, RecipeError

_UNKNOWN = "data.mean and data.std"


class ImageStatistics(NamedTuple):
    """Mean and standard deviation per channel, of pixels from 0 to 1, and where they come from."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


def teacher_statistics(recipe: Recipe, run: Mapping[str, Any]) -> ImageStatistics:
    """Returns the statistics that the teacher's images are normalised by.

    They are those of the recipe if it gives them, of timm's record for pretrained weights, of the
    stored recipe for a checkpoint of featkd, and otherwise those of the student's images.

    Args:
        recipe: the run; its teacher is not null.
        run: what `teacher.checkpoint` tells (see `read_run`).
    """
    teacher, data = recipe.required_teacher, recipe.data
    known: dict[str, Any] = {}
    source = _UNKNOWN
    if teacher.pretrained:
        known = pretrained_config(teacher.name, **teacher.options)
        source = f"timm's record of {teacher.name}"
    elif run:
        known, source = run["recipe"].get("data") or {}, "the checkpoint's recipe"
    found = [getattr(teacher, name) or known.get(name) for name in ("mean", "std")]
    if found.count(None) == 1:
        given, missing = ("mean", "std") if found[1] is None else ("std", "mean")
        raise RecipeError(
            f"teacher.{missing}: null, but teacher.{given} is given, and {teacher.name}'s weights "
            f"do not say theirs; expected both"
        )
    if teacher.mean is not None or teacher.std is not None:
        source = "the recipe"
    mean, std = (own or x for own, x in zip(found, (data.mean, data.std), strict=True))
    return ImageStatistics(tuple(mean), tuple(std), source)


def teacher_size(recipe: Recipe) -> int:
    """Height and width of the teacher's images."""
    teacher = recipe.required_teacher
    asked = teacher.img_size or teacher.options.get("img_size") or recipe.data.img_size
    sides = {asked} if isinstance(asked, int) else {*asked}
    if len(sides) != 1 or not isinstance(size := sides.pop(), int) or size < 1:
        raise RecipeError(
            f"teacher.options.img_size: expected a whole number >= 1, got {asked!r}; images are "
            "square"
        )
    return size


def image_adapter(recipe: Recipe, run: Mapping[str, Any], notes: list[str]) -> ImageAdapter | None:
    """Returns the map from the student's images to the teacher's; None if they are the same.

    Args:
        recipe: the run; its teacher is not null.
        run: what `teacher.checkpoint` tells (see `read_run`).
        notes: notes on the differences are appended here.
    """
    teacher, data = recipe.required_teacher, recipe.data
    wanted, size = teacher_statistics(recipe, run), teacher_size(recipe)
    adapter = ImageAdapter(
        data.mean,
        data.std,
        wanted.mean,
        wanted.std,
        size=data.img_size,
        new_size=size,
    )
    if adapter.renormalises:
        notes.append(
            f"teacher: its images are normalised by mean {list(wanted.mean)} and std "
            f"{list(wanted.std)} ({wanted.source}), the student's by {list(data.mean)} and "
            f"{list(data.std)}"
        )
    if adapter.new_size is not None:
        notes.append(
            f"teacher: its images are resized from {data.img_size} to {size} pixels "
            "(teacher.img_size)"
        )
    if wanted.source == _UNKNOWN and teacher.checkpoint is not None:
        record = pretrained_config(teacher.name, **teacher.options)
        mean, std = record.get("mean"), record.get("std")
        if mean and std and not (same_values(mean, data.mean) and same_values(std, data.std)):
            notes.append(
                f"teacher.mean, teacher.std: {teacher.checkpoint} does not say which it was trained"
                f" with; the run takes data.mean {list(data.mean)} and data.std {list(data.std)}, "
                f"but timm's weights of {teacher.name} have {list(mean)} and {list(std)}"
            )
    return adapter if adapter.renormalises or adapter.new_size else None
