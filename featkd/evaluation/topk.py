"""Accuracy and loss of models on the images of a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.data import Batch
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


def _sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over a batch: images whose class is first, or one of the first five, and the loss."""
    found = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return torch.stack((found[:, 0].sum(), found.sum(), loss.double()))


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
    totals = {name: torch.zeros(3, dtype=torch.float64, device=device) for name in models}
    count = torch.zeros((), dtype=torch.float64, device=device)
    in_training = [model for model in models.values() if model.training]
    for model in models.values():
        model.eval()
    with torch.no_grad():
        for batch in loader:
            for name, model in models.items():
                with autocast():
                    logits = model(batch.images)
                totals[name] += _sums(logits.float(), batch.targets)
            count += len(batch.targets)
    for model in in_training:
        model.train()
    sums = torch.cat((count[None], *totals.values()))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    if (images := sums[0].item()) == 0:
        raise EvaluationError("evaluation: none of the images could be read")
    found = {}
    for name, (top1, top5, loss) in zip(models, sums[1:].view(-1, 3).tolist(), strict=True):
        shares = 100 * top1 / images, 100 * top5 / images
        found[name] = Evaluation(*shares, loss=loss / images, images=int(images))
    return found
