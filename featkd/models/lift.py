"""The Lift student: the projector to the teacher's width stays in the model [EM26]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from timm.layers import get_device_dtype
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featkd.functional import Metric, lift_head, projected_feature_kd
from featkd.models.base import OwnHead, StudentEva, StudentVisionTransformer, check_base
from featkd.models.features import POOLED, Layer, resolve_layers
from featkd.models.fusion import is_fusible
from featkd.ops.support import is_being_exported

PUBLISHED_EPS = 1e-5  # torch's default, which the published Lift has; timm's norms have 1e-6


class LiftStudent(OwnHead):
    """Methods of `Lift` and `LiftEva`: a timm ViT that classifies from its lifted last tokens."""

    own_modules = ("projection", "projection_norm", "head")
    """Modules that don't come from the base."""

    projection: nn.Linear
    projection_norm: nn.LayerNorm

    def lift(self, tokens: Tensor) -> Tensor:
        """z = LayerNorm(f W^T) of patch tokens f: (B, N, width) -> (B, N, teacher_dim)."""
        lifted: Tensor = self.projection_norm(self.projection(tokens))
        return lifted

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        if is_being_exported():  # as plain layers in the model's own dtype
            return cast(Tensor, super().forward(x, *args, **kwargs))
        tokens = super().forward_features(x, *args, **kwargs)
        return self._finish(tokens[:, self.num_prefix_tokens :])[0]

    def forward_with_loss(
        self,
        images: Tensor,
        teacher: Tensor,
        *,
        metric: Metric = "mse",
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes logits and the feature loss without storing the lifted map z.

        Equals `forward_with_features(images, [-1])` followed by
        `featkd.functional.projected_feature_kd` on its map, by one `featkd.functional.lift_head`.

        Args:
            images: (B, C, H, W).
            teacher: (B, N, teacher_dim), without requires_grad.
            metric, grid: as in `projected_feature_kd`.

        Returns:
            logits (B, classes), and a scalar.

        Raises:
            ValueError: the teacher's shape, its device or the grid doesn't match.
        """
        tokens = super().forward_features(images)[:, self.num_prefix_tokens :]
        logits, loss = self._finish(tokens, teacher, metric, grid)
        return logits, cast(Tensor, loss)

    def _finish(
        self,
        tokens: Tensor,
        teacher: Tensor | None = None,
        metric: Metric = "mse",
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes logits from the last block's patch tokens (B, N, width), and the loss."""
        linear, norm = self.projection, self.projection_norm
        loss = None
        if is_fusible(linear, norm):
            pooled, loss = lift_head(
                tokens,
                linear.weight,
                norm.weight,
                norm.bias,
                teacher,
                eps=norm.eps,
                metric=metric,
                grid=grid,
            )
            return cast(Tensor, self.head(self.head_drop(pooled))), loss
        lifted = self.lift(tokens)
        if teacher is not None:
            loss = projected_feature_kd(lifted, teacher, metric=metric, grid=grid)
        return self.forward_head(lifted), loss

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The lifted map z (B, N, teacher_dim) of images (B, C, H, W)."""
        tokens = super().forward_features(x, *args, **kwargs)
        return self.lift(tokens[:, self.num_prefix_tokens :])

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's method; the blocks' maps are raw, the final features are the lifted map."""
        found = super().forward_intermediates(x, *args, **kwargs)
        if isinstance(found, tuple):
            tokens, maps = found
            return self.lift(tokens[:, self.num_prefix_tokens :]), maps
        if isinstance(found, dict) and "image_features" in found:
            tokens = found["image_features"]
            found["image_features"] = self.lift(tokens[:, self.num_prefix_tokens :])
        return found

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) of the lifted map (B, N, teacher_dim): its mean, then the head."""
        pooled: Tensor = self.head_drop(x.mean(dim=1))
        return pooled if pre_logits else cast(Tensor, self.head(pooled))

    def forward_with_features(
        self, images: Tensor, layers: Sequence[Layer]
    ) -> tuple[Tensor, list[Tensor]]:
        """Computes logits and maps; the last layer's is z (B, N, teacher_dim)."""
        last = len(self.blocks) - 1
        wanted = resolve_layers(layers, last + 1)
        earlier = sorted({*wanted} - {last, POOLED})
        maps: list[Tensor] = []
        if earlier:
            tokens, maps = super().forward_intermediates(images, indices=earlier, output_fmt="NLC")
        else:
            tokens = super().forward_features(images)
        patches = tokens[:, self.num_prefix_tokens :]
        found: dict[Layer, Tensor] = dict(zip(earlier, maps, strict=True))
        if last not in wanted and POOLED not in wanted:
            return self._finish(patches)[0], [found[layer] for layer in wanted]
        found[last] = self.lift(patches)
        if POOLED in wanted:
            found[POOLED] = self.forward_head(found[last], pre_logits=True).unsqueeze(1)
        return self.forward_head(found[last]), [found[layer] for layer in wanted]

    def forward_maps(self, images: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
        """Computes maps only; the last layer's is z (B, N, teacher_dim)."""
        last = len(self.blocks) - 1
        if {last, POOLED} & {*resolve_layers(layers, last + 1)}:
            return self.forward_with_features(images, layers)[1]
        return cast(list[Tensor], super().forward_maps(images, layers))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a newly initialised one; the pooling remains the mean over tokens.

        Raises:
            ValueError: `global_pool` is neither None nor "avg".
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool: Lift allows None or 'avg', got {global_pool!r}")
        super().reset_classifier(num_classes)


class Lift(LiftStudent, StudentVisionTransformer):
    """A ViT that classifies from its last patch tokens, lifted to the teacher's width.

    With f the patch tokens (no class token) of the last block before the final norm, and W of
    shape (teacher_dim, width) without a bias [EM26, Lift]:

        z      = LayerNorm(f W^T)              eps 1e-5; matched to the teacher's map
        logits = head(mean of z over the patch tokens)

    Logits and the feature loss (`forward_with_loss`) are computed without storing z, by
    `featkd.functional.lift_head`, unless one of the two layers has hooks or was replaced. z is
    stored only if the last layer's map is requested.

    The base's final norm, attention pooling and head would never be used, so they are removed.
    Created by `Lift.adopt` or `featkd.models.create_student(arch="lift")`.
    """

    @staticmethod
    def adopt(model: nn.Module, teacher_dim: int) -> LiftStudent:
        """Turns a timm VisionTransformer or Eva into a Lift student, in place.

        Args:
            model: its blocks keep their weights.
            teacher_dim: width of the teacher's map.

        Returns:
            `model`, now a Lift or a LiftEva.

        Raises:
            ValueError: `model` is of another class, or `teacher_dim` is below 1.
        """
        kinds: dict[type, type] = {VisionTransformer: Lift, Eva: LiftEva}
        check_base(model, "lift")
        if teacher_dim < 1:
            raise ValueError(f"teacher_dim: expected an int >= 1, got {teacher_dim}")
        model.__class__ = kinds[type(model)]
        lift = cast(Any, model)
        factory = get_device_dtype(lift)
        lift.norm, lift.fc_norm, lift.attn_pool = nn.Identity(), nn.Identity(), None
        lift.global_pool = "avg"
        lift.projection = nn.Linear(lift.embed_dim, teacher_dim, bias=False, **factory)
        nn.init.trunc_normal_(lift.projection.weight, std=0.02)  # as timm's other linear layers
        lift.projection_norm = nn.LayerNorm(teacher_dim, eps=PUBLISHED_EPS, **factory)
        lift._set_num_features(teacher_dim)
        return cast(LiftStudent, lift)


class LiftEva(LiftStudent, StudentEva):
    """`Lift` on timm's Eva: DINOv3, EVA-02, Perception Encoder."""
