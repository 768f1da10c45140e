"""Registers the paper's students with timm when imported [EM26].

Example:
    >>> import featkd.models, timm
    >>> student = timm.create_model("deit_tiny_lift384_patch16_224", num_classes=10)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from timm.models import (
    filter_pretrained_cfg,
    generate_default_cfgs,
    load_pretrained,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as adapt_eva
from timm.models.vision_transformer import checkpoint_filter_fn as adapt_vision_transformer
from torch import nn

from featkd.models.features import FeatureModel
from featkd.models.students import GENERAL_NAME, create_student

_BASE = "deit_tiny_patch16_224"
_STUDENTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # arch, and timm's arguments
    "deit_tiny_lift384_patch16_224": ("lift", {}),
    "deit_tiny_widelast384_patch16_224": ("widelast", {}),
    "deit_tiny_heads_linear384_patch16_224": ("heads_linear", {}),
    "deit_tiny_fixed_linear384_patch16_224": ("fixed_linear", {}),
    "deit_tiny_fixed_step384_patch16_224": ("fixed_step", {}),
    # controls: as many parameters, 204 or 219 channels throughout
    "deit_tiny_w204_patch16_224": ("plain", {"embed_dim": 204}),
    "deit_tiny_w219_patch16_224": ("plain", {"embed_dim": 219}),
}

# DeiT-Tiny's data settings, which timm's loaders read. No model here has weights to download.
_NO_WEIGHTS = dict.fromkeys(("url", "hf_hub_id", "license", "architecture", "tag"))
default_cfgs = generate_default_cfgs(
    {name: replace(resolve_pretrained_cfg(_BASE), **_NO_WEIGHTS) for name in _STUDENTS}
)


def _register(name: str, arch: str, options: Mapping[str, Any]) -> None:
    """Registers a student of DeiT-Tiny and a teacher of 384 channels with timm."""

    def student(pretrained: bool = False, **kwargs: Any) -> FeatureModel:
        return _create(name, _BASE, arch, 384, pretrained, {**options, **kwargs})

    student.__name__ = student.__qualname__ = name  # timm's name of the model
    globals()[name] = register_model(student)


for _name, (_arch, _options) in _STUDENTS.items():
    _register(_name, _arch, _options)


def featkd_student(
    pretrained: bool = False, *, base: str, arch: str, teacher_dim: int = 384, **kwargs: Any
) -> FeatureModel:
    """Any student of `create_student`; config.json has its base, arch and width in model_args."""
    return _create(GENERAL_NAME, base, arch, teacher_dim, pretrained, kwargs)


register_model(featkd_student)


def _create(
    name: str, base: str, arch: str, teacher_dim: int, pretrained: bool, kwargs: dict[str, Any]
) -> FeatureModel:
    """Creates a student as timm's function of this name; `pretrained` needs a source of weights."""
    kwargs.pop("cache_dir", None)  # where timm would put a download
    known = name if name in default_cfgs else base
    record = kwargs.pop("pretrained_cfg", None)
    if record is None:  # without the base's weights, which don't fit
        record = filter_pretrained_cfg(resolve_pretrained_cfg(known).to_dict(), remove_source=True)
    cfg = resolve_pretrained_cfg(
        known, record, kwargs.pop("pretrained_cfg_overlay", None)
    ).to_dict()
    cfg.pop("architecture", None)
    sources = ("state_dict", "file", "hf_hub_id", "url")
    if pretrained and not any(cfg.get(source) for source in sources):
        raise ValueError(
            f"pretrained: got True, but {name!r} has no weights to download; allowed: False "
            f"(featkd.models.load_published reads published files)"
        )
    num_classes = kwargs.pop("num_classes", cfg["num_classes"])
    student: Any = create_student(
        base, arch, teacher_dim, num_classes, pretrained_cfg=cfg, **kwargs
    )
    student.pretrained_cfg["architecture"] = name
    if pretrained:  # a user's weights, written by timm's hub functions
        load_pretrained(
            cast(nn.Module, student),
            cfg,
            num_classes,
            kwargs.get("in_chans", 3),
            filter_fn=adapt_eva if isinstance(student, Eva) else adapt_vision_transformer,
            strict=True,
        )
    return cast(FeatureModel, student)
