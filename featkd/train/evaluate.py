"""Accuracy of a model on a loader's images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from featkd.data import Loader
from featkd.models.features import FeatureModel


@dataclass
class Evaluation:
    """Scores in per cent, mean cross-entropy, and the number of images they are over."""

    top1: float
    top5: float
    loss: float
    images: int


def evaluate(
    model: FeatureModel,
    loader: Loader,
    num_classes: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Evaluation:
    """Score `model` on every image of `loader` once, over all processes of the run.

    Args:
        model: (B, 3, H, W) -> (B, K) logits; its mode is restored afterwards.
        loader: evaluation loader; under torchrun each process has its own share.
        num_classes: K.
        device: where the model is.
        autocast: makes the precision context.

    Raises:
        ValueError: no image could be read.
    """
    accuracy = MetricCollection(
        {
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
        }
    ).to(device)
    loss = MeanMetric().to(device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in loader:
            images = batch.images.to(device, non_blocking=True)
            targets = batch.targets.to(device, non_blocking=True)
            with autocast():
                logits = model(images)
            logits = logits.float()
            accuracy.update(logits, targets)
            loss.update(F.cross_entropy(logits, targets, reduction="none"))
            count += len(targets)
    model.train(training)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
    if count.item() == 0:
        raise ValueError("evaluation: none of the images could be read")
    scores = accuracy.compute()
    return Evaluation(
        top1=100 * scores["top1"].item(),
        top5=100 * scores["top5"].item(),
        loss=loss.compute().item(),
        images=int(count.item()),
    )
