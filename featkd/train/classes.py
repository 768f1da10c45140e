"""Number of classes of the student and the teacher."""

from __future__ import annotations

from typing import Any, cast

from featkd.cache import TeacherCache
from featkd.models.features import FeatureModel
from featkd.train.recipe import Recipe, RecipeError


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


def classes_of(teacher: FeatureModel | TeacherCache) -> int:
    """Number of a teacher's logits."""
    if isinstance(teacher, TeacherCache):
        return teacher.manifest.layout.classes
    return int(cast(Any, teacher).num_classes)
