"""Helpers for tests of the training loop: run in this process, read its metrics."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from featkd.cache import CacheConfig
from featkd.data import AugmentConfig
from featkd.runtime.distributed import ProcessContext
from featkd.train.build_cache import build_cache
from featkd.train.checkpoint import load
from featkd.train.logs import RunLog, read_csv
from featkd.train.recipe import LossConfig, Recipe, RecipeError, StudentConfig, to_dict
from featkd.train.trainer import Outcome, Trainer

CPU = ProcessContext(0, 1, torch.device("cpu"))
ONE_EPOCH = {"epochs": 1, "warmup_epochs": 0}
NOTHING_DRAWN = AugmentConfig(
    rand_augment=None, scale=(1, 1), ratio=(1, 1), hflip=0, random_erasing=0, repeats=1
)


def changed(config: Any, **fields: Any) -> Any:
    """Copies a recipe or a section of it with other fields; a dict changes fields of a section."""
    for name, value in fields.items():
        section = getattr(config, name)
        if isinstance(value, dict) and is_dataclass(section):
            fields[name] = changed(section, **value)
    return replace(config, **fields)


def run(recipe: Recipe, resume: str = "auto") -> Outcome:
    return Trainer(recipe, CPU).run(resume, quiet=True)


def before_update(trainer: Trainer, done: int, action: Callable[[], object]) -> None:
    """Makes a trainer call `action` when `done` updates are done and the next one begins."""
    step = trainer.step

    def acting(batches: Any) -> Any:
        if trainer.update == done:
            action()
        return step(batches)

    trainer.step = acting  # type: ignore[method-assign]


def interrupt(trainer: Trainer, updates: int) -> None:
    """Runs some updates, and ends by an error in the next one."""

    def stop() -> None:
        raise RuntimeError("cut")

    before_update(trainer, updates, stop)
    with pytest.raises(RuntimeError, match=r"^cut$"):  # it waits for a running save
        trainer.run(quiet=True)


def full_disk(*_: Any, **options: Any) -> None:
    """Stands in for a function that writes."""
    raise OSError(28, "No space left on device")


def train_teacher(recipe: Recipe, **fields: Any) -> str:
    """Trains the model of a recipe's teacher for one epoch; returns its checkpoint."""
    student = StudentConfig(base=recipe.teacher.name, options=dict(recipe.teacher.options))
    teacher = {"out": recipe.out + "-teacher", "teacher": None, "loss": LossConfig()}
    run(changed(recipe, **teacher, student=student, optim=ONE_EPOCH, **fields))
    return f"{recipe.out}-teacher/last.pt"


def copy_images(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe on a copy of its images."""
    shutil.copytree(recipe.data.path, folder)
    return changed(recipe, data=dict(path=str(folder)))


EXACT = {"views": 2, "shard_rows": 16, "logits_top": "all", "features": "full", "store": "fp32"}


def with_cache(recipe: Recipe, folder: Path, **options: Any) -> Recipe:
    """Builds a cache, an exact one unless options differ; returns the recipe on it."""
    build_cache(recipe, CacheConfig(**(EXACT | options)), CPU, folder, quiet=True)
    return replace(recipe, cache=str(folder), out=f"{recipe.out}-cached")


def save(trainer: Trainer, **options: Any) -> None:
    """Saves the trainer's state, and waits until it is written."""
    trainer.folder.mkdir(exist_ok=True)
    trainer._save(RunLog(None, 0, 0), **options)
    trainer.finish_saving()


def trained(recipe: Recipe, updates: int = 1) -> Trainer:
    """Trains some updates of the first epoch, and saves."""
    trainer = Trainer(recipe, CPU)
    trainer.components.student.train()
    for batch in islice(trainer.components.train_loader, updates):
        trainer.step([batch])
    save(trainer)
    return trainer


def column(recipe: Recipe, name: str) -> list[str]:
    return [row[name] for row in read_csv(Path(recipe.out) / "metrics.csv")]


def check_losses_close(one: Path, other: Path, *more: str) -> None:
    """Checks that two runs logged the same updates, with losses that differ by rounding."""
    for x, y in zip(*(read_csv(out / "metrics.csv") for out in (one, other)), strict=True):
        for name in ("loss", "feature_loss", *more):
            assert float(x[name]) == pytest.approx(float(y[name]), rel=1e-5), name


def refuse(
    recipe: Recipe, message: str, error: type[Exception] = RecipeError, **fields: Any
) -> None:
    """Checks that a trainer refuses a recipe with other fields."""
    with pytest.raises(error, match=message):
        Trainer(changed(recipe, **fields), CPU)


def same_weights(one: Path, other: Path) -> bool:
    a, b = load(one)["model"], load(other)["model"]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def knn_accuracy(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Leave-one-out accuracy of 11 neighbours in per cent, by scikit-learn."""
    knn = KNeighborsClassifier(
        11, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07), algorithm="brute"
    )
    bank, truth = features.double().numpy(), labels.numpy()
    return 100 * float((cross_val_predict(knn, bank, truth, cv=LeaveOneOut()) == truth).mean())


def empty_state(**changes: Any) -> dict[str, Any]:
    """Content of a checkpoint with an empty model, in the order in which a run saves it."""
    names = ("epoch", "batch", "batch_size", "world_size", "seed", "repeats", "num_images")
    state: dict[str, Any] = {
        "model": {},
        "model_ema": None,
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {},
        "loader": dict.fromkeys(names, 1),
        "classes": ["a", "b"],
        "num_classes": 2,
        "meter": torch.zeros(3),
        "metered": 0,
        "update": 0,
        "epoch": 0,
        "best": {},
        "scores": {},
        "bad_files": {},
        "recipe": to_dict(Recipe()),
        "versions": {},
        "world_size": 1,
        "job": None,
    }
    return state | changes
