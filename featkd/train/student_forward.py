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


class FeatureForward(nn.Module):
    """Logits and feature maps of a student as a module's forward; the loss is computed after it.

    Args:
        model: the student.
        layers: its layers that are compared, as in `LayerPairs.student`.
        logits: whether to compute logits; without them, nothing runs after the deepest layer.
    """

    def __init__(self, model: FeatureModel, layers: tuple[Layer, ...], logits: bool = True) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.logits = logits

    def forward(self, images: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        return _run(self.model, images, self.layers, self.logits)


def _run(
    model: FeatureModel, images: Tensor, layers: tuple[Layer, ...], logits: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Computes the maps of `layers`, and logits if they are asked for."""
    if logits:
        return model.forward_with_features(images, layers)
    return None, model.forward_maps(images, layers)


class LiftForward(nn.Module):
    """`forward_with_loss` of a Lift student as a module's forward."""

    def __init__(self, model: LiftStudent, metric: Metric) -> None:
        super().__init__()
        self.model = model
        self.metric: Metric = metric
        self.grid = feature_grid(model)

    def forward(
        self, images: Tensor, teacher_maps: list[Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns logits, feature loss, and no pooled loss."""
        (teacher_map,) = teacher_maps
        logits, loss = self.model.forward_with_loss(
            images, teacher_map, metric=self.metric, grid=self.grid
        )
        return logits, loss, None


class ProjectedForward(nn.Module):
    """A student and the losses that have trained projectors, as one module.

    Args:
        model: the student.
        layers: its layers that are compared, as in `LayerPairs.student`.
        feature_loss: loss of the feature maps; None for none.
        pooled_loss: loss of the pooled features, whose map is the last; None for none.
        logits: whether to compute logits; without them, nothing runs after the deepest layer.
    """

    def __init__(
        self,
        model: FeatureModel,
        layers: tuple[Layer, ...],
        feature_loss: FeatureLoss | None,
        pooled_loss: PooledFeatureKD | None,
        logits: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.logits = logits
        self.feature_loss = feature_loss
        self.pooled_loss = pooled_loss

    def forward(
        self, images: Tensor, teacher_maps: list[Tensor]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns logits, feature loss and pooled loss."""
        logits, maps = _run(self.model, images, self.layers, self.logits)
        features = pooled = None
        if self.pooled_loss is not None:
            pooled = self.pooled_loss(maps[-1].squeeze(1), teacher_maps[-1].squeeze(1))
            maps, teacher_maps = maps[:-1], teacher_maps[:-1]
        if self.feature_loss is not None:
            features = self.feature_loss(maps, teacher_maps)
        return logits, features, pooled


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
    if projectors:
        losses: dict[str, Any] = dict(projectors.items())
        pooled_loss = losses.pop(POOLED, None)
        own = {int(number): loss for number, loss in losses.items()}
        grids = feature_grids(student, pairs)
        feature_loss = None if metric is None else FeatureLoss(metric, grids, own)
        return ProjectedForward(
            *(student, pairs.student, feature_loss, pooled_loss), recipe.uses_logits
        )
    if metric is not None and isinstance(student, LiftStudent) and pairs.student == (last,):
        return LiftForward(student, metric)
    return FeatureForward(student, pairs.student, recipe.uses_logits)


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
