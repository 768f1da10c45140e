"""Checkpoints in the layout that the paper's authors published [EM26], in both directions.

| Published name            | here                     | Student                                 |
|---------------------------|--------------------------|-----------------------------------------|
| `base_model.X`            | `X`                      | Lift: the blocks and the embeddings     |
| `base_model.norm.*`       | (dropped)                | Lift: dead weight                       |
| `base_model.head.*`       | (dropped)                | Lift: dead weight                       |
| `projections.L.weight`    | `projection.weight`      | Lift; L is the last block's index       |
| `layer_norms.L.*`         | `projection_norm.*`      | Lift                                    |
| `head.*`                  | `head.*`                 | both                                    |
| everything else           | the same                 | WideLast and the other schedules        |
"""

from __future__ import annotations

import math
import re
from os import PathLike
from typing import Any, cast

from torch import Tensor, nn

from featkd.models.features import FeatureModel
from featkd.models.students import create_student
from featkd.models.weights import (
    CheckpointMismatch,
    Weights,
    load_strictly,
    mismatch,
    read_state_dict,
)
from featkd.models.widelast import SCHEDULES, schedule

_LIFT_PREFIX = "base_model."
_DEAD = ("norm.weight", "norm.bias", "head.weight", "head.bias")
_PUBLISHED_HEADS = 3  # DeiT-Tiny's; head counts leave no trace in the shapes of the weights


def load_published(
    path: str | PathLike[str],
    *,
    arch: str | None = None,
    num_heads: int | None = None,
    weights: Weights = "model",
) -> FeatureModel:
    """Loads a student in the published layout; its sizes are inferred from the tensors.

    Args:
        path: a .pth or .safetensors file (see `read_state_dict`).
        arch: schedule, needed if the widths fit several. By default `widelast` (published as
            `heads_step`) is preferred to `fixed_step`, and `heads_linear` to `fixed_linear`.
        num_heads: heads of the first block; None for 3, as published.
        weights: weights to load from a checkpoint (see `read_state_dict`). The default is the last
            ones: the published code keeps an average but evaluates the last weights.

    Returns:
        The Lift or WideLast student, in evaluation mode.

    Raises:
        CheckpointMismatch: names are missing or unexpected, or the widths fit no schedule.
        ValueError: the file can't be read safely, or `arch` or `num_heads` doesn't match it.
    """
    state = read_state_dict(path, weights)
    is_lift = any(name.startswith(_LIFT_PREFIX) for name in state)
    state = _from_published_lift(state, path) if is_lift else state
    widths, sizes = _sizes(state, path, "lift" if is_lift else "widelast")
    heads = _PUBLISHED_HEADS if num_heads is None else num_heads
    if heads < 1 or widths[0] % heads:
        raise ValueError(
            f"num_heads: expected a divisor of the width of {path}, {widths[0]}; got {heads}"
        )
    if is_lift:
        if arch not in (None, "lift"):
            raise ValueError(f"arch: {path} holds a Lift student, got {arch!r}; allowed: 'lift'")
        found, teacher_dim = "lift", state["projection.weight"].shape[0]
    else:
        found, teacher_dim = _matching_schedule(widths, heads, arch, path), widths[-1]
    model = create_student("deit_tiny_patch16_224", found, teacher_dim, num_heads=heads, **sizes)
    load_strictly(cast(nn.Module, model), state, path, f"the {found} student of its shapes")
    model.eval()
    return model


def _from_published_lift(state: dict[str, Tensor], path: str | PathLike[str]) -> dict[str, Tensor]:
    """Renames the tensors of a published Lift to our names and drops unused ones."""
    outer = {name: value for name, value in state.items() if not name.startswith(_LIFT_PREFIX)}
    inner = {name.removeprefix(_LIFT_PREFIX): state[name] for name in state if name not in outer}
    last = _depth(inner, path, "lift") - 1
    names = {
        f"projections.{last}.weight": "projection.weight",
        f"layer_norms.{last}.weight": "projection_norm.weight",
        f"layer_norms.{last}.bias": "projection_norm.bias",
        "head.weight": "head.weight",
        "head.bias": "head.bias",
    }
    problems = {
        "missing": [name for name in names if name not in outer],
        "unexpected": [name for name in outer if name not in names],
    }
    if any(problems.values()):
        raise mismatch(path, "the published Lift", problems)
    live = {name: value for name, value in inner.items() if name not in _DEAD}
    return live | {names[name]: value for name, value in outer.items()}


def _depth(state: dict[str, Tensor], path: str | PathLike[str], model_name: str) -> int:
    found = [match for name in state if (match := re.match(r"blocks\.(\d+)\.", name))]
    if not found:
        raise mismatch(path, f"a published {model_name} student", {"missing": ["blocks.0.*"]})
    return 1 + max(int(match[1]) for match in found)


def _sizes(
    state: dict[str, Tensor], path: str | PathLike[str], model_name: str
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Infers the blocks' widths, and timm's arguments, from tensors with our names."""
    depth = _depth(state, path, model_name)
    norms = [f"blocks.{index}.norm1.weight" for index in range(depth)]
    patches, hidden = "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"
    needed = {**dict.fromkeys(norms, 1), patches: 4, "pos_embed": 3, "head.weight": 2, hidden: 2}
    if "projection_norm.weight" in state:  # a Lift
        needed["projection.weight"] = 2
    problems = {
        "missing": [name for name in needed if name not in state],
        "of another rank": [
            f"{name} {tuple(state[name].shape)} instead of {dims} dimensions"
            for name, dims in needed.items()
            if name in state and state[name].dim() != dims
        ],
    }
    if any(problems.values()):
        raise mismatch(path, f"a published {model_name} student", problems)
    tokens = state["pos_embed"].shape[1] - 1  # one of the positions is the class token's
    grid = math.isqrt(max(tokens, 0))
    if grid < 1 or grid * grid != tokens:
        raise CheckpointMismatch(
            f"checkpoint: {path}: pos_embed has {tokens} patch positions, which form no square"
        )
    widths = tuple(state[name].shape[0] for name in norms)
    _, in_chans, *patch_size = state[patches].shape
    return widths, {
        "num_classes": state["head.weight"].shape[0],
        "img_size": tuple(grid * side for side in patch_size),
        "patch_size": tuple(patch_size),
        "in_chans": in_chans,
        "embed_dim": widths[0],
        "depth": depth,
        "mlp_ratio": state[hidden].shape[0] / widths[0],
    }


def _matching_schedule(
    widths: tuple[int, ...], heads: int, arch: str | None, path: str | PathLike[str]
) -> str:
    """First schedule (only `arch` if given) with these widths."""
    if arch is not None and arch not in SCHEDULES:
        raise ValueError(
            f"arch: expected one of {', '.join(SCHEDULES)} for {path}, which holds no Lift; "
            f"got {arch!r}"
        )
    reasons = []
    for candidate in SCHEDULES if arch is None else (arch,):
        try:
            sizes = schedule(candidate, widths[0], heads, len(widths), widths[-1])
        except ValueError as error:
            reasons.append(f"{candidate}: {error}")
            continue
        expected = tuple(size.width for size in sizes)
        if expected == widths:
            return candidate
        reasons.append(f"{candidate}: has {_widths(expected)}")
    raise CheckpointMismatch(
        f"checkpoint: {path} has blocks of the widths {_widths(widths)}, which are no schedule's "
        f"({'; '.join(reasons)})"
    )


def _widths(widths: tuple[int, ...]) -> str:
    return "/".join(str(width) for width in widths)
