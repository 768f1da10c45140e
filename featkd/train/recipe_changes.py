"""Compares the recipe in a checkpoint with the recipe that resumes from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from featkd.runtime.names import listed
from featkd.runtime.remote import Location
from featkd.train.recipe import NO_FASTEST, Recipe, RecipeError, TeacherConfig, to_dict

# Fields that only set where and how often something is written, or what is allowed.
_SILENT = (
    *("out", "log_every", "checkpoint", "eval", "log", "device", "data.workers"),
    "teacher.random",
)
# Fields that may change, with a note: position and speed, images that are found elsewhere.
_NOTED = (
    *("batch_size", "optim.accumulate", "amp", "compile", "compile_mode", "cache", "cache_epochs"),
    *("distributed", "data.path", "data.backend", "data.channels_last", "data.on_bad_image"),
    # Starting weights are not read again.
    *("student.pretrained", "student.checkpoint", "student.weights"),
)


class _Change(NamedTuple):
    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.old)} -> {_short(self.new)}"

    def is_below(self, fields: tuple[str, ...]) -> bool:
        return any(self.field == f or self.field.startswith(f"{f}.") for f in fields)

    @property
    def may_happen(self) -> bool:
        """True if a resumed run is still the same experiment."""
        if self.field == "optim.epochs":
            return isinstance(self.old, int) and bool(self.new > self.old)
        return self.is_below(_NOTED)


def check_same_recipe(
    path: Location, saved: dict[str, Any], recipe: Recipe, *, force: bool
) -> list[str]:
    """Compares the recipe in a checkpoint with the recipe that resumes from it.

    Args:
        path: the checkpoint, for the message.
        saved: the checkpoint's recipe, as a plain dict.
        recipe: the recipe of the resumed run.
        force: allow changes that make it another experiment.

    Returns:
        The fields that differ, as "field: saved -> current", without those that only set where
        and how often something is written.

    Raises:
        RecipeError: the students differ, or another field that makes it another experiment
            and `force` is false.
    """
    inference = (saved["teacher"] or {}).pop("inference", None)  # a field of earlier versions
    changes = _changes(saved, recipe)
    student = [str(c) for c in changes if c.is_below(("student",)) and not c.may_happen]
    if student:
        raise RecipeError(
            f"{path}: holds another student than the recipe asks for ({'; '.join(student)}); "
            "expected another --out"
        )
    other = [str(c) for c in changes if not c.may_happen]
    if other and not force:
        raise another_experiment(path, other)
    return [*map(str, changes), *([NO_FASTEST] if inference == "fastest" else [])]


def changed_fields(saved: dict[str, Any], recipe: Recipe) -> list[str]:
    """Fields that differ, as in `check_same_recipe`, whether or not a run may change them."""
    return [str(change) for change in _changes(saved, recipe)]


def _changes(saved: dict[str, Any], recipe: Recipe) -> list[_Change]:
    student = saved["student"]
    if "pretrained" in student["options"]:  # its place in earlier versions
        student["pretrained"] = bool(student["options"].pop("pretrained"))
    # Fields that the version that saved it did not have had their present defaults.
    before = _filled(saved, to_dict(Recipe()))
    if before["teacher"] is not None:
        before["teacher"] = _filled(before["teacher"], dataclasses.asdict(TeacherConfig()))
    return [c for c in _differences(before, to_dict(recipe)) if not c.is_below(_SILENT)]


def another_experiment(path: Location, changes: list[str]) -> RecipeError:
    """Creates the error for changes that a resumed run must not make unasked."""
    return RecipeError(
        f"{path}: belongs to another experiment: {listed(changes, 5, '; ')}; expected another "
        "--out for a new run, or --resume force to continue this one with the new values"
    )


def _filled(saved: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Adds defaults for missing fields, at any depth; free-form `options` stay as they are."""
    filled = dict(saved)
    for key, default in defaults.items():
        if key not in filled:
            filled[key] = default
        elif isinstance(default, dict) and isinstance(filled[key], dict) and key != "options":
            filled[key] = _filled(filled[key], default)
    return filled


def _differences(old: Any, new: Any, name: str = "") -> Iterator[_Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield _Change(name, old, new)


def _short(value: Any) -> str:
    """Value in a message; a whole section, added or removed, by its model's name."""
    if value is None:
        return "null"
    return repr(value.get("name", value) if isinstance(value, dict) else value)
