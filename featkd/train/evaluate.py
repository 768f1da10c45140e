"""Accuracy of models on a loader's images."""

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
    """There is nothing to score models on."""


@dataclass
class Evaluation:
    """Scores in per cent, mean cross-entropy, and the number of images they are over."""

    top1: float
    top5: float
    loss: float
    images: int


def _accuracy(num_classes: int, device: torch.device) -> MetricCollection:
    # Validating is a torch.unique of each batch, which reads the device (not in 1.9, for floats).
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
    """Score models on every image of `loader`, read once, over all processes of the run.

    Args:
        models: by name, (B, 3, H, W) -> (B, K) logits; their modes are restored afterwards.
        loader: evaluation loader; under torchrun each process has its own share.
        num_classes: K, at least 2.
        device: where the models are.
        autocast: makes the precision context.

    Returns:
        The scores, by name.

    Raises:
        EvaluationError: no image could be read.
    """
    accuracies = {name: _accuracy(num_classes, device) for name in models}
    # Not torchmetrics' mean, which reads every batch's losses and leaves out what is no number.
    losses = {name: torch.zeros((), dtype=torch.float64, device=device) for name in models}
    count = torch.zeros((), dtype=torch.float64, device=device)
    modes = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    with torch.no_grad():
        for batch in loader:
            images = batch.images.to(device, non_blocking=True)
            targets = batch.targets.to(device, non_blocking=True)
            for name, model in models.items():
                with autocast():
                    logits = model(images)
                logits = logits.float()
                accuracies[name].update(logits, targets)
                losses[name] += F.cross_entropy(logits, targets, reduction="sum")
            count += len(targets)
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
