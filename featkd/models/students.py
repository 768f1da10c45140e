"""Creates students of the paper's architectures from any timm ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
from timm.models import filter_pretrained_cfg, get_pretrained_cfg, parse_model_name

from featkd.models.base import build_timm
from featkd.models.features import FeatureModel, with_features
from featkd.models.lift import Lift
from featkd.models.starting import load_starting_weights
from featkd.models.weights import Weights
from featkd.models.widelast import SCHEDULES, WideLast
from featkd.runtime.remote import AnyPath
from featkd.runtime.suggest import suggestion

ARCHS = ("plain", "lift", *SCHEDULES)
GENERAL_NAME = "featkd_student"  # timm's name of students that have none of their own


def create_student(
    base: str = "deit_tiny_patch16_224",
    arch: str = "plain",
    teacher_dim: int = 384,
    num_classes: int = 1000,
    *,
    pretrained: bool = False,
    checkpoint: AnyPath | None = None,
    weights: Weights = "auto",
    notes: list[str] | None = None,
    **timm_kwargs: Any,
) -> FeatureModel:
    """Creates a student [EM26] in training mode, with timm's initialisation or starting weights.

    Args:
        base: timm model name, also "hf-hub:..." or "local-dir:...". `arch="plain"` allows every
            model of `with_features`; the others allow timm's VisionTransformer and Eva.
        arch: "plain" (the base unchanged), "lift" (see `Lift`), or a schedule of widths:
            "widelast", "fixed_step", "heads_linear", "fixed_linear" (see `widelast.schedule`).
        teacher_dim: width of the teacher's map; ignored by "plain".
        num_classes: number of classes; 0 for no head.
        pretrained: start from timm's weights of the base.
        checkpoint: start from a weight file of the base, or of such a student, instead. See
            `featkd.models.starting.load_starting_weights` for what is copied.
        weights: weights to load from a checkpoint (see `read_state_dict`).
        notes: notes on the starting weights are appended here.
        timm_kwargs: other arguments of the timm model, such as `img_size`, `patch_size`,
            `embed_dim`, `depth`, `num_heads`, `drop_path_rate`.

    Returns:
        A timm model with `forward_with_features` (see `FeatureModel`).

    Raises:
        ValueError: `base` or `arch` is unknown (the nearest name is suggested), sizes don't match,
            or `pretrained` and `checkpoint` are both given.
        CheckpointMismatch: the starting weights don't match; it lists the tensors.

    Examples:
        >>> student = create_student("deit_tiny_patch16_224", arch="widelast", teacher_dim=384)
        >>> sum(p.numel() for p in student.parameters())
        7313896
    """
    if arch not in ARCHS:
        raise ValueError(
            f"arch: unknown {arch!r}{suggestion(arch, ARCHS)}; allowed: {', '.join(ARCHS)}"
        )
    check_timm_name("base", base)
    if timm_kwargs.get("features_only"):
        raise ValueError("features_only: True is not supported; use model.forward_with_features")
    if pretrained and checkpoint is not None:
        raise ValueError(
            f"checkpoint: {checkpoint} given together with pretrained: True; allowed: one of them"
        )
    options = {**timm_kwargs, "num_classes": num_classes}
    if arch == "plain":
        student = with_features(build_timm(base, **options))
    elif arch == "lift":
        student = cast(FeatureModel, Lift.adopt(build_timm(base, **options), teacher_dim))
    else:
        student = cast(FeatureModel, WideLast.build(base, arch, teacher_dim, **options))
    if pretrained or checkpoint is not None:
        note = load_starting_weights(student, base, checkpoint, weights, **timm_kwargs)
        if notes is not None:
            notes.append(note)
    if arch != "plain":
        _describe(student, base, arch, teacher_dim)
    return student


def _describe(student: Any, base: str, arch: str, teacher_dim: int) -> None:
    """Corrects timm's record of a changed model, which timm's hub functions write."""
    # The record must not offer the base's weights for download: they don't fit this model.
    student.pretrained_cfg = filter_pretrained_cfg(student.pretrained_cfg, remove_source=True)
    # A base with a source is resolved to the architecture that its config.json names.
    name = student.pretrained_cfg["architecture"] if ":" in base else base.partition(".")[0]
    family, patch, sizes = name.partition("_patch")
    own_name = f"{family}_{arch}{teacher_dim}{patch}{sizes}"  # as in featkd.models.registered
    if not timm.is_model(own_name):
        own_name = GENERAL_NAME
        student._model_args |= {"base": name, "arch": arch, "teacher_dim": teacher_dim}
    student.pretrained_cfg["architecture"] = own_name
    student.default_cfg = student.pretrained_cfg


def check_timm_name(argument: str, name: str) -> None:
    """Raises ValueError with the nearest name if timm does not know the model `name`.

    Names with a source are only checked for the source and the folder.
    """
    try:
        source, place = parse_model_name(name)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
    if source == "local-dir" and not (Path(place) / "config.json").is_file():
        raise ValueError(
            f"{argument}: {name!r}: no file {place}/config.json; expected a folder that timm's "
            "save_for_hf wrote"
        )
    if source is not None:
        return
    if not timm.is_model(name):
        near = suggestion(name.partition(".")[0], timm.list_models())
        raise ValueError(f"{argument}: timm has no model {name!r}{near}")
    try:
        get_pretrained_cfg(name)
    except RuntimeError as error:
        near = suggestion(name, timm.list_models(f"{name.partition('.')[0]}.*", include_tags=True))
        raise ValueError(f"{argument}: timm has no weights {name!r}{near}") from error
