"""Arms of a comparison, each a change of one recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from featkd.train.recipe import Arch, LossConfig, Recipe, RecipeError
from featkd.train.student import build_student

REFERENCE = "plain"  # arm that the differences are to
CONTROL, CONTROLLED = "plain_wide", "widelast"  # students of about equal parameters


@dataclass(frozen=True)
class Arm:
    """A change of the recipe.

    Attributes:
        about: description for the report.
        arch: `student.arch`.
        teaches: parts of the loss that use the teacher: none, its logits alone, or the recipe's.
        projector: `loss.projector`; None keeps the recipe's.
        wide: widen the student to the parameters of the widelast arm.
        remedy: a student that is made for a mismatch.
    """

    about: str
    arch: Arch = "plain"
    teaches: Literal["nothing", "logits", "all"] = "all"
    projector: Literal["none", "linear_norm"] | None = None
    wide: bool = False
    remedy: bool = False


ARMS: dict[str, Arm] = {
    "ce": Arm("plain student, cross-entropy without a teacher", teaches="nothing"),
    "soft_kd": Arm("plain student, soft loss on the teacher's logits", teaches="logits"),
    "plain": Arm(
        "plain student, feature loss to the teacher's map pooled to its width", projector="none"
    ),
    "plain_projector": Arm(
        "plain student, feature loss through a trained projector", projector="linear_norm"
    ),
    "lift": Arm("Lift student, feature loss", arch="lift", remedy=True),
    "widelast": Arm("WideLast student, feature loss", arch="widelast", remedy=True),
    "plain_wide": Arm(
        "as plain, but widened to about the parameters of widelast", projector="none", wide=True
    ),
}


def _impossible_arms(recipe: Recipe) -> dict[str, str]:
    """Arms that the recipe has no terms for -> the reason; RecipeError if it suits none."""
    if recipe.data.labels == "none":
        raise RecipeError("data.labels: none, but compare needs accuracies; expected folders")
    if recipe.teacher is None:
        raise RecipeError("teacher: null; expected the teacher that the arms share")
    if recipe.cache is not None:
        raise RecipeError(
            f"cache: {recipe.cache!r}, but compare makes a cache per seed by itself; expected null"
        )
    if recipe.loss.feature is None:
        raise RecipeError(
            f"loss.feature: null, but the differences are to the {REFERENCE} arm, which compares "
            "feature maps; expected mse or spectral"
        )
    found = {}
    if recipe.loss.alpha == 0:
        found["soft_kd"] = "loss.alpha is 0"
    if recipe.student.pretrained or recipe.student.checkpoint is not None:
        found["plain_wide"] = "the student's starting weights fit one width only"
    return found


def choose_arms(recipe: Recipe, asked: str | None) -> tuple[list[str], list[str]]:
    """Returns the arms to train and notes for the user.

    Args:
        recipe: the recipe.
        asked: arms, separated by commas; None for all that the recipe has terms for.

    Raises:
        RecipeError: the recipe suits no comparison.
        ValueError: an arm is unknown, given twice, or impossible, or `plain` is missing.
    """
    impossible = _impossible_arms(recipe)
    if asked is None:
        notes = [f"arm {name} is left out: {reason}" for name, reason in impossible.items()]
        return [name for name in ARMS if name not in impossible], notes
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in ARMS:
            raise ValueError(f"arms: expected some of {', '.join(ARMS)}, got {name!r}")
        if name in impossible:
            raise ValueError(f"arms: {name} can't be trained with this recipe: {impossible[name]}")
        if names.count(name) > 1:
            raise ValueError(f"arms: {name} is given twice; expected each arm once")
    if REFERENCE not in names:
        raise ValueError(
            f"arms: expected {REFERENCE} among them, which the differences are to; got {asked}"
        )
    return names, []


def arm_recipe(recipe: Recipe, name: str, seed: int, out: Path, width: int | None) -> Recipe:
    """Returns the recipe of one run.

    Args:
        recipe: the recipe that is compared.
        name: one of `ARMS`.
        seed: seed of the run.
        out: folder of the comparison.
        width: width of the widened arm (see `wide_width`); used by that arm only.
    """
    arm, old = ARMS[name], recipe.loss
    options = recipe.student.options
    if arm.wide:
        options = {**options, "embed_dim": width}
    student = replace(recipe.student, arch=arm.arch, options=options)
    loss = replace(old, projector=arm.projector or old.projector)
    if arm.teaches != "all":
        loss = LossConfig(
            tau=old.tau,
            label_smoothing=old.label_smoothing,
            pairs=old.pairs,  # not compared, but the maps are measured
        )
    if arm.teaches == "logits":
        loss = replace(loss, alpha=old.alpha)
    teacher = None if arm.teaches == "nothing" else recipe.teacher
    folder = str(out / f"{name}-seed{seed}")
    return replace(recipe, out=folder, seed=seed, student=student, loss=loss, teacher=teacher)


def wide_width(recipe: Recipe, num_classes: int) -> int:
    """Returns the width at which a plain student has about the parameters of widelast.

    Widths are the base's plus multiples of four channels per head, so that every base's position
    encoding divides them.

    Raises:
        RecipeError: the base has no width or no heads to change.
    """

    def build(name: str, width: int | None = None) -> Any:
        return build_student(arm_recipe(recipe, name, 0, Path(), width), num_classes)

    def parameters(model: Any) -> int:
        return sum(p.numel() for p in model.parameters())

    plain = build("plain")
    try:
        width, step = int(plain.embed_dim), 4 * int(plain.blocks[0].attn.num_heads)
    except AttributeError as error:
        raise RecipeError(
            f"student.base: {recipe.student.base} has no width to change for the arm plain_wide; "
            f"expected --arms without it"
        ) from error
    wanted, sizes = parameters(build("widelast")), dict[int, int]()
    while max(sizes.values(), default=0) < wanted:
        width += step
        sizes[width] = parameters(build("plain_wide", width))
    # of two that are equally near, the wider one
    return min(reversed(sizes), key=lambda width: abs(sizes[width] - wanted))
