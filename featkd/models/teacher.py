"""`create_teacher`: a frozen timm model with features."""

from __future__ import annotations

from typing import Any

from featkd.models.base import build_timm
from featkd.models.features import FeatureModel, with_features
from featkd.models.students import check_timm_name
from featkd.models.talking_heads import fuse_talking_heads
from featkd.models.weights import (
    CheckpointMismatch,
    Weights,
    load_strictly,
    read_state_dict,
    read_stored_recipe,
)
from featkd.runtime.remote import AnyPath


def create_teacher(
    name: str,
    pretrained: bool = False,
    checkpoint: AnyPath | None = None,
    weights: Weights = "auto",
    **timm_kwargs: Any,
) -> FeatureModel:
    """Creates a teacher in evaluation mode, without gradients.

    Args:
        name: timm model name, or a student of featkd; any model of `with_features`.
        pretrained: if True, timm downloads its weights.
        checkpoint: weight file to load instead: .safetensors or a file of torch.save (see
            `read_state_dict`); every tensor must match.
        weights: weights to load from a checkpoint (see `read_state_dict`).
        timm_kwargs: other arguments of the timm model, such as `num_classes`, `img_size`.

    Returns:
        The model, with `forward_with_features` (see `FeatureModel`). A CaiT computes its attention
        by featkd's op (see `FusedTalkingHeads`); results differ by rounding.

    Raises:
        ValueError: the name is unknown (the nearest one is suggested), both `pretrained` and
            `checkpoint` are given, or the file can't be read safely.
        CheckpointMismatch: the file's tensors don't match the model's; it lists which.

    Examples:
        >>> teacher = create_teacher("deit_tiny_patch16_224", depth=1)
        >>> teacher.training, any(p.requires_grad for p in teacher.parameters())
        (False, False)
    """
    check_timm_name("name", name)
    if pretrained and checkpoint is not None:
        raise ValueError(
            f"checkpoint: {checkpoint} given together with pretrained=True; allowed: one of them"
        )
    model = build_timm(name, pretrained=pretrained, **timm_kwargs)
    if checkpoint is not None:
        try:
            load_strictly(model, read_state_dict(checkpoint, weights), checkpoint, name)
        except CheckpointMismatch as error:
            raise CheckpointMismatch(f"{error}{_stored_model(checkpoint)}") from None
    teacher = with_features(model)
    fuse_talking_heads(model)
    teacher.eval()
    teacher.requires_grad_(False)
    return teacher


def _stored_model(checkpoint: AnyPath) -> str:
    """Returns which model a checkpoint of featkd is of, for an error; "" for other files."""
    recipe = read_stored_recipe(checkpoint)
    student, size = recipe.get("student"), (recipe.get("data") or {}).get("img_size")
    if not isinstance(student, dict):
        return ""
    words = f"teacher.name: {student.get('base')}, teacher.options: {student.get('options')}"
    if size is not None:
        words += f", teacher.img_size: {size}"
    if student.get("arch") == "plain":
        return f". It is a checkpoint of featkd; its stored recipe can build it: {words}"
    return (
        f". It is a checkpoint of featkd, of a student with arch {student.get('arch')!r}, "
        "which its stored recipe can build: featkd.train.load_trained(path)"
    )
