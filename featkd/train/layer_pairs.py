"""Layer pairs of the feature loss: resolved once per run, and checked against the models."""

from __future__ import annotations

from typing import NamedTuple

from featkd.models.features import FeatureModel, num_layers, resolve_layers
from featkd.runtime.distributed import ProcessContext
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.teacher import OutputShapes, output_shapes


class LayerPairs(NamedTuple):
    """Matched layers, counted from 0: one student layer and one teacher layer per pair."""

    student: tuple[int, ...] = ()
    teacher: tuple[int, ...] = ()


def resolve_layer_pairs(recipe: Recipe, student_depth: int, teacher_depth: int) -> LayerPairs:
    """Resolves `loss.pairs`, whose negative layers count from the end.

    Args:
        recipe: the run.
        student_depth: number of layers of the student.
        teacher_depth: number of layers of the teacher.

    Raises:
        RecipeError: a layer is out of range.
    """
    sides = []
    for side, (model, depth) in enumerate((("student", student_depth), ("teacher", teacher_depth))):
        try:
            sides.append(resolve_layers([pair[side] for pair in recipe.loss.pairs], depth))
        except ValueError as error:
            raise RecipeError(f"loss.pairs ({model}): {error}") from error
    return LayerPairs(*sides)


def check_fit(
    recipe: Recipe,
    student: FeatureModel,
    pairs: LayerPairs,
    teacher: OutputShapes,
    context: ProcessContext,
    notes: list[str],
) -> None:
    """Checks that the student's logits, tokens and channels fit the teacher's, with one image.

    Args:
        recipe: the run.
        student: the student, on the device.
        pairs: layers whose maps are compared.
        teacher: the teacher's output shapes.
        context: this process.
        notes: notes for the user are appended here.

    Raises:
        RecipeError: they do not fit; names the field.
    """
    classes, _, maps = output_shapes("student", student, pairs.student, recipe, context)
    if recipe.loss.alpha > 0 and classes != teacher.classes:
        raise RecipeError(
            f"loss.alpha: needs logits of the same classes, but the student has {classes} and "
            f"the teacher {teacher.classes}"
        )
    for s, t in zip(maps, teacher.maps, strict=True):
        pair = f"layer pair [{s.layer}, {t.layer}]"
        if s.tokens != t.tokens:
            raise RecipeError(
                f"loss.pairs: {pair}: the student's map has {s.tokens} tokens, the teacher's "
                f"{t.tokens} in the cache; expected a cache made for a student with this grid"
            )
        if s.channels == t.channels:
            continue
        if recipe.student.arch != "plain" and s.layer == num_layers(student) - 1:
            raise RecipeError(
                f"student.teacher_dim: {recipe.student.teacher_dim}, but the teacher's layer "
                f"{t.layer} has {t.channels} channels; expected {t.channels}"
            )
        notes.append(
            f"{pair}: the student's map has {s.channels} channels, the teacher's {t.channels}: the "
            "wider map is pooled"
        )
