"""Accuracy and loss of models on the images of a loader."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.data import Batch
from featkd.models.features import FeatureModel, evaluating


class EvaluationError(RuntimeError):
    """No image to evaluate on could be read."""


@dataclass
class Evaluation:
    """Accuracies in per cent, mean cross-entropy, and the number of images."""

    top1: float
    top5: float
    loss: float
    images: int


def evaluate(
    models: Mapping[str, FeatureModel],
    loader: Iterable[Batch],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[str, Evaluation]:
    """Evaluates models on every image of `loader` in one pass, over all processes of the run.

    Args:
        models: models by name, (B, 3, H, W) -> (B, K) logits; their modes are restored.
        loader: evaluation loader; each process reads its own share.
        device: device of the models and of the loader's batches.
        autocast: returns the precision context.

    Returns:
        The evaluations by name.

    Raises:
        EvaluationError: no image could be read.
    """

    def score(batch: Batch) -> list[Tensor]:
        rows = []
        for model in models.values():
            with autocast():
                logits = model(batch.images)
            rows.append(_sums(logits.float(), batch.targets))
        return rows

    means, images = mean_scores(models.values(), 3, loader, device, score)
    return {
        name: Evaluation(top1, top5, loss, images)
        for name, (top1, top5, loss) in zip(models, means, strict=True)
    }


def _sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums of a batch: 100 per image whose class is first, or one of the first five; the loss."""
    found = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return torch.stack((100 * found[:, 0].sum(), 100 * found.sum(), loss.double()))


def mean_scores(
    models: Collection[FeatureModel],
    columns: int,
    loader: Iterable[Batch],
    device: torch.device,
    score: Callable[[Batch], list[Tensor]],
) -> tuple[list[list[float]], int]:
    """Averages scores of models over all images of `loader`, in one pass.

    Args:
        models: set to evaluation mode for the pass.
        columns: K, number of scores of a model.
        loader: evaluation loader; each process reads its own share.
        device: device of the scores.
        score: returns the sums over a batch, (K,) float64 per model.

    Returns:
        The K mean scores of each model, and the number of images, of all processes.

    Raises:
        EvaluationError: no image could be read.
    """
    totals = torch.zeros(1 + len(models) * columns, dtype=torch.float64, device=device)
    with evaluating(*models):
        for batch in loader:
            totals[0] += len(batch.targets)
            totals[1:] += torch.cat(score(batch))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
    images = int(totals[0].item())
    if images == 0:
        raise EvaluationError("evaluation: none of the images could be read")
    means: list[list[float]] = (totals[1:] / images).view(len(models), columns).tolist()
    return means, images
