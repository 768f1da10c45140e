"""The student's forward pass as one module: the module that DDP and torch.compile wrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from featkd.cache import LayerShape
from featkd.functional import Metric
from featkd.losses import FeatureLoss, PooledFeatureKD, ProjectedFeatureKD
from featkd.models.features import POOLED, FeatureModel, Layer, feature_grid, num_layers
from featkd.models.lift import LiftStudent
from featkd.runtime.seeding import derive_seed
from featkd.train.layer_pairs import LayerPairs, is_projected, name_pair
from featkd.train.precision import autocast
from featkd.train.recipe import Recipe


class StudentOutputs(NamedTuple):
    """Student outputs; `maps` is empty if `feature_loss` or `pooled_loss`, scalars, are set.

    `logits` may be None if the loss does not use them.
    """

    logits: Tensor | None
    maps: list[Tensor]
    feature_loss: Tensor | None = None
    pooled_loss: Tensor | None = None


_Outputs = tuple[Tensor | None, list[Tensor], Tensor | None, Tensor | None]
"""Fields of `StudentOutputs`."""


class StudentForward(nn.Module):
    """A student and the losses that have trained projectors, as one module.

    Args:
        model: the student.
        layers: its layers that are compared, as in `LayerPairs.student`.
        logits: whether to compute logits; without them, nothing runs after the deepest layer.
        feature_loss: loss of the feature maps if it has projectors; None if it is computed later.
        pooled_loss: loss of the pooled features, whose map is the last; None for none.
    """

    def __init__(
        self,
        model: FeatureModel,
        layers: tuple[Layer, ...],
        logits: bool,
        feature_loss: FeatureLoss | None = None,
        pooled_loss: PooledFeatureKD | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.logits = logits
        self.feature_loss = feature_loss
        self.pooled_loss = pooled_loss

    def forward(self, images: Tensor, teacher_maps: list[Tensor]) -> _Outputs:
        """Returns logits, feature maps and losses; the teacher's maps are used by losses only."""
        if self.logits:
            logits, maps = self.model.forward_with_features(images, self.layers)
        else:
            logits, maps = None, self.model.forward_maps(images, self.layers)
        if self.feature_loss is None and self.pooled_loss is None:
            return logits, maps, None, None
        features = pooled = None
        if self.pooled_loss is not None:
            pooled = self.pooled_loss(maps[-1].squeeze(1), teacher_maps[-1].squeeze(1))
            maps, teacher_maps = maps[:-1], teacher_maps[:-1]
        if self.feature_loss is not None:
            features = self.feature_loss(maps, teacher_maps)
        return logits, [], features, pooled


class LiftForward(nn.Module):
    """`forward_with_loss` of a Lift student as a module's forward."""

    def __init__(self, model: LiftStudent, metric: Metric) -> None:
        super().__init__()
        self.model = model
        self.metric: Metric = metric
        self.grid = feature_grid(model)

    def forward(self, images: Tensor, teacher_maps: list[Tensor]) -> _Outputs:
        """Returns logits and feature loss, as `StudentForward` does."""
        (teacher_map,) = teacher_maps
        logits, loss = self.model.forward_with_loss(
            images, teacher_map, metric=self.metric, grid=self.grid
        )
        return logits, [], loss, None


def create_projectors(
    recipe: Recipe,
    student: FeatureModel,
    student_maps: Sequence[LayerShape],
    teacher_maps: Sequence[LayerShape],
    device: torch.device,
    notes: list[str],
) -> nn.ModuleDict:
    """Creates the losses with trained projectors, initialised from the recipe's seed.

    Args:
        recipe: the run.
        student: the student.
        student_maps, teacher_maps: shapes of the compared maps, as `LayerPairs` has the layers.
        device: device of the parameters.
        notes: notes for the user are appended here.

    Returns:
        number of the layer pair -> `ProjectedFeatureKD`, and "pooled" -> `PooledFeatureKD`.
    """
    config = recipe.loss
    # On the CPU, for the same weights on every device.
    torch.manual_seed(derive_seed(recipe.seed, 1))
    projectors = nn.ModuleDict()
    for number, (s, t) in enumerate(zip(student_maps, teacher_maps, strict=True)):
        widths = s.channels, t.channels
        if s.layer == POOLED:
            assert config.pooled is not None
            kind, key = "linear", POOLED
            projectors[key] = PooledFeatureKD(*widths, metric=config.pooled.metric)
        elif isinstance(s.layer, int) and is_projected(recipe, s, t):
            assert config.feature is not None
            kind, key = config.projector, str(number)
            projectors[key] = ProjectedFeatureKD(
                *widths,
                bias=kind == "linear",  # LayerNorm has a bias of its own
                norm=kind == "linear_norm",
                metric=config.feature,
                grid=feature_grid(student, s.layer),
            )
        else:
            continue
        count = sum(p.numel() for p in projectors[key].parameters())
        notes.append(
            f"{name_pair(s, t)}: projector ({kind}) from {s.channels} to {t.channels} channels, "
            f"{count:,} parameters"
        )
    if config.projector != "none" and not {*projectors} - {POOLED}:
        notes.append(f"loss.projector: {config.projector} is not used: the widths of pairs agree")
    return projectors.to(device)


def create_student_forward(
    recipe: Recipe, student: FeatureModel, pairs: LayerPairs, projectors: nn.ModuleDict
) -> nn.Module:
    """Creates the module that the training loop calls.

    It computes the feature loss itself if that has trained projectors, and if the student is a Lift
    whose last map alone is compared: then the map is not stored.
    """
    metric, last = recipe.loss.feature, num_layers(student) - 1
    losses: dict[str, Any] = dict(projectors.items())
    if not losses and metric and isinstance(student, LiftStudent) and pairs.student == (last,):
        return LiftForward(student, metric)
    pooled_loss, feature_loss = losses.pop(POOLED, None), None
    if projectors and metric is not None:
        own = {int(number): loss for number, loss in losses.items()}
        feature_loss = FeatureLoss(metric, feature_grids(student, pairs), own)
    return StudentForward(student, pairs.student, recipe.uses_logits, feature_loss, pooled_loss)


def feature_grids(student: FeatureModel, pairs: LayerPairs) -> list[tuple[int, int] | None]:
    """Patch grid of the student's map in each layer pair."""
    return [feature_grid(student, layer) for layer in pairs.student if isinstance(layer, int)]


def freeze_unreached(
    recipe: Recipe, student: FeatureModel, pairs: LayerPairs, device: torch.device
) -> list[str]:
    """Freezes the parameters that the loss does not reach: DDP would wait for their gradients.

    If the loss does not use logits, these are the layers after the deepest one that is compared.

    Args:
        recipe: the run.
        student: the student, on the device, before it is wrapped or sharded.
        pairs: the layers that are compared.
        device: this process's device.

    Returns:
        The names of the frozen parameters.
    """
    if recipe.uses_logits:
        return []
    size, training = recipe.data.img_size, student.training
    student.eval()  # batch norms keep their statistics
    with autocast(recipe.amp, device):
        maps = student.forward_maps(torch.zeros(1, 3, size, size, device=device), pairs.student)
    student.train(training)
    named = dict(cast(nn.Module, student).named_parameters())
    total = torch.stack([x.float().sum() for x in maps]).sum()
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    frozen = [name for name, x in zip(named, gradients, strict=True) if x is None]
    for name in frozen:
        named[name].requires_grad_(False)
    return frozen
