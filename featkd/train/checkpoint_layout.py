"""Layout of a checkpoint's entries, checked once after loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Entry(NamedTuple):
    expected: str
    """Description of the allowed values, for the error."""
    fits: Callable[[Any], bool]
    required: bool = True


def find_fault(state: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the first missing or wrongly typed entry; None if all fit.

    Entries that this version does not know are allowed.

    Args:
        state: content of a checkpoint. The names that earlier versions used are already replaced.
    """
    for name, entry in _ENTRIES.items():
        value: Any = state
        for key in name.split("."):
            missing = not isinstance(value, Mapping) or key not in value
            if missing:
                break
            value = value[key]
        if missing:
            if entry.required:
                return f"has no entry {name}; expected {entry.expected}"
        elif not entry.fits(value):
            return f"entry {name}: expected {entry.expected}, got {_describe(value)}"
    return None


def find_optimizer_fault(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> str | None:
    """Returns what does not fit in an optimizer's saved state; None if everything fits.

    Args:
        optimizer: the optimizer that is to be restored, unchanged.
        saved: its saved state, of the right layout.
    """
    groups = zip(optimizer.param_groups, saved["param_groups"], strict=True)
    parameters: dict[int, Tensor] = {}
    for number, (own, group) in enumerate(groups):
        name = f"optimizer.param_groups.{number}"
        if len(own["params"]) != len(group["params"]):
            return f"{name}: expected {len(own['params'])} parameters, got {len(group['params'])}"
        parameters.update(zip(group["params"], own["params"], strict=True))
        for option, value in own.items():
            if option == "params" or option not in group:
                continue  # checked after torch has set its defaults
            if _kind(value) != _kind(group[option]):
                return f"{name}.{option}: expected {_kind(value)}, got {_describe(group[option])}"
    known = {key for state in saved["state"].values() for key in state}
    for index, state in saved["state"].items():
        if index not in parameters:
            return f"optimizer.state.{index}: no parameter has this number"
        if state and (missing := sorted(known - set(state))):
            return f"optimizer has no entry state.{index}.{missing[0]}"
        shape = parameters[index].shape
        for key, value in state.items():
            if key in _SHAPED and (not isinstance(value, Tensor) or value.shape != shape):
                return (
                    f"optimizer.state.{index}.{key}: expected a tensor of shape {tuple(shape)}, "
                    f"got {_describe(value)}"
                )
    return None


_SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")


def _kind(value: object) -> str:
    """Kind of an option: a bool counts as a number, a number as a tensor with one element."""
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return "a number"
    if isinstance(value, (list, tuple)):
        return f"{len(value)} values"
    return "null" if value is None else type(value).__name__


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:60]}..."
    return f"a {type(value).__name__}"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_plain_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex()


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and _is_plain_tensor(x) for name, x in value.items()
    )


def _is_optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is_optimizer_state(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _is_int(number) and _is_mapping(state) for number, state in value.items()
    )


def _is_groups(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(group, Mapping)
        and isinstance(group.get("params"), list)
        and all(map(_is_int, group["params"]))
        for group in value
    )


def _is_scaler(value: object) -> bool:
    names = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    return isinstance(value, Mapping) and (
        not value or all(_is_number(value.get(name)) for name in names)
    )


def _is_best(value: object) -> bool:
    return isinstance(value, Mapping) and (
        not value
        or (
            all(_is_int(value.get(name)) for name in ("update", "epoch"))
            and _is_str(value.get("weights"))
            and _is_number(value.get("top1"))
        )
    )


def _is_scores(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(scores, Mapping)
        and _is_number(scores.get("top1"))
        and all(map(_is_number, scores.values()))
        for scores in value.values()
    )


def _is_strings(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_str, (*value, *value.values())))


_INT = _Entry("a whole number, 0 or more", _is_int)
_POSITIVE = _Entry("a whole number above 0", lambda value: _is_int(value) and value > 0)
_STR = _Entry("a string", _is_str)
_MAPPING = _Entry("a mapping", _is_mapping)
_MAPPING_OR_NULL = _Entry("a mapping, or null", _is_optional(_is_mapping))
_ENTRIES = {
    "model": _Entry("names and tensors", _is_state_dict),
    "model_ema": _Entry("names and tensors, or null", _is_optional(_is_state_dict)),
    "optimizer": _MAPPING,
    "optimizer.state": _Entry("a mapping for each parameter's number", _is_optimizer_state),
    "optimizer.param_groups": _Entry("groups with their parameters' numbers", _is_groups),
    "scaler": _Entry("the five numbers of a GradScaler, or an empty mapping", _is_scaler),
    "loader": _MAPPING,
    **{
        f"loader.{name}": _INT
        for name in ("epoch", "batch", "batch_size", "world_size", "seed", "repeats", "num_images")
    },
    "loader.shuffle_epoch": _INT._replace(required=False),
    "loader.ordered_as": _INT._replace(required=False),
    "loader.augmentation_version": _INT._replace(required=False),
    "pixels": _STR._replace(required=False),
    "classes": _Entry(
        "a list of names", lambda value: isinstance(value, list) and all(map(_is_str, value))
    ),
    "num_classes": _INT,
    "meter": _Entry(
        "a tensor of shape (3,)", lambda value: _is_plain_tensor(value) and value.shape == (3,)
    ),
    "metered": _INT,
    "update": _INT,
    "epoch": _INT,
    "best": _Entry("update, epoch, weights and top1, or an empty mapping", _is_best),
    "scores": _Entry("a mapping of scores for each kind of weights", _is_scores),
    "evaluation_pending": _Entry(
        "true or false", lambda value: isinstance(value, bool), required=False
    ),
    "bad_files": _Entry("a mapping from file names to causes", _is_strings),
    "recipe": _MAPPING,
    **{f"recipe.{name}": _MAPPING for name in ("student", "loss", "data", "optim", "checkpoint")},
    "recipe.teacher": _MAPPING_OR_NULL,
    "recipe.batch_size": _POSITIVE,
    "recipe.student.base": _STR,
    "recipe.student.arch": _STR,
    "recipe.student.teacher_dim": _POSITIVE,
    "recipe.student.options": _MAPPING,
    "recipe.data.img_size": _POSITIVE,
    "recipe.optim.optimizer": _STR,
    "recipe.optim.weight_decay": _Entry("a number", _is_number),
    "recipe.optim.accumulate": _POSITIVE,
    "versions": _MAPPING,
    "world_size": _POSITIVE,
    "job": _Entry("a string, or null", _is_optional(_is_str)),
}
