"""Accuracy and loss of models on the images of a loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from featkd.data import Loader
from featkd.models.features import FeatureModel


class EvaluationError(RuntimeError):
    """No image to evaluate on could be read."""


@dataclass
class Evaluation:
    """Accuracies in per cent, mean cross-entropy, and the number of images."""

    top1: float
    top5: float
    loss: float
    images: int


def _accuracy(num_classes: int, device: torch.device) -> MetricCollection:
    # Validation of the arguments would wait for the device in each batch.
    options: dict[str, Any] = {"average": "micro", "validate_args": False}
    return MetricCollection(
        {
            "top1": MulticlassAccuracy(num_classes, **options),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), **options),
        }
    ).to(device)


def evaluate(
    models: Mapping[str, FeatureModel],
    loader: Loader,
    num_classes: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[str, Evaluation]:
    """Evaluates models on every image of `loader` in one pass, over all processes of the run.

    Args:
        models: models by name, (B, 3, H, W) -> (B, K) logits; their modes are restored.
        loader: evaluation loader; each process reads its own share.
        num_classes: K, at least 2.
        device: device of the models and of the loader's batches.
        autocast: returns the precision context.

    Returns:
        The evaluations by name.

    Raises:
        EvaluationError: no image could be read.
    """
    accuracies = {name: _accuracy(num_classes, device) for name in models}
    # torchmetrics' mean would wait for the device in each batch and skip NaN.
    losses = {name: torch.zeros((), dtype=torch.float64, device=device) for name in models}
    count = torch.zeros((), dtype=torch.float64, device=device)
    modes = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    with torch.no_grad():
        for batch in loader:
            for name, model in models.items():
                with autocast():
                    logits = model(batch.images)
                logits = logits.float()
                accuracies[name].update(logits, batch.targets)
                losses[name] += F.cross_entropy(logits, batch.targets, reduction="sum")
            count += len(batch.targets)
    for name, model in models.items():
        model.train(modes[name])
    sums = torch.stack((count, *losses.values()))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    images_seen, *summed = sums.tolist()
    if images_seen == 0:
        raise EvaluationError("evaluation: none of the images could be read")
    found = {}
    for name, loss in zip(models, summed, strict=True):
        scores = accuracies[name].compute()
        found[name] = Evaluation(
            top1=100 * scores["top1"].item(),
            top5=100 * scores["top5"].item(),
            loss=loss / images_seen,
            images=int(images_seen),
        )
    return found
