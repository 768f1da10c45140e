"""Pooled features and best classes of a model on the images of a loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from featkd.data import Loader
from featkd.evaluation.topk import EvaluationError
from featkd.models.features import POOLED, FeatureModel, evaluating
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.names import printable

_ROWS = 4096  # of a message between processes


@dataclass
class ImageOutputs:
    """Outputs of a model, one row per image, in the order of the images, on the CPU.

    Attributes:
        images: (N,) int64 indices of the images in the data set.
        labels: (N,) int64 class indices.
        features: (N, C) float32 pooled features.
        ranking: (N, k) int64 indices of the k largest logits, the largest first; k is 0 for a model
            without a classifier.
        probabilities: (N, k) float32 softmax of these logits over all classes.
    """

    images: Tensor
    labels: Tensor
    features: Tensor
    ranking: Tensor
    probabilities: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the tensors in the order of the fields."""
        return tuple(vars(self).values())


def extract_features(
    model: FeatureModel,
    loader: Loader,
    context: ProcessContext,
    *,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    top: int = 5,
    progress: Callable[[int], object] = lambda _: None,
) -> ImageOutputs | None:
    """Computes the pooled features of all images of a loader; a collective.

    Args:
        model: the model, on the device of the loader's batches; its mode is restored.
        loader: evaluation loader; each process reads its own share.
        context: this process.
        autocast: returns the precision context.
        top: number of classes to rank.
        progress: called with the number of images of each batch.

    Returns:
        The outputs on process 0; None on the others. Unreadable images are left out if the loader
        skips them.

    Raises:
        EvaluationError: no image could be read, or a feature is not finite.
        NotPooledError: the model has no pooled feature.

    Notes:
        The features of all images are allocated once, on process 0, and those of its share on each
        other process.
    """
    has_head = getattr(model, "num_classes", 0) > 0
    found: ImageOutputs | None = None  # of this process
    filled = 0
    with evaluating(model):
        for batch in loader:
            with autocast():
                logits, (pooled,) = model.forward_with_features(batch.images, [POOLED])
            logits = logits.float()
            ranking = logits.topk(min(top, logits.shape[1]) if has_head else 0).indices
            probabilities = logits.softmax(1).gather(1, ranking)
            rows = (batch.keys[:, 1], batch.targets, pooled[:, 0], ranking, probabilities)
            if found is None:
                found = _empty(len(loader.sampler), rows)
            end = filled + len(batch.targets)
            for whole, part in zip(found.tensors(), rows, strict=True):
                whole[filled:end] = part.to(whole.device)
            filled = end
            progress(len(batch.targets))
    found = found and ImageOutputs(*(x[:filled] for x in found.tensors()))
    if context.world_size > 1:
        found = _gathered(found, loader, context)

    def check() -> None:
        if found is None or not len(found):
            raise EvaluationError("evaluation: none of the images could be read")
        chunks = zip(*(torch.split(x, _ROWS) for x in (found.images, found.features)), strict=True)
        for images, features in chunks:
            if len(bad := images[~features.isfinite().all(1)]):
                name = printable(loader.dataset.name(int(bad[0])))
                raise EvaluationError(f"evaluation: NaN or Inf in the features of {name}")

    context.on_main(check)
    return found


def _empty(count: int, rows: Sequence[Tensor]) -> ImageOutputs:
    """Outputs of `count` images, of the widths of `rows`."""
    dtypes = (torch.int64, torch.int64, torch.float32, torch.int64, torch.float32)
    pairs = zip(rows, dtypes, strict=True)
    return ImageOutputs(*(torch.empty(count, *x.shape[1:], dtype=dtype) for x, dtype in pairs))


def _gathered(
    own: ImageOutputs | None, loader: Loader, context: ProcessContext
) -> ImageOutputs | None:
    """Outputs of all processes' images, on process 0; None on the others."""
    count = loader.sampler.num_images
    order = torch.from_numpy(loader.sampler.order(0))  # ascending
    filled = torch.zeros(count, dtype=torch.bool)
    found: ImageOutputs | None = None
    for first in range(0, -(-count // context.world_size), _ROWS):
        rows: tuple[Tensor, ...] | None = None
        if own is not None and first < len(own):
            # Copies: a pickled slice would bring the whole tensor.
            rows = tuple(x[first : first + _ROWS].clone() for x in own.tensors())
        for part in context.gather(rows):
            if part is None:
                continue
            if found is None:
                found = _empty(count, part)
            place = torch.searchsorted(order, part[0])
            filled[place] = True
            for whole, values in zip(found.tensors(), part, strict=True):
                whole[place] = values
    if found is not None and not filled.all():  # unreadable images
        found = ImageOutputs(*(x[filled] for x in found.tensors()))
    return found
