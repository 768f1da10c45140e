"""Creates students of the paper's architectures from any timm ViT."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import timm
from timm.models import filter_pretrained_cfg, get_pretrained_cfg

from featkd.models.base import build_timm
from featkd.models.features import FeatureModel, with_features
from featkd.models.lift import Lift
from featkd.models.widelast import SCHEDULES, WideLast
from featkd.runtime.suggest import suggestion

ARCHS = ("plain", "lift", *SCHEDULES)


def create_student(
    base: str = "deit_tiny_patch16_224",
    arch: str = "plain",
    teacher_dim: int = 384,
    num_classes: int = 1000,
    **timm_kwargs: Any,
) -> FeatureModel:
    """Creates a student [EM26] in training mode, with timm's initialisation.

    Args:
        base: timm model name. `arch="plain"` allows every model of `with_features`;
            the others allow only timm's VisionTransformer.
        arch: "plain" (the base unchanged), "lift" (see `Lift`), or a schedule of widths:
            "widelast", "fixed_step", "heads_linear", "fixed_linear" (see `widelast.schedule`).
        teacher_dim: width of the teacher's map; ignored by "plain".
        num_classes: number of classes; 0 for no head.
        timm_kwargs: other arguments of the timm model, such as `img_size`, `patch_size`,
            `embed_dim`, `depth`, `num_heads`, `drop_path_rate`. With `pretrained=True`, "plain"
            and "lift" load timm's weights of the base.

    Returns:
        A timm model with `forward_with_features` (see `FeatureModel`).

    Raises:
        ValueError: `base` or `arch` is unknown (the nearest name is suggested), or sizes don't
            match.

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
                f"pretrained: got True, but arch {arch!r} has other shapes than {base!r}; "
                "allowed: False"
            )
        model = WideLast.build(base, arch, teacher_dim, **timm_kwargs)
    # The record must not offer the base's weights for download: they don't fit this model.
    model.pretrained_cfg = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True)
    name = base.partition(".")[0]
    if model.pretrained_cfg.get("architecture") == name:
        # timm's hub functions write this name. Only those of `featkd.models.registered` can be
        # created from it; the base's own name would create the base.
        family, patch, sizes = name.partition("_patch")
        model.pretrained_cfg["architecture"] = f"{family}_{arch}{teacher_dim}{patch}{sizes}"
    model.default_cfg = model.pretrained_cfg
    student: FeatureModel = model
    return student


def check_timm_name(argument: str, name: str) -> None:
    """Raises ValueError with the nearest name if timm does not know the model `name`.

    Names with a source ("hf-hub:...", "local-dir:...") are not checked.
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
