"""`create_student`: a student of any of the paper's architectures, on any timm ViT."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import timm
from timm.models import filter_pretrained_cfg, get_pretrained_cfg

from featkd.models.base import build_timm
from featkd.models.features import FeatureModel, with_features
from featkd.models.lift import Lift
from featkd.models.widelast import SCHEDULES, WideLast
from featkd.runtime.checks import suggestion

ARCHS = ("plain", "lift", *SCHEDULES)


def create_student(
    base: str = "deit_tiny_patch16_224",
    arch: str = "plain",
    teacher_dim: int = 384,
    num_classes: int = 1000,
    **timm_kwargs: Any,
) -> FeatureModel:
    """Make a student [EM26], in training mode, with timm's initialisation.

    Args:
        base: a timm model name. `arch="plain"` takes any model that `with_features` takes (ViT,
            DeiT, CaiT, Swin); the others take timm's VisionTransformer.
        arch: "plain" (the base as it is), "lift" (see `Lift`), or a schedule of widths:
            "widelast", "fixed_step", "heads_linear", "fixed_linear" (see `widelast.schedule`).
        teacher_dim: the width of the map that is matched, i.e. the teacher's; "plain" ignores it.
        num_classes: 0 for no head.
        timm_kwargs: further arguments of the timm model, such as `img_size`, `patch_size`,
            `embed_dim`, `depth`, `num_heads`, `drop_path_rate`. `pretrained=True` starts "plain"
            and "lift" from timm's weights of the base.

    Returns:
        A timm model that has `forward_with_features` (see `FeatureModel`).

    Raises:
        ValueError: an unknown `base` or `arch` (the nearest name is suggested), or sizes that
            don't fit each other.

    Example:
        >>> student = create_student("deit_tiny_patch16_224", arch="widelast", teacher_dim=384)
        >>> sum(p.numel() for p in student.parameters())
        7313896
    """
    if arch not in ARCHS:
        raise ValueError(
            f"arch: unknown {arch!r}{suggestion(arch, ARCHS)}; allowed: {_names(ARCHS)}"
        )
    check_timm_name("base", base)
    if timm_kwargs.get("features_only"):
        raise ValueError("features_only: True is not supported; use model.forward_with_features")
    timm_kwargs["num_classes"] = num_classes
    if arch == "plain":
        return with_features(build_timm(base, **timm_kwargs))
    if arch == "lift":
        model: Any = Lift.adopt(build_timm(base, **timm_kwargs), teacher_dim)
    else:
        if timm_kwargs.get("pretrained"):
            raise ValueError(
                f"pretrained: arch {arch!r} has other shapes than {base!r}; allowed: False"
            )
        model = WideLast.build(base, arch, teacher_dim, **timm_kwargs)
    # The base's weights are not this model's: its record must not offer them for download.
    model.pretrained_cfg = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True)
    if model.pretrained_cfg.get("architecture") == base.partition(".")[0]:
        del model.pretrained_cfg["architecture"]
    model.default_cfg = model.pretrained_cfg
    student: FeatureModel = model
    return student


def check_timm_name(argument: str, name: str) -> None:
    """Raise ValueError, with the nearest name, unless timm knows the model `name`.

    Names with a source ("hf-hub:...", "local-dir:...") are left for timm to look up.
    """
    if ":" in name:
        return
    if not timm.is_model(name):
        near = suggestion(name.partition(".")[0], timm.list_models())
        raise ValueError(f"{argument}: timm has no model {name!r}{near}")
    try:
        get_pretrained_cfg(name)
    except RuntimeError as error:
        near = suggestion(name, timm.list_models(f"{name.partition('.')[0]}.*", include_tags=True))
        raise ValueError(f"{argument}: timm has no weights {name!r}{near}") from error


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)
