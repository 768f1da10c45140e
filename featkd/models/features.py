"""Features as return values: `forward_with_features` on timm's models, without hooks.

timm builds the models, so parameters, state-dict keys and pretrained weights are timm's. Only the
class of an instance changes, to a subclass with the additional method.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn

POOLED = "pooled"
Layer: TypeAlias = int | str
"""Index of a layer, or "pooled" for the pooled feature as a map (B, 1, C)."""


class NotPooledError(ValueError):
    """A model has no pooled feature."""


class FeatureModel(Protocol):
    """nn.Module that can return feature maps beside its logits; every model here is one."""

    training: bool

    def __call__(self, images: Tensor) -> Tensor: ...

    def forward_with_features(
        self, images: Tensor, layers: Sequence[Layer]
    ) -> tuple[Tensor, list[Tensor]]:
        """Computes logits and the patch-token maps of some layers, in one forward pass.

        The maps are the layers' outputs before the final norm, without class, register or
        distillation tokens, and with a gradient. The layers are those of timm's
        `forward_intermediates`: the blocks of a ViT, the self-attention blocks of a CaiT, the
        stages of a Swin or of a convolutional network (often with its stem as layer 0). A map
        (B, C, H, W) is returned as tokens (B, H*W, C). The last layer of a Lift student is its
        lifted map.

        Args:
            images: (B, in_chans, H, W), in the model's dtype (or under autocast).
            layers: indices, negative ones from the end; any order, with repeats, or empty.
                "pooled" is the feature before the classifier (timm's
                `forward_head(pre_logits=True)`), as a map (B, 1, C) of one token.

        Returns:
            logits (B, classes), and a list with one map (B, N, C) for each of `layers`, in that
            order. A map may be a strided view (without its prefix tokens), and a repeated layer
            returns the same tensor twice.

        Raises:
            ValueError: a layer is out of range.
            TypeError: `layers` is not a sequence of ints.
        """
        ...

    def forward_maps(self, images: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
        """Computes only the maps of `forward_with_features`; stops after the deepest layer."""
        ...

    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def to(self, *args: Any, **kwargs: Any) -> Any: ...
    def requires_grad_(self, requires_grad: bool = True) -> Any: ...
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


def resolve_layers(layers: Iterable[Layer], depth: int) -> tuple[Any, ...]:
    """Converts layer indices that may be negative to indices from 0 to depth - 1.

    Args:
        layers: ints, of which negative ones count from the end; "pooled" is kept.
        depth: number of layers.

    Returns:
        The same number of indices, in the same order.

    Raises:
        ValueError: an index is out of range.
        TypeError: `layers` is not a sequence of ints.

    Examples:
        >>> resolve_layers([0, -1], depth=12)
        (0, 11)
    """
    if isinstance(layers, (int, str)):
        raise TypeError(f"layers: expected a sequence of ints, got {layers!r}")
    resolved: list[Layer] = []
    for layer in layers:
        if layer == POOLED:
            resolved.append(POOLED)
            continue
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers: expected ints, got {layer!r} ({type(layer).__name__})")
        if not -depth <= layer < depth:
            raise ValueError(
                f"layers: {layer} is out of range for a model with {depth} layers "
                f"(valid: {-depth}..{depth - 1})"
            )
        resolved.append(layer % depth)
    return tuple(resolved)


class BlockFeatures:
    """`forward_with_features` by timm's `forward_intermediates`, for any of its models."""

    map_format = "NLC"  # tokens, without a copy to (B, C, H, W), where timm's class offers them

    def forward_with_features(
        self: Any, images: Tensor, layers: Sequence[Layer]
    ) -> tuple[Tensor, list[Tensor]]:
        """Computes logits and the raw patch tokens (B, N, C) of `layers`; see `FeatureModel`."""
        features, maps = self._run(images, resolve_layers(layers, num_layers(self)))
        return self.forward_head(features), maps

    def forward_maps(self: Any, images: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
        """Computes the maps of `layers` only, up to the deepest; see `FeatureModel`."""
        wanted = resolve_layers(layers, num_layers(self))
        maps: list[Tensor] = self._run(images, wanted, POOLED not in wanted)[1] if wanted else []
        return maps

    def _run(
        self: Any, images: Tensor, wanted: Sequence[Layer], stop_early: bool = False
    ) -> tuple[Any, list[Tensor]]:
        """Output of timm's `forward_features`, None with `stop_early`, and the wanted maps."""
        distinct = sorted({layer for layer in wanted if layer != POOLED})
        features, maps = None, []
        if distinct:  # timm returns each layer once, in the layers' order
            options = {"indices": distinct, "output_fmt": self.map_format}
            if stop_early:
                options |= {"stop_early": True, "intermediates_only": True}
                maps = self.forward_intermediates(images, **options)
            else:
                features, maps = self.forward_intermediates(images, **options)
        else:  # forward_intermediates takes no empty selection
            features = self.forward_features(images)
        found: dict[Layer, Tensor] = dict(zip(distinct, map(_as_tokens, maps), strict=True))
        if POOLED in wanted:
            found[POOLED] = self._pooled(features)
        return features, [found[layer] for layer in wanted]

    def _pooled(self: Any, features: Any) -> Tensor:
        """Pooled feature (B, 1, C) of the output of timm's `forward_features`."""
        pooled: Tensor = self.forward_head(features, pre_logits=True)
        if pooled.dim() != 2:
            raise NotPooledError(
                f"layers: {POOLED!r}: {type(self).__name__} has no pooled feature: its "
                f"forward_head(pre_logits=True) returns shape {tuple(pooled.shape)}"
            )
        return pooled.unsqueeze(1)


def _as_tokens(x: Tensor) -> Tensor:
    """A view of a map (B, C, H, W) as tokens (B, H*W, C); tokens are returned as they are."""
    return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x


def _map_format(kind: type) -> str:
    """Format in which a class of timm returns its maps: as tokens if it can."""
    try:  # timm checks the format before it touches the images
        cast(Any, kind).forward_intermediates(nn.Module(), None, output_fmt="NLC")
    except AssertionError:
        return "NCHW"
    except Exception:
        return "NLC"
    return "NLC"


@functools.cache
def _with_features_class(kind: Any) -> Any:
    """Returns a subclass of a timm model's class with `forward_with_features`."""

    def reduce(self: nn.Module) -> tuple[Any, ...]:
        return _empty, (kind,), self.__dict__

    # The class is made at run time; pickling and copying a model make it again.
    content = {"__reduce__": reduce, "map_format": _map_format(kind)}
    return type(f"Feature{kind.__name__}", (BlockFeatures, kind), content)


def _empty(kind: type) -> nn.Module:
    """Model with features without its parameters, for unpickling."""
    made = _with_features_class(kind)
    return cast(nn.Module, made.__new__(made))


def with_features(model: nn.Module) -> FeatureModel:
    """Adds the method `forward_with_features` to a timm model, in place.

    Parameters, buffers, state-dict keys and `model(images)` don't change.

    Args:
        model: a timm model with `forward_intermediates`: nearly every one.

    Returns:
        `model`, now of a subclass of its class.

    Raises:
        ValueError: `model` has no `forward_intermediates`.

    Examples:
        >>> import timm, torch
        >>> size = dict(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3)
        >>> model = with_features(timm.create_model("vit_tiny_patch16_224", **size))
        >>> logits, maps = model.forward_with_features(torch.zeros(1, 3, 32, 32), [-1])
        >>> tuple(maps[0].shape)
        (1, 4, 48)
    """
    if not isinstance(model, BlockFeatures):
        needed = ("forward_intermediates", "forward_features", "forward_head", "feature_info")
        missing = [name for name in needed if not hasattr(model, name)]
        if missing:
            raise ValueError(
                f"model: {type(model).__name__} gives no feature maps: it has no {missing[0]}; "
                "expected a timm model that has one"
            )
        kind: Any = type(model)
        model.__class__ = _with_features_class(kind)
    return cast(FeatureModel, model)


def num_layers(model: FeatureModel) -> int:
    """Number of layers that `model.forward_with_features` can return."""
    return len(cast(Any, model).feature_info)


def feature_grid(model: FeatureModel, layer: int = -1) -> tuple[int, int] | None:
    """Grid (H, W) of a layer's map; tokens are in row-major order.

    Args:
        model: a model with features.
        layer: layer index; the stages of a hierarchical model have different grids.

    Returns:
        (H, W), or None if it isn't fixed: the model takes images of any size or drops patches at
        random.

    Raises:
        ValueError: the layer is out of range.
    """
    (index,) = resolve_layers([layer], num_layers(model))
    timm_model = cast(Any, model)
    embed: Any = getattr(timm_model, "patch_embed", None)
    infos = timm_model.feature_info
    size = getattr(embed, "img_size", None)
    if size is None or getattr(timm_model, "dynamic_img_size", False):
        return None
    if not isinstance(getattr(timm_model, "patch_drop", None) or nn.Identity(), nn.Identity):
        return None
    if hasattr(embed, "grid_size") and len({str(x["reduction"]) for x in infos}) == 1:
        height, width = embed.grid_size
        return height, width
    reduction = infos[index]["reduction"]
    if isinstance(reduction, int):
        reduction = (reduction, reduction)
    # Models that halve an odd grid round up.
    return math.ceil(size[0] / reduction[0]), math.ceil(size[1] / reduction[1])


@contextmanager
def evaluating(*models: FeatureModel) -> Iterator[None]:
    """Sets models to evaluation mode, without gradients; restores their modes at the end."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def layers_of(model: FeatureModel) -> nn.ModuleList | nn.Sequential | list[nn.Module]:
    """Blocks or stages of a model in order, to be sharded or compiled one by one; may be empty."""
    for name in ("blocks", "stages", "layers"):
        found = getattr(model, name, None)
        if isinstance(found, (nn.Sequential, nn.ModuleList)):
            return found
    return []
