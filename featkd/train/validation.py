"""Evaluation of a run: accuracy with labels, else the losses; kNN of the pooled features."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from featkd.data import Batch, Loader
from featkd.evaluation import EvaluationError, evaluate, knn_predict
from featkd.models.features import POOLED, FeatureModel, Layer
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.names import plural
from featkd.train.cached_teacher import CachedTeacher
from featkd.train.parallel import gathered
from featkd.train.recipe import Recipe
from featkd.train.student_forward import create_student_forward
from featkd.train.teacher import Teacher, begin_graph_step

if TYPE_CHECKING:
    from featkd.train.trainer import Trainer

Scores = dict[str, float]
_LOSSES = {
    "loss": "total",
    "logits_loss": "logits",
    "feature_loss": "features",
    "pooled_loss": "pooled",
}


def describe_validation(
    loader: Loader, student: FeatureModel, teacher: Teacher | CachedTeacher | None
) -> str:
    """Describes the scores of a run without labels: a note for the user."""
    scores = []
    if isinstance(teacher, Teacher):
        scores.append("the loss")
    if loader.classes:
        token = getattr(student, "global_pool", "") == "token"
        where = " on the class token" if token else ""
        scores.append(f"kNN top-1{where} over {plural(len(loader.classes), 'class')}")
    missing = []
    if not isinstance(teacher, Teacher):
        missing.append("no loss, because a cache holds the teacher's outputs for training images")
    if not loader.classes:
        missing.append("no kNN, which needs data.val_split with two class folders of two images")
    if not scores:
        return f"validation: none ({'; '.join(missing)}); no best.pt is written"
    text = f"validation on {plural(loader.num_samples, 'image')}: {' and '.join(scores)}"
    return f"{text} ({'; '.join(missing)})" if missing else text


def validate(trainer: Trainer) -> dict[str, Scores]:
    """Scores the student's weights and their average; all processes must call it.

    Returns:
        Weights ("model", "ema") -> scores, with the number of "images". With labels "top1", "top5"
        and "loss", and "knn_top1" if `eval.knn` is set. Without labels the losses if the teacher's
        model is there, and "knn_top1" if the validation images have classes; empty if neither.

    Raises:
        EvaluationError: no image could be read.
    """
    components, context = trainer.components, trainer.context
    models: dict[str, FeatureModel] = {"model": components.student}
    if components.ema is not None:
        models["ema"] = components.ema.module
    modules = cast("list[nn.Module]", [*models.values(), *components.projectors.values()])
    with gathered(modules):
        loader: Iterable[Batch] = components.val_loader
        knn = _Knn(models) if computes_knn(trainer.recipe, components.val_loader) else None
        if knn is not None:
            models, loader = knn.models, knn.watched(loader)
        if trainer.recipe.data.labels == "none":
            return _validate_unlabelled(trainer, models, loader, knn)
        found = evaluate(models, loader, context.device, trainer.autocast)
        scores = {name: {**vars(each)} for name, each in found.items()}
        if knn is not None:
            for name, top1 in knn.top1(len(components.val_loader.classes), context).items():
                scores[name]["knn_top1"] = top1
    return scores


def computes_knn(recipe: Recipe, loader: Loader) -> bool:
    """Checks whether evaluations on a loader compute kNN."""
    return bool(loader.classes) and (recipe.eval.knn or recipe.data.labels == "none")


def _validate_unlabelled(
    trainer: Trainer, models: Mapping[str, FeatureModel], loader: Iterable[Batch], knn: _Knn | None
) -> dict[str, Scores]:
    components, context = trainer.components, trainer.context
    teacher = components.teacher if isinstance(components.teacher, Teacher) else None
    if teacher is None and knn is None:
        return {}
    forwards = [
        create_student_forward(trainer.recipe, model, components.pairs, components.projectors)
        for model in models.values()
    ]
    sums = torch.zeros(len(models), len(_LOSSES), dtype=torch.float64, device=context.device)
    count = torch.zeros((), dtype=torch.float64, device=context.device)
    modes = [model.training for model in models.values()]
    for model in models.values():
        model.eval()
    with torch.no_grad():
        for batch in loader:
            size = len(batch.targets)
            count += size
            if teacher is not None:
                begin_graph_step(context.device)
                outputs = teacher.outputs(batch)
                for number, forward in enumerate(forwards):
                    student = trainer.student_forward(batch.images, outputs, forward)
                    terms = trainer.compute_loss(student, batch.targets, outputs)
                    losses = [getattr(terms, term) for term in _LOSSES.values()]
                    sums[number] += size * torch.stack(losses).double()
            else:
                for model in models.values():
                    with trainer.autocast():
                        model.forward_maps(batch.images, [])
    for model, mode in zip(models.values(), modes, strict=True):
        model.train(mode)
    images_seen = int(context.sum(count).item())
    if images_seen == 0:
        raise EvaluationError("evaluation: none of the images could be read")
    means = (context.sum(sums) / images_seen).tolist()
    top1 = {} if knn is None else knn.top1(len(components.val_loader.classes), context)
    scores: dict[str, Scores] = {}
    for name, losses in zip(models, means, strict=True):
        scores[name] = {"images": images_seen}
        if name in top1:
            scores[name]["knn_top1"] = top1[name]
        if teacher is not None:
            scores[name] |= zip(_LOSSES, losses, strict=True)
    return scores


class _Tapped:
    """A model that keeps the pooled features of its forward passes."""

    def __init__(self, model: FeatureModel) -> None:
        self._model = model
        self.kept: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images, [])[0]

    def forward_with_features(
        self, images: Tensor, layers: Sequence[Layer]
    ) -> tuple[Tensor, list[Tensor]]:
        logits, maps = self._model.forward_with_features(images, [*layers, POOLED])
        self.kept.append(maps.pop()[:, 0].float().cpu())
        return logits, maps

    def forward_maps(self, images: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
        maps = self._model.forward_maps(images, [*layers, POOLED])
        self.kept.append(maps.pop()[:, 0].float().cpu())
        return maps


class _Knn:
    """kNN scores of models, from the forward passes that an evaluation does in any case.

    Args:
        models: models by name.

    Attributes:
        models: the models that the evaluation must call, once for each batch.
    """

    def __init__(self, models: Mapping[str, FeatureModel]) -> None:
        self._tapped = {name: _Tapped(model) for name, model in models.items()}
        self.models = cast("dict[str, FeatureModel]", self._tapped)
        self._images: list[Tensor] = []
        self._labels: list[Tensor] = []

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches, and keeps the images' indices and labels."""
        for batch in batches:
            self._images.append(batch.keys[:, 1])
            self._labels.append(batch.targets.cpu())
            yield batch

    def top1(self, num_classes: int, context: ProcessContext) -> Scores:
        """Leave-one-out accuracies in per cent over the images of all processes; a collective.

        The main process computes them, in the order of the images, which does not depend on the
        number of processes.
        """
        own = None
        if self._images:
            features = [torch.cat(tapped.kept) for tapped in self._tapped.values()]
            own = torch.cat(self._images), torch.cat(self._labels), *features
        parts = [part for part in context.gather(own) if part is not None]

        def compute() -> Scores:
            order = torch.cat([part[0] for part in parts]).argsort()
            labels, *banks = (
                torch.cat([part[i] for part in parts])[order].to(context.device)
                for i in range(1, 2 + len(self._tapped))
            )
            scores = dict.fromkeys(self._tapped, math.nan)
            for name, bank in zip(self._tapped, banks, strict=True):
                if len(bank) > 1 and torch.isfinite(bank).all():
                    predicted = knn_predict(
                        bank, bank, labels, num_classes=num_classes, leave_one_out=True
                    )
                    scores[name] = 100 * (predicted == labels).double().mean().item()
            return scores

        return context.on_main(compute)
