"""Layer pairs of the feature loss: resolved once per run, and checked against the models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from featkd.cache import LayerShape
from featkd.models.features import POOLED, Layer, resolve_layers
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.teacher import OutputShapes


class LayerPairs(NamedTuple):
    """Matched layers, counted from 0: one student layer and one teacher layer per pair.

    With `loss.pooled`, the pooled features are the last pair.
    """

    student: tuple[Layer, ...] = ()
    teacher: tuple[Layer, ...] = ()


def resolve_layer_pairs(
    recipe: Recipe, student_depth: int, teacher_depth: int, *, maps: bool
) -> LayerPairs:
    """Resolves the pairs of a run with a teacher, whose negative layers count from the end.

    Args:
        recipe: the run.
        student_depth: number of layers of the student.
        teacher_depth: number of layers of the teacher.
        maps: include `loss.pairs`; otherwise there are at most the pooled features.

    Raises:
        RecipeError: a layer is out of range.
    """
    pairs: list[tuple[Layer, Layer]] = [*recipe.loss.pairs] if maps else []
    if recipe.loss.pooled is not None:
        pairs.append((POOLED, POOLED))
    sides = []
    for side, (model, depth) in enumerate((("student", student_depth), ("teacher", teacher_depth))):
        try:
            sides.append(resolve_layers([pair[side] for pair in pairs], depth))
        except ValueError as error:
            raise RecipeError(f"loss.pairs ({model}): {error}") from error
    return LayerPairs(*sides)


def check_fit(
    recipe: Recipe, depth: int, student: OutputShapes, teacher: OutputShapes, notes: list[str]
) -> None:
    """Checks that the student's logits, tokens and channels fit the teacher's.

    Args:
        recipe: the run.
        depth: number of layers of the student.
        student, teacher: output shapes, with the maps that are compared.
        notes: notes for the user are appended here.

    Raises:
        RecipeError: they do not fit; names the field.
    """
    classes, _, maps = student
    if recipe.loss.alpha > 0 and classes != teacher.classes:
        raise RecipeError(
            f"loss.alpha: needs logits of the same classes, but the student has {classes} and "
            f"the teacher {teacher.classes}"
        )
    dropped = recipe.student.options.get("patch_drop_rate", 0)
    if dropped and any(shape.layer != POOLED for shape in maps):
        raise RecipeError(
            f"student.options.patch_drop_rate: {dropped}, which leaves patches out in training, "
            "but loss.feature compares all of them; expected 0, or loss.feature: null"
        )
    last = depth - 1
    fitting = {s.layer for s, t in zip(maps, teacher.maps, strict=True) if s.channels == t.channels}
    for s, t in zip(maps, teacher.maps, strict=True):
        pair = name_pair(s, t)
        if s.layer == POOLED:
            continue
        if s.tokens != t.tokens:
            raise RecipeError(
                f"loss.pairs: {pair}: the student's map has {s.tokens} tokens, the teacher's "
                f"{t.tokens} in the cache; expected a cache made for a student with this grid"
            )
        if s.channels == t.channels:
            continue
        projected = is_projected(recipe, s, t)
        lifts = recipe.student.arch != "plain" and s.layer == last
        if lifts and not (projected and last in fitting):
            raise RecipeError(
                f"student.teacher_dim: {recipe.student.teacher_dim}, but the teacher's layer "
                f"{t.layer} has {t.channels} channels; expected {t.channels}"
            )
        if not projected:
            notes.append(
                f"{pair}: the student's map has {s.channels} channels, the teacher's {t.channels}: "
                "the wider map is pooled (loss.projector trains a projector instead)"
            )


def resized_maps(
    student: Sequence[LayerShape], teacher: Sequence[LayerShape], notes: list[str]
) -> tuple[LayerShape, ...]:
    """Shapes of the teacher's maps after each is resized to the grid of the student's map.

    Args:
        student, teacher: one map per layer pair, in the same order.
        notes: a note is appended for each map that is resized.

    Raises:
        RecipeError: a map has no square grid.
    """
    for s, t in zip(student, teacher, strict=True):
        if s.tokens == t.tokens:
            continue
        own, its = math.isqrt(s.tokens), math.isqrt(t.tokens)
        for model, side, shape, other in (("student", own, s, t), ("teacher", its, t, s)):
            if side * side != shape.tokens:
                raise RecipeError(
                    f"loss.pairs: {name_pair(s, t)}: the {model}'s map has "
                    f"{shape.tokens} tokens, which are no square grid and can't be resized, and "
                    f"the other {other.tokens}; expected image and patch sizes that give the same "
                    "grid"
                )
        notes.append(
            f"{name_pair(s, t)}: the teacher's map of {its} x {its} tokens is "
            f"resized to the student's {own} x {own}"
        )
    return tuple(replace(t, tokens=s.tokens) for s, t in zip(student, teacher, strict=True))


def is_projected(recipe: Recipe, student: LayerShape, teacher: LayerShape) -> bool:
    """Checks whether `loss.projector` applies to a pair of feature maps."""
    differ = student.channels != teacher.channels
    return recipe.loss.projector != "none" and (recipe.student.arch == "plain" or differ)


def name_pair(student: LayerShape, teacher: LayerShape) -> str:
    """Name of a pair in messages."""
    if student.layer == POOLED:
        return "pooled features"
    return f"layer pair [{student.layer}, {teacher.layer}]"
