"""The student's forward pass as one module: the module that DDP and torch.compile wrap."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from featkd.functional import Metric
from featkd.models import Lift
from featkd.models.features import FeatureModel, feature_grid, num_layers
from featkd.train.layer_pairs import LayerPairs
from featkd.train.recipe import Recipe


class StudentOutputs(NamedTuple):
    """Student outputs; `maps` is empty if `feature_loss`, a scalar, is set."""

    logits: Tensor
    maps: list[Tensor]
    feature_loss: Tensor | None


class FeatureForward(nn.Module):
    """`forward_with_features` of a student as a module's forward, for DDP and torch.compile."""

    def __init__(self, model: FeatureModel, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.model.forward_with_features(images, self.layers)


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
    return FeatureForward(student, pairs.student)
