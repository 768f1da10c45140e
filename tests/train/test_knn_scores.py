"""kNN scores of a run's evaluations, from the forward passes that these do in any case."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featkd.train import load_trained
from featkd.train.logs import RunLog, read_csv
from featkd.train.recipe import EvalConfig, LossConfig, PooledConfig, Recipe
from featkd.train.trainer import Trainer
from tests.train.runs import CPU, changed, knn_accuracy, run


def test_labelled_run_has_knn_beside_its_other_scores(recipe: Recipe) -> None:
    plain, scored = (
        run(replace(recipe, out=f"{recipe.out}-{knn}", eval=EvalConfig(knn))).scores["model"]
        for knn in (False, True)
    )
    assert scored.keys() - plain.keys() == {"knn_top1"}
    for name, value in plain.items():
        assert scored[name] == pytest.approx(value, rel=1e-5)
    out = Path(f"{recipe.out}-True")
    *_, row, _ = read_csv(out / "eval.csv")
    assert (row["weights"], float(row["knn_top1"])) == ("model", scored["knn_top1"])
    # independently, from the stored weights
    student = load_trained(out / "last.pt", "model")
    batches = list(Trainer(replace(recipe, out=f"{out}-other"), CPU).components.val_loader)
    images, labels = (torch.cat([b[i] for b in batches]) for i in (0, 1))
    with torch.no_grad():
        (features,) = student.forward_maps(images, ["pooled"])
    assert scored["knn_top1"] == pytest.approx(knn_accuracy(features[:, 0], labels))


@pytest.mark.parametrize("arch", ["plain", "lift", "widelast"])
@pytest.mark.parametrize("loss", ["labelled", "fused", "logits", "projector"])
def test_each_image_passes_through_the_student_once(recipe: Recipe, arch: Any, loss: str) -> None:
    """For each kind of forward pass; both kinds of weights are scored."""
    config = {
        "labelled": LossConfig(feature=None, alpha=0.5),
        "fused": LossConfig(feature="mse"),
        "logits": LossConfig(feature="mse", alpha=0.5, pairs=[(0, 0)]),
        "projector": LossConfig(feature="mse", projector="linear", pooled=PooledConfig()),
    }[loss]
    labels: Any = "folders" if loss == "labelled" else "none"
    trainer = Trainer(
        changed(
            recipe,
            student=dict(arch=arch),
            data=dict(labels=labels),
            loss=config,
            eval=EvalConfig(True),
        ),
        CPU,
    )
    seen: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda _, inputs: seen.update({name: len(inputs[0])})

    models = {"model": trainer.components.student, "ema": trainer.components.ema.module}
    for name, model in models.items():
        model.patch_embed.register_forward_pre_hook(count(name))  # type: ignore[attr-defined]
    with_knn = evaluate(trainer)
    assert seen == {"model": 12, "ema": 12}
    if loss == "labelled":
        trainer.recipe.eval.knn = False
    else:
        trainer.components.val_loader.classes = []
    without = evaluate(trainer)
    for weights, scores in with_knn.items():
        assert 0 <= scores.pop("knn_top1") <= 100
        assert scores == pytest.approx(without[weights], rel=1e-5)


def evaluate(trainer: Trainer) -> dict[str, dict[str, float]]:
    trainer._evaluate(RunLog(None, 0, 0))
    return {weights: {**scores} for weights, scores in trainer.scores.items()}
