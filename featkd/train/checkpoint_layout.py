"""Layout of a checkpoint's entries, checked once after loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_Check = Callable[[Any], bool]
_MISSING = object()


def find_fault(state: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the first missing or wrongly typed entry; None if all fit.

    Entries that this version does not know are allowed.

    Args:
        state: content of a checkpoint. The names that earlier versions used are already replaced.
    """
    for name, (expected, fits) in _ENTRIES.items():
        value: Any = state
        for key in name.split("."):
            value = value.get(key, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            if name not in _OPTIONAL:
                return f"has no entry {name}; expected {expected}"
        elif not fits(value):
            return f"entry {name}: expected {expected}, got {_describe(value)}"
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


def _is(kind: Any) -> _Check:
    return lambda value: isinstance(value, kind)


def _or_null(fits: _Check) -> _Check:
    return lambda value: value is None or fits(value)


def _list_of(fits: _Check) -> _Check:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _mapping_of(key_fits: _Check, fits: _Check) -> _Check:
    return lambda value: (
        isinstance(value, Mapping)
        and all(key_fits(key) and fits(inner) for key, inner in value.items())
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_plain_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex()


def _is_scaler(value: Any) -> bool:
    names = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    return value == {} or (
        _is_mapping(value) and all(_is_number(value.get(name)) for name in names)
    )


def _has_score(value: Any) -> bool:
    """Checks for the score by which evaluations are compared (`featkd.runtime.scores.rank`)."""
    names = ("top1", "knn_top1", "loss")
    return _is_mapping(value) and any(_is_number(value.get(name)) for name in names)


def _is_best(value: Any) -> bool:
    return value == {} or (
        _has_score(value)
        and all(_is_int(value.get(name)) for name in ("update", "epoch"))
        and _is_str(value.get("weights"))
    )


_is_str, _is_mapping = _is(str), _is(Mapping)
_INT = ("a whole number, 0 or more", _is_int)
_POSITIVE = ("a whole number above 0", lambda value: _is_int(value) and value > 0)
_NUMBER = ("a number", _is_number)
_STR = ("a string", _is_str)
_MAPPING = ("a mapping", _is_mapping)
_TENSORS = _mapping_of(_is_str, _is_plain_tensor)
_ENTRIES: dict[str, tuple[str, _Check]] = {
    "model": ("names and tensors", _TENSORS),
    "model_ema": ("names and tensors, or null", _or_null(_TENSORS)),
    "projectors": ("names and tensors", _TENSORS),
    "optimizer": _MAPPING,
    "optimizer.state": ("a mapping for each parameter's number", _mapping_of(_is_int, _is_mapping)),
    "optimizer.param_groups": (
        "groups with their parameters' numbers",
        _list_of(lambda group: _is_mapping(group) and _list_of(_is_int)(group.get("params"))),
    ),
    "scaler": ("the five numbers of a GradScaler, or an empty mapping", _is_scaler),
    "loader": _MAPPING,
    **{
        f"loader.{name}": _INT
        for name in ("epoch", "batch", "batch_size", "world_size", "seed", "repeats", "num_images")
    },
    "loader.shuffle_epoch": _INT,
    "loader.ordered_as": _INT,
    "loader.augmentation_version": _INT,
    "pixels": _STR,
    "classes": ("a list of names", _list_of(_is_str)),
    "num_classes": _INT,
    "meter": (
        "a tensor of shape (4,)",
        lambda value: _is_plain_tensor(value) and value.shape in ((3,), (4,)),
    ),
    "metered": _INT,
    "update": _INT,
    "epoch": _INT,
    "best": ("update, epoch, weights and a score, or an empty mapping", _is_best),
    "scores": (
        "a mapping of scores for each kind of weights",
        _mapping_of(lambda _: True, lambda x: _has_score(x) and all(map(_is_number, x.values()))),
    ),
    "evaluation_pending": ("true or false", _is(bool)),
    "bad_files": ("a mapping from file names to causes", _mapping_of(_is_str, _is_str)),
    "recipe": _MAPPING,
    **{f"recipe.{name}": _MAPPING for name in ("student", "loss", "data", "optim", "checkpoint")},
    "recipe.teacher": ("a mapping, or null", _or_null(_is_mapping)),
    "recipe.batch_size": _POSITIVE,
    "recipe.student.base": _STR,
    "recipe.student.arch": _STR,
    "recipe.student.teacher_dim": _POSITIVE,
    "recipe.student.options": _MAPPING,
    "recipe.data.img_size": _POSITIVE,
    "recipe.optim.optimizer": _STR,
    "recipe.optim.weight_decay": _NUMBER,
    "recipe.optim.accumulate": _POSITIVE,
    "versions": _MAPPING,
    "world_size": _POSITIVE,
    "job": ("a string, or null", _or_null(_is_str)),
}
_OPTIONAL = {
    *("projectors", "pixels"),
    *("loader.shuffle_epoch", "loader.ordered_as", "loader.augmentation_version"),
}
