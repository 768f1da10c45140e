"""Features as return values: `forward_with_features` on timm's transformers, without hooks.

timm builds the models, so parameters, state-dict keys and pretrained weights are timm's. Only the
class of an instance changes, to a subclass with the additional method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class FeatureModel(Protocol):
    """nn.Module that can return feature maps beside its logits; every model here is one."""

    training: bool

    def __call__(self, images: Tensor) -> Tensor: ...

    def forward_with_features(
        self, images: Tensor, layers: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Computes logits and the patch-token maps of some layers, in one forward pass.

        The maps are the layers' outputs before the final norm, without class, register or
        distillation tokens, and with a gradient. A layer is a transformer block. In CaiT it is a
        self-attention block (class-attention blocks don't count); in Swin it is a stage, whose
        (B, H, W, C) output is flattened to tokens. The last layer of a Lift student is its lifted
        map.

        Args:
            images: (B, in_chans, H, W), in the model's dtype (or under autocast).
            layers: indices, negative ones from the end; any order, with repeats, or empty.

        Returns:
            logits (B, classes), and a list with one map (B, N, C) for each of `layers`, in that
            order. A map may be a strided view (without its prefix tokens), and a repeated layer
            returns the same tensor twice.

        Raises:
            ValueError: a layer is out of range.
            TypeError: `layers` is not a sequence of ints.
        """
        ...

    def forward_maps(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Computes only the maps of `forward_with_features`; stops after the deepest layer."""
        ...

    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def to(self, *args: Any, **kwargs: Any) -> Any: ...
    def requires_grad_(self, requires_grad: bool = True) -> Any: ...
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


def resolve_layers(layers: Iterable[int], depth: int) -> tuple[int, ...]:
    """Converts layer indices that may be negative to indices from 0 to depth - 1.

    Args:
        layers: ints; negative ones count from the end.
        depth: number of layers.

    Returns:
        The same number of indices, in the same order.

    Raises:
        ValueError: an index is out of range.
        TypeError: `layers` is not a sequence of ints.

    Example:
        >>> resolve_layers([0, -1], depth=12)
        (0, 11)
    """
    if isinstance(layers, (int, str)):
        raise TypeError(f"layers: expected a sequence of ints, got {layers!r}")
    resolved = []
    for layer in layers:
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
    """`forward_with_features` for models whose layers are `self.blocks` (ViT and CaiT)."""

    def forward_with_features(
        self: Any, images: Tensor, layers: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Computes logits and the raw patch tokens (B, N, C) of `layers`; see `FeatureModel`."""
        wanted = resolve_layers(layers, len(self.blocks))
        if not wanted:  # timm's forward_intermediates takes no empty selection
            return self.forward(images), []
        distinct = sorted(set(wanted))  # timm returns each block once, in the blocks' order
        tokens, maps = self.forward_intermediates(images, indices=distinct, output_fmt="NLC")
        found = dict(zip(distinct, maps, strict=True))
        return self.forward_head(tokens), [found[layer] for layer in wanted]

    def forward_maps(self: Any, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Computes the raw patch tokens only, up to the deepest block; see `FeatureModel`."""
        wanted = resolve_layers(layers, len(self.blocks))
        if not wanted:
            return []
        distinct = sorted(set(wanted))
        maps = self.forward_intermediates(
            *(images, distinct), output_fmt="NLC", stop_early=True, intermediates_only=True
        )
        found = dict(zip(distinct, maps, strict=True))
        return [found[layer] for layer in wanted]


class StageFeatures:
    """`forward_with_features` for Swin, whose layers are the stages in `self.layers`."""

    def forward_with_features(
        self: Any, images: Tensor, layers: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Computes logits and the raw tokens (B, H*W, C) of stages; see `FeatureModel`."""
        wanted = resolve_layers(layers, len(self.layers))
        x, found = self._run_stages(images, wanted, len(self.layers))
        return self.forward_head(self.norm(x)), [found[layer] for layer in wanted]

    def forward_maps(self: Any, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Computes the raw tokens only, up to the deepest stage; see `FeatureModel`."""
        wanted = resolve_layers(layers, len(self.layers))
        if not wanted:
            return []
        found = self._run_stages(images, wanted, max(wanted) + 1)[1]
        return [found[layer] for layer in wanted]

    def _run_stages(
        self: Any, images: Tensor, wanted: Sequence[int], count: int
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Output of the first `count` stages, and the tokens of the wanted ones by index."""
        # Stages return (B, H, W, C), which is the token layout already. timm's
        # forward_intermediates would copy every map to (B, C, H, W), to be copied back here.
        x = self.patch_embed(images)
        found = {}
        for index, stage in enumerate(self.layers[:count]):
            x = stage(x)
            if index in wanted:
                found[index] = x.flatten(1, 2)
        return x, found


class FeatureVisionTransformer(BlockFeatures, VisionTransformer):  # type: ignore[misc]
    """timm's VisionTransformer (ViT, DeiT, and the DINO, CLIP and MAE encoders) with features."""


class FeatureDistilledTransformer(BlockFeatures, VisionTransformerDistilled):  # type: ignore[misc]
    """timm's DeiT with a distillation token, with features.

    In training mode after timm's `set_distilled_training(True)`, the logits are timm's pair
    (class head, distillation head).
    """


class FeatureCait(BlockFeatures, Cait):  # type: ignore[misc]
    """timm's Cait, with the maps of its self-attention blocks as features."""


class FeatureSwinTransformer(StageFeatures, SwinTransformer):  # type: ignore[misc]
    """timm's SwinTransformer, with the maps of its stages as features."""


# Named classes instead of types created at run time, so that models can be pickled and copied.
_WITH_FEATURES: dict[type, type] = {
    VisionTransformer: FeatureVisionTransformer,
    VisionTransformerDistilled: FeatureDistilledTransformer,
    Cait: FeatureCait,
    SwinTransformer: FeatureSwinTransformer,
}


def with_features(model: nn.Module) -> FeatureModel:
    """Adds the method `forward_with_features` to a timm model, in place.

    Parameters, buffers, state-dict keys and `model(images)` don't change.

    Args:
        model: timm's VisionTransformer, VisionTransformerDistilled, Cait or SwinTransformer.

    Returns:
        `model`, now of a subclass of its class.

    Raises:
        ValueError: `model` is of another class.

    Example:
        >>> import timm, torch
        >>> size = dict(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3)
        >>> model = with_features(timm.create_model("vit_tiny_patch16_224", **size))
        >>> logits, maps = model.forward_with_features(torch.zeros(1, 3, 32, 32), [-1])
        >>> tuple(maps[0].shape)
        (1, 4, 48)
    """
    if not isinstance(model, (BlockFeatures, StageFeatures)):
        if type(model) not in _WITH_FEATURES:
            raise ValueError(
                f"model: expected one of timm's "
                f"{', '.join(kind.__name__ for kind in _WITH_FEATURES)}; "
                f"got {type(model).__name__}"
            )
        model.__class__ = _WITH_FEATURES[type(model)]
    return cast(FeatureModel, model)


def num_layers(model: FeatureModel) -> int:
    """Number of layers that `model.forward_with_features` can return."""
    return len(layers_of(model))


def feature_grid(model: FeatureModel, layer: int = -1) -> tuple[int, int] | None:
    """Patch grid (H, W) of a layer's map; tokens are in row-major order.

    Args:
        model: a model with features.
        layer: layer index; only Swin's stages have different grids.

    Returns:
        (H, W), or None if it isn't fixed: the model takes images of any size or drops patches at
        random.

    Raises:
        ValueError: the layer is out of range.
    """
    (index,) = resolve_layers([layer], num_layers(model))
    timm_model = cast(Any, model)
    if getattr(timm_model, "dynamic_img_size", False):
        return None
    if isinstance(model, StageFeatures):
        height, width = timm_model.layers[index].output_resolution
        return height, width
    if not isinstance(getattr(timm_model, "patch_drop", nn.Identity()), nn.Identity):
        return None
    height, width = timm_model.patch_embed.grid_size
    return height, width


def layers_of(model: FeatureModel) -> nn.Sequential:
    """Layers of a model with features, in order."""
    if isinstance(model, StageFeatures):
        return cast(nn.Sequential, cast(Any, model).layers)
    return cast(nn.Sequential, cast(Any, model).blocks)
