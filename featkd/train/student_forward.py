"""The student's forward pass as one module: the module that DDP and torch.compile wrap."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from featkd.functional import Metric
from featkd.models import Lift
from featkd.models.features import FeatureModel, feature_grid, num_layers
from featkd.train.layer_pairs import LayerPairs
from featkd.train.precision import autocast
from featkd.train.recipe import Recipe


class StudentOutputs(NamedTuple):
    """Student outputs; `maps` is empty if `feature_loss`, a scalar, is set.

    `logits` may be None if the loss does not use them.
    """

    logits: Tensor | None
    maps: list[Tensor]
    feature_loss: Tensor | None


class FeatureForward(nn.Module):
    """Logits and feature maps of a student as a module's forward, for DDP and torch.compile.

    Args:
        model: the student.
        layers: layers whose feature maps are returned.
        logits: whether to compute logits; without them, nothing runs after the deepest layer.
    """

    def __init__(self, model: FeatureModel, layers: tuple[int, ...], logits: bool = True) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.logits = logits

    def forward(self, images: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        if self.logits:
            return self.model.forward_with_features(images, self.layers)
        return None, self.model.forward_maps(images, self.layers)


class LossForward(nn.Module):
    """`forward_with_loss` of a Lift student as a module's forward, for DDP and torch.compile."""

    def __init__(self, model: Lift, metric: Metric) -> None:
        super().__init__()
        self.model = model
        self.metric: Metric = metric
        self.grid = feature_grid(model)

    def forward(self, images: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.forward_with_loss(images, teacher_map, metric=self.metric, grid=self.grid)


def create_student_forward(recipe: Recipe, student: FeatureModel, pairs: LayerPairs) -> nn.Module:
    """Creates the module that the training loop calls.

    A Lift student whose last map alone is compared computes the feature loss itself, without
    storing the map.
    """
    metric, last = recipe.loss.feature, num_layers(student) - 1
    if metric is not None and isinstance(student, Lift) and pairs.student == (last,):
        return LossForward(student, metric)
    return FeatureForward(student, pairs.student, recipe.uses_logits)


def freeze_unreached(
    forward: nn.Module, student: FeatureModel, recipe: Recipe, device: torch.device
) -> list[str]:
    """Freezes the parameters that the loss does not reach: DDP would wait for their gradients.

    Without labels and logits these are the layers after the deepest one of loss.pairs.

    Args:
        forward: the student's forward module.
        student: the student, on the device, before it is wrapped or sharded.
        recipe: the run.
        device: this process's device.

    Returns:
        The names of the frozen parameters.
    """
    if not isinstance(forward, FeatureForward) or forward.logits:
        return []
    size, training = recipe.data.img_size, student.training
    student.eval()  # batch norms keep their statistics
    with autocast(recipe.amp, device):
        _, maps = forward(torch.zeros(1, 3, size, size, device=device))
    student.train(training)
    named = dict(cast(nn.Module, student).named_parameters())
    total = torch.stack([x.float().sum() for x in maps]).sum()
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    frozen = [name for name, x in zip(named, gradients, strict=True) if x is None]
    for name in frozen:
        named[name].requires_grad_(False)
    return frozen
