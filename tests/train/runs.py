"""Helpers for tests of the training loop: run in this process, read its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from featkd.data import AugmentConfig
from featkd.runtime.distributed import ProcessContext
from featkd.train.checkpoint import load
from featkd.train.logs import RunLog, read_csv
from featkd.train.outcome import Outcome
from featkd.train.recipe import Recipe, to_dict
from featkd.train.trainer import Trainer

CPU = ProcessContext(0, 1, torch.device("cpu"))
NOTHING_DRAWN = AugmentConfig(
    rand_augment=None, scale=(1, 1), ratio=(1, 1), hflip=0, random_erasing=0, repeats=1
)


def run(recipe: Recipe, resume: str = "auto") -> Outcome:
    return Trainer(recipe, CPU).run(resume, quiet=True)


def save(trainer: Trainer, **options: Any) -> None:
    """Saves the trainer's state, and waits until it is written."""
    trainer.folder.mkdir(exist_ok=True)
    trainer._save(RunLog(None, 0, 0), **options)
    trainer.finish_saving()


def column(recipe: Recipe, name: str) -> list[str]:
    return [row[name] for row in read_csv(Path(recipe.out) / "metrics.csv")]


def same_weights(one: Path, other: Path) -> bool:
    a, b = load(one)["model"], load(other)["model"]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
