"""Base classes of the Lift and WideLast students: timm ViTs whose head has its own width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.layers import get_device_dtype
from timm.models import named_apply
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, get_init_weights_vit
from torch import nn

from featkd.models.download import check_download, is_on_hub, unreachable
from featkd.models.features import BlockFeatures

_Timm: Any = object  # timm's class follows in the method resolution order


class OwnHead(_Timm):  # type: ignore[misc]
    """Methods of a timm ViT whose head has `num_features` instead of `embed_dim` inputs.

    `embed_dim` remains the width of the patch embedding, of the class token and of `pos_embed`.
    """

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a newly initialised one, as timm's models do.

        Args:
            num_classes: new number of classes; 0 for no head.
            global_pool: new pooling, if the student allows a choice; None keeps the present one.
        """
        super().reset_classifier(0, global_pool)  # the pooling, and an Identity for the head
        self.num_classes = num_classes
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, **get_device_dtype(self))
            self.head.train(self.training)

    def _set_num_features(self, width: int) -> None:
        """Sets the width of the head's input and creates a head with timm's initialisation."""
        self.num_features = self.head_hidden_size = width
        self.reset_classifier(self.num_classes)
        self._initialise(self.head, "head")

    def _materialise(self, module: nn.Module, name: str) -> None:
        """Moves a module from the meta device to this model's, with new values."""
        module.to_empty(device=get_device_dtype(self)["device"])
        for inner in module.modules():
            if hasattr(inner, "init_weights"):  # the query of timm's attention pooling
                cast(Any, inner).init_weights()
        self._initialise(module, name)

    def _initialise(self, module: nn.Module, name: str) -> None:
        """Gives the parameters and buffers of this model's module `name` timm's first values."""
        raise NotImplementedError


class StudentVisionTransformer(OwnHead, BlockFeatures, VisionTransformer):  # type: ignore[misc]
    """timm's VisionTransformer with a head of its own width."""

    def _initialise(self, module: nn.Module, name: str) -> None:
        mode = self.weight_init_mode
        head_bias = -math.log(self.num_classes) if "nlhb" in mode else 0.0
        init: Any = get_init_weights_vit(mode, head_bias)
        named_apply(init, module, name=name, include_root=True)


class StudentEva(OwnHead, BlockFeatures, Eva):  # type: ignore[misc]
    """timm's Eva (DINOv3, EVA-02, Perception Encoder) with a head of its own width."""

    def _initialise(self, module: Any, name: str) -> None:
        module.apply(partial(self._init_weights, needs_reset=True))
        scales: Mapping[nn.Module, float] = {}
        if name.startswith("blocks."):
            depth = int(name.removeprefix("blocks.")) + 1
            scales = dict.fromkeys((module.attn.proj, module.mlp.fc2), (2.0 * depth) ** -0.5)
        elif name == "head" and isinstance(module, nn.Linear):
            scales = {module: self.head_init_scale or 1.0}
        with torch.no_grad():
            for linear, scale in scales.items():
                cast(nn.Linear, linear).weight.mul_(scale)


def build_timm(name: str, **timm_kwargs: Any) -> nn.Module:
    """Builds a timm model; turns timm's assertions on sizes into ValueErrors.

    `img_size` is left out for models that take images of any size.

    Raises:
        ValueError: timm can't build the model with these arguments, or has no weights for it.
        ConnectionError: its pretrained weights, or the configuration of a model on the Hugging
            Face Hub, can't be downloaded.
    """
    # With a configuration of the caller's the weights may come from elsewhere.
    given = {"pretrained_cfg", "pretrained_cfg_overlay"} & {*timm_kwargs}
    pretrained = bool(timm_kwargs.get("pretrained")) and not given
    downloads = pretrained or is_on_hub(name)
    if downloads:
        check_download(name, pretrained)
    try:
        model: nn.Module = timm.create_model(name, **timm_kwargs)
    except AssertionError as error:
        options = ", ".join(
            f"{key}={value!r}"
            for key, value in timm_kwargs.items()
            if key not in ("pretrained_cfg", "pretrained_cfg_overlay", "device")
        )
        raise ValueError(f"{options}: timm can't build {name!r} with these: {error}") from error
    except TypeError as error:
        if "img_size" not in timm_kwargs or "'img_size'" not in str(error):
            raise
        del timm_kwargs["img_size"]
        return build_timm(name, **timm_kwargs)
    except OSError as error:
        if not downloads:
            raise
        raise unreachable(name, error) from error
    return model


def pretrained_config(name: str, **timm_kwargs: Any) -> dict[str, Any]:
    """Returns timm's record of a model's weights, with "mean" and "std", without loading them.

    Args:
        name: timm model name; one with a source ("hf-hub:...") reads its configuration there.
        timm_kwargs: arguments of the timm model; those that change the record are respected.
    """
    changes = {k: v for k, v in timm_kwargs.items() if k.startswith("pretrained_cfg")}
    if changes or ":" in name:
        model: Any = build_timm(name, device="meta", **changes)
        return dict(model.pretrained_cfg)
    record = timm.get_pretrained_cfg(name)
    return {} if record is None else record.to_dict()


def check_base(model: nn.Module, arch: str) -> None:
    """Raises ValueError unless `model` is exactly timm's VisionTransformer or Eva."""
    if type(model) not in (VisionTransformer, Eva):
        raise ValueError(
            f"base: arch {arch!r} needs a model of timm's class VisionTransformer or Eva, "
            f"got {type(model).__name__}; expected another base, or arch 'plain'"
        )
