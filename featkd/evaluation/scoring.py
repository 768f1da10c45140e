"""Scores of one model on an image set: top-1 and top-5, kNN and a linear probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from featkd.data import DataConfig
from featkd.data.factory import build_evaluation_loader
from featkd.evaluation.classes import match_classes
from featkd.evaluation.features import ImageOutputs, extract_features
from featkd.evaluation.knn import knn_predict
from featkd.evaluation.probe import linear_probe
from featkd.models.features import FeatureModel
from featkd.runtime.distributed import ProcessContext

Score = Literal["head", "knn", "probe"]
SCORES: tuple[Score, ...] = get_args(Score)


@dataclass
class ModelScores:
    """Scores of a model, accuracies in per cent.

    Attributes:
        scores: "head" (top1, top5), "knn" (top1, k, temperature), "probe" (top1, penalty). Each has
            a "confusion" matrix as well: one row per class folder, one column per predicted class.
        classes: names of the class folders, the rows of the confusion matrices and the columns of
            those of kNN and the probe.
        outputs: names of the classifier's outputs, the columns of its confusion matrix.
        images: number of validation images.
        bank_images: number of training images, for kNN and the probe.
        notes: notes for the user, on scores that were left out for example.
        left_out: reason for each unreadable image, by path.
    """

    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    images: int = 0
    bank_images: int = 0
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def score_model(
    model: FeatureModel,
    data: DataConfig,
    context: ProcessContext,
    *,
    scores: Sequence[Score] = SCORES,
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 64,
    limit: int | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    quiet: bool = True,
) -> ModelScores:
    """Scores a model; all processes of a run must call it.

    The classifier is scored on the validation images if each class folder is one of its classes.
    kNN and the linear probe predict the validation images from the pooled features of the training
    images, all preprocessed as in evaluation.

    Args:
        model: the model, on the device of `context`.
        data: the image set, with labels, and the model's preprocessing. Without "knn" and "probe"
            the training split is not read, and the validation folders are the classes.
        context: this process.
        scores: the scores to compute.
        k: neighbours of kNN.
        temperature: temperature of kNN's votes.
        batch_size: images per forward pass and process.
        limit: maximum number of images of each split, spread evenly.
        autocast: returns the precision context.
        quiet: show no progress.

    Returns:
        The scores, the same on all processes.

    Raises:
        ValueError: an argument is out of range, or no score can be computed.
        FileNotFoundError: a folder is missing or holds no images.
        EvaluationError: no image could be read, or a feature is not finite.
    """
    found = ModelScores()
    needs_bank = "knn" in scores or "probe" in scores
    split: Literal["train", "val"] = "val"
    if not needs_bank and data.val_split is not None:
        # The training split defines the classes, so that of validation takes its place.
        data, split = replace(data, train_split=data.val_split), "train"

    def outputs(split: Literal["train", "val"], task: str) -> ImageOutputs | None:
        loader = build_evaluation_loader(
            data,
            split=split,
            batch_size=batch_size,
            rank=context.rank,
            world_size=context.world_size,
            device=context.device,
            limit=limit,
        )
        found.classes = loader.classes
        total = len(loader.sampler)
        hidden = True if quiet or not context.is_main else None  # None: on terminals only
        with closing(loader), tqdm(total=total, desc=task, unit=" images", disable=hidden) as bar:
            features = extract_features(
                model, loader, context, autocast=autocast, progress=bar.update
            )
        found.left_out |= context.merge_dicts(loader.bad_images)
        return features

    queries = outputs(split, "validation")
    index = None
    if "head" in scores:
        index, found.outputs, note = match_classes(model, found.classes)
        found.notes += [note] if note else []
        if index is None and not needs_bank:
            raise ValueError(f"scores: {note}; no other score is asked for")
    bank = outputs("train", "training") if needs_bank else None

    def add(score: Score, predicted: Tensor, columns: int, **facts: object) -> None:
        assert queries is not None
        shape = len(found.classes), columns
        counts = confusion_matrix(queries.labels, predicted, shape)
        found.scores[score] = {**facts, "confusion": counts.tolist()}

    def compute() -> ModelScores:
        assert queries is not None
        found.images, count = len(queries), len(found.classes)
        if index is not None:
            hits = queries.ranking == torch.tensor(index)[queries.labels, None]
            top1, top5 = _per_cent(hits[:, 0]), _per_cent(hits.any(1))
            add("head", queries.ranking[:, 0], len(found.outputs), top1=top1, top5=top5)
        if bank is None:
            return found
        found.bank_images = len(bank)
        tensors = bank.features, bank.labels, queries.features
        x, labels, new = (tensor.to(context.device) for tensor in tensors)
        if "knn" in scores:
            options: dict[str, Any] = {"k": k, "temperature": temperature}
            predicted = knn_predict(new, x, labels, num_classes=count, **options).cpu()
            add("knn", predicted, count, top1=_per_cent(predicted == queries.labels), **options)
        if "probe" in scores:
            probe = linear_probe(x, labels, num_classes=count)
            predicted, facts = probe.predict(new).cpu(), {"penalty": probe.penalty}
            add("probe", predicted, count, top1=_per_cent(predicted == queries.labels), **facts)
        return found

    return context.on_main(compute)


def _per_cent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def confusion_matrix(labels: Tensor, predicted: Tensor, shape: tuple[int, int]) -> Tensor:
    """Counts the images of each class (row) by predicted class (column).

    Examples:
        >>> confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]), (2, 3))
        tensor([[1, 0, 1],
                [0, 1, 0]])
    """
    counts = torch.bincount(labels * shape[1] + predicted, minlength=shape[0] * shape[1])
    return counts.view(shape)
