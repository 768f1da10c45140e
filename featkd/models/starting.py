"""Starting weights of a student: timm's weights of its base, or a weight file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as adapt_eva
from timm.models.vision_transformer import checkpoint_filter_fn as adapt_vision_transformer
from torch import Tensor

from featkd.models.base import build_timm
from featkd.models.features import FeatureModel
from featkd.models.weights import (
    CheckpointMismatch,
    Weights,
    load_strictly,
    mismatch,
    read_state_dict,
    read_stored_recipe,
)
from featkd.runtime.names import listed
from featkd.runtime.remote import AnyPath

# A file replaces all sources that timm would read, and their conversions.
_NO_SOURCE = {"source": "", "label_offset": 0, "custom_load": False}


def load_starting_weights(
    student: FeatureModel,
    base: str,
    checkpoint: AnyPath | None = None,
    weights: Weights = "auto",
    **timm_kwargs: Any,
) -> str:
    """Loads starting weights into a student that was just created.

    They are weights of the base, or of a student of the same architecture. Modules that the base
    doesn't have (`own_modules`) keep their values in the first case, and so does a classifier of
    another number of classes in both. timm resamples position and patch embeddings to the
    student's sizes. All other tensors must match.

    Args:
        student: from `create_student`.
        base: timm name of the model that the student is built on.
        checkpoint: weight file (see `read_state_dict`); None for timm's weights of the base.
        weights: weights to load from a checkpoint.
        timm_kwargs: other arguments that the student was built with.

    Returns:
        Note for the user: source, and the modules that are new or were adapted.

    Raises:
        CheckpointMismatch: the weights don't match; it lists the tensors.
        ValueError: timm has no weights, or the file can't be read safely.
        ConnectionError: timm's weights can't be downloaded.
    """
    model: Any = student
    own: dict[str, Tensor] = model.state_dict()
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    given, file = dict(timm_kwargs), {}
    if checkpoint is None:
        field, source = "pretrained", f"timm's weights of {base}"
        classes = model.pretrained_cfg["num_classes"]
        before = {}
        if not (timm_kwargs.get("pretrained_cfg") or timm_kwargs.get("pretrained_cfg_overlay")):
            # timm's weights have the shapes of the base without options; others are the caller's
            before = build_timm(base, device="meta").state_dict()
    else:
        field, source = "checkpoint", str(checkpoint)
        file = read_state_dict(checkpoint, weights)
        classes = next((len(file[x]) for head in heads if (x := f"{head}.weight") in file), 0)
        before = file
        overlay = timm_kwargs.get("pretrained_cfg_overlay") or {}
        overlay = {**overlay, **_NO_SOURCE, "state_dict": file, "num_classes": classes}
        given["pretrained_cfg_overlay"] = overlay
    is_student = any(n in file for n in own if n == "projection.weight" or ".proj_in." in n)
    new = [] if is_student else [*getattr(model, "own_modules", ())]
    try:
        if is_student:
            adapt = adapt_eva if isinstance(model, Eva) else adapt_vision_transformer
            state = {
                n: x for n, x in adapt(file, model).items() if n in own or not _is_in(n, heads)
            }
        else:
            state = {n: x for n, x in _base_state(base, classes, given).items() if n in own}
        for head in heads:
            name = f"{head}.weight"
            differs = name in own and (name not in state or state[name].shape != own[name].shape)
            if differs and head not in new:
                new.append(head)
        load_strictly(model, {**state, **{n: own[n] for n in own if _is_in(n, new)}}, "", base)
    except CheckpointMismatch as error:
        stored = "" if checkpoint is None else _stored_student(checkpoint)
        reason = str(error).removeprefix("checkpoint: ").lstrip()
        raise CheckpointMismatch(f"{field}: {source} {reason}{stored}") from error.__cause__
    return f"student: starts from {source}{_changes(own, before, new, heads, classes)}"


def _base_state(base: str, classes: int, timm_kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict of the base with its weights, all loaded, at the student's sizes.

    Raises:
        CheckpointMismatch: they don't fit; the message does not name the source.
    """
    given = {**timm_kwargs, "pretrained": True, "num_classes": classes}
    try:
        with torch.random.fork_rng(devices=[]):  # the student's draws don't depend on its weights
            state: dict[str, Tensor] = build_timm(base, **given).state_dict()
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:  # timm converts and loads files of many layouts
        raise _described(error, base) from error
    return state


def _described(error: Exception, base: str) -> CheckpointMismatch:
    """Shortens torch's list of all names and shapes that don't fit."""
    text = str(error)
    problems = {
        kind: re.findall(r'"([^"]+)"', part[1]) if (part := re.search(pattern, text)) else []
        for kind, pattern in (
            ("missing", r"Missing key\(s\) in state_dict: (.*)"),
            ("unexpected", r"Unexpected key\(s\) in state_dict: (.*)"),
        )
    }
    shapes = r"size mismatch for (\S+): .*?Size\(\[([\d, ]*)\]\).*?Size\(\[([\d, ]*)\]\)"
    problems["of another shape"] = [
        f"{name} ({theirs}) instead of ({own})" for name, theirs, own in re.findall(shapes, text)
    ]
    if not any(problems.values()):
        lines = text.strip().splitlines() or [type(error).__name__]
        return CheckpointMismatch(f"can't be loaded into {base}: {lines[0]}")
    return mismatch("", base, problems)


def _is_in(name: str, modules: Collection[str]) -> bool:
    """Checks whether a tensor belongs to one of these modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def _changes(
    own: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    new: Collection[str],
    heads: Collection[str],
    classes: int,
) -> str:
    """Describes what is not equal to the source: new modules and resampled tensors."""
    described = []
    for module in new:
        if not any(_is_in(name, (module,)) for name in own):
            continue  # the base has no such module either
        now = len(own[f"{module}.weight"]) if module in heads else classes
        described.append(
            module if classes in (0, now) else f"{module} ({now} classes, {classes} there)"
        )
    blocks = {int(n.split(".")[1]) for n in own if n.startswith("blocks.") and not _is_in(n, new)}
    text = ""
    if any(module.startswith("blocks.") for module in new) and blocks:
        text += f"; copied: blocks 0 to {max(blocks)} and the embeddings"
    if described:
        text += f"; new: {', '.join(described)}"
    resampled = [
        f"{name} {tuple(before[name].shape)} -> {tuple(x.shape)}"
        for name, x in own.items()
        if name in before and before[name].shape != x.shape and not _is_in(name, new)
    ]
    return text + (f"; resampled by timm: {listed(resampled, 3)}" if resampled else "")


def _stored_student(checkpoint: AnyPath) -> str:
    """Returns which student a checkpoint of featkd is of, for an error; "" for other files."""
    student = read_stored_recipe(checkpoint).get("student")
    if not isinstance(student, dict):
        return ""
    fields = ("base", "arch", "teacher_dim", "options")
    words = ", ".join(f"student.{name}: {student.get(name)}" for name in fields)
    return f". It is a checkpoint of featkd of {words}; expected the same base and options"
