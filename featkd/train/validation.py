"""Evaluation of a run: accuracy with labels, else the losses; kNN of the pooled features."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from featkd.data import Batch
from featkd.evaluation import evaluate, knn_predict
from featkd.evaluation.topk import mean_scores
from featkd.models.features import POOLED, FeatureModel, Layer
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.names import plural
from featkd.train.components import RunComponents
from featkd.train.meter import Means
from featkd.train.parallel import gathered
from featkd.train.student_forward import create_student_forward
from featkd.train.teacher import begin_graph_step

Scores = dict[str, float]


def describe_validation(components: RunComponents) -> str:
    """Describes the scores of a run without labels: a note for the user."""
    loader, scores, missing = components.val_loader, [], []
    if components.teacher_model is not None:
        scores.append("the loss")
    else:
        missing.append("no loss, because a cache holds the teacher's outputs for training images")
    if loader.classes:
        token = getattr(components.student, "global_pool", "") == "token"
        where = " on the class token" if token else ""
        scores.append(f"kNN top-1{where} over {plural(len(loader.classes), 'class')}")
    else:
        missing.append("no kNN, which needs data.val_split with two class folders of two images")
    if not scores:
        return f"validation: none ({'; '.join(missing)}); no best.pt is written"
    text = f"validation on {plural(loader.num_samples, 'image')}: {' and '.join(scores)}"
    return f"{text} ({'; '.join(missing)})" if missing else text


def validate(components: RunComponents) -> dict[str, Scores]:
    """Scores the student's weights and their average; all processes must call it.

    Returns:
        Weights ("model", "ema") -> scores, with the number of "images". With labels "top1", "top5"
        and "loss", and "knn_top1" if `eval.knn` is set. Without labels the losses if the teacher's
        model is there, and "knn_top1" if the validation images have classes; empty if neither.

    Raises:
        EvaluationError: no image could be read.
    """
    labelled = components.recipe.data.labels == "folders"
    has_losses = components.teacher_model is not None
    if not (labelled or has_losses or components.computes_knn):
        return {}
    context = components.context
    models: dict[str, FeatureModel] = {"model": components.student}
    if components.ema is not None:
        models["ema"] = components.ema.module
    modules = cast("list[nn.Module]", [*models.values(), *components.projectors.values()])
    loader: Iterable[Batch] = components.val_loader
    knn = _Knn(models) if components.computes_knn else None
    if knn is not None:
        models, loader = knn.models, knn.watched(loader)
    losses: dict[str, Scores] = {}
    with gathered(modules):
        if labelled:
            found = evaluate(models, loader, context.device, components.autocast)
            scores = {name: {**vars(each)} for name, each in found.items()}
        else:
            losses, images = _mean_losses(components, models, loader)
            scores = {name: {"images": images} for name in models}
        if knn is not None:
            for name, top1 in knn.top1(len(components.val_loader.classes), context).items():
                scores[name]["knn_top1"] = top1
    return {name: each | losses.get(name, {}) for name, each in scores.items()}


def _mean_losses(
    components: RunComponents, models: Mapping[str, FeatureModel], loader: Iterable[Batch]
) -> tuple[dict[str, Scores], int]:
    """Mean losses by model, none without the teacher's model, and the number of images."""
    device = components.context.device
    names = () if components.teacher_model is None else Means._fields
    forwards = [
        create_student_forward(components.recipe, model, components.pairs, components.projectors)
        for model in models.values()
    ]

    def score(batch: Batch) -> list[Tensor]:
        if not names:  # kNN takes the features of these forward passes
            with components.autocast():
                for model in models.values():
                    model.forward_maps(batch.images, [])
            return [torch.empty(0, device=device)] * len(models)
        begin_graph_step(device)
        outputs = components.teacher_outputs(batch)
        rows = []
        for forward in forwards:
            student = components.student_outputs(batch.images, outputs, forward)
            terms = components.compute_loss(student, batch.targets, outputs)
            rows.append(len(batch.targets) * torch.stack(terms).double())
        return rows

    means, images = mean_scores(models.values(), len(names), loader, device, score)
    rows = (dict(zip(names, row, strict=True)) for row in means)
    return dict(zip(models, rows, strict=True)), images


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
        return logits, self._keep(maps)

    def forward_maps(self, images: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
        return self._keep(self._model.forward_maps(images, [*layers, POOLED]))

    def _keep(self, maps: list[Tensor]) -> list[Tensor]:
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
