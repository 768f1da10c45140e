"""Evaluation of a run: accuracy with labels, else the losses and kNN of the features."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from featkd.cache import TeacherOutputs
from featkd.data import Batch, Loader
from featkd.evaluation import EvaluationError, evaluate, knn_predict
from featkd.losses import DistillationTerms
from featkd.models.features import POOLED, FeatureModel
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.names import plural
from featkd.runtime.scores import rank
from featkd.train.cached_teacher import CachedTeacher
from featkd.train.logs import RunLog
from featkd.train.parallel import gathered
from featkd.train.recipe import Recipe
from featkd.train.student_forward import create_student_forward
from featkd.train.teacher import Teacher, begin_graph_step

if TYPE_CHECKING:
    from featkd.train.components import RunComponents

Scores = dict[str, float]
Terms = Callable[[nn.Module, Batch, TeacherOutputs], DistillationTerms]
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


def validate(
    recipe: Recipe,
    components: RunComponents,
    context: ProcessContext,
    autocast: Callable[[], AbstractContextManager[object]],
    terms: Terms,
) -> dict[str, Scores]:
    """Scores the student's weights and their average; all processes must call it.

    Args:
        recipe: the run.
        components: its components.
        context: this process.
        autocast: returns the precision context.
        terms: loss terms of a student's forward module on a batch, for a run without labels.

    Returns:
        Weights ("model", "ema") -> scores, with the number of "images". With labels "top1", "top5"
        and "loss". Without labels the losses if the teacher's model is there, and "knn_top1" if
        the validation images have classes; empty if neither.

    Raises:
        EvaluationError: no image could be read.
    """
    models: dict[str, FeatureModel] = {"model": components.student}
    if components.ema is not None:
        models["ema"] = components.ema.module
    projectors = cast("list[FeatureModel]", [*components.projectors.values()])
    with gathered([*models.values(), *projectors]):
        if recipe.data.labels == "none":
            return _validate_unlabelled(recipe, components, context, models, autocast, terms)
        found = evaluate(models, components.val_loader, context.device, autocast)
    return {name: vars(scores) for name, scores in found.items()}


def log_scores(
    found: dict[str, Scores], update: int, epoch: int, best: dict[str, Any], log: RunLog
) -> dict[str, Any] | None:
    """Logs scores; returns the best of them if it is better than `best`, else None.

    Args:
        found: result of `validate`.
        update, epoch: position of the run.
        best: best scores so far, empty if there are none.
        log: receives one row for each kind of weights.
    """
    better = None
    for weights, scores in found.items():
        row: dict[str, Any] = {"update": update, "epoch": epoch, "weights": weights, **scores}
        log.evaluation(row)
        known = better or best
        if not known or rank(row) > rank(known):
            better = {name: value for name, value in row.items() if name != "images"}
    return better


def _validate_unlabelled(
    recipe: Recipe,
    components: RunComponents,
    context: ProcessContext,
    models: dict[str, FeatureModel],
    autocast: Callable[[], AbstractContextManager[object]],
    terms: Terms,
) -> dict[str, Scores]:
    loader, teacher = components.val_loader, components.teacher
    runs_teacher, has_classes = isinstance(teacher, Teacher), bool(loader.classes)
    if not (runs_teacher or has_classes):
        return {}
    forwards = {
        name: create_student_forward(recipe, model, components.pairs, components.projectors)
        for name, model in models.items()
    }
    sums = torch.zeros(len(models), len(_LOSSES), dtype=torch.float64, device=context.device)
    count = torch.zeros((), dtype=torch.float64, device=context.device)
    pooled: dict[str, list[Tensor]] = {name: [] for name in models}
    images, targets = [], []
    modes = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    with torch.no_grad():
        for batch in loader:
            size = len(batch.targets)
            count += size
            if runs_teacher:
                begin_graph_step(context.device)
                outputs = cast(Teacher, teacher).outputs(batch)
                for number, forward in enumerate(forwards.values()):
                    found = terms(forward, batch, outputs)
                    losses = [getattr(found, term) for term in _LOSSES.values()]
                    sums[number] += size * torch.stack(losses).double()
            if has_classes:
                images.append(batch.keys[:, 1])
                targets.append(batch.targets.cpu())
                for name, model in models.items():
                    with autocast():
                        (feature,) = model.forward_maps(batch.images, [POOLED])
                    pooled[name].append(feature[:, 0].float().cpu())
    for name, model in models.items():
        model.train(modes[name])
    images_seen = int(context.sum(count).item())
    if images_seen == 0:
        raise EvaluationError("evaluation: none of the images could be read")
    means = (context.sum(sums) / images_seen).tolist()
    scores: dict[str, Scores] = {}
    for (name, features), losses in zip(pooled.items(), means, strict=True):
        scores[name] = {"images": images_seen}
        if has_classes:
            scores[name]["knn_top1"] = _knn_top1(images, targets, features, loader, context)
        if runs_teacher:
            scores[name] |= zip(_LOSSES, losses, strict=True)
    return scores


def _knn_top1(
    images: list[Tensor],
    targets: list[Tensor],
    features: list[Tensor],
    loader: Loader,
    context: ProcessContext,
) -> float:
    """Leave-one-out kNN accuracy in per cent over the images of all processes.

    The main process computes it, in the order of the images, which does not depend on the number of
    processes.
    """
    own = tuple(torch.cat(parts) for parts in (images, targets, features)) if images else None
    parts = [part for part in context.gather(own) if part is not None]

    def compute() -> float:
        order = torch.cat([part[0] for part in parts]).argsort()
        labels, bank = (
            torch.cat([part[i] for part in parts])[order].to(context.device) for i in (1, 2)
        )
        if len(bank) < 2 or not torch.isfinite(bank).all():
            return float("nan")
        classes = len(loader.classes)
        predicted = knn_predict(bank, bank, labels, num_classes=classes, leave_one_out=True)
        return 100 * (predicted == labels).double().mean().item()

    return context.on_main(compute)
