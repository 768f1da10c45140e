"""Helpers for tests of the training loop: run in this process, read its metrics."""

from __future__ import annotations

from pathlib import Path

import torch

from featkd.runtime.distributed import ProcessContext
from featkd.train.checkpoint import load
from featkd.train.logs import read_csv
from featkd.train.recipe import Recipe
from featkd.train.trainer import Outcome, Trainer

CPU = ProcessContext(0, 1, torch.device("cpu"))


def run(recipe: Recipe, resume: str = "auto") -> Outcome:
    return Trainer(recipe, CPU).run(resume, quiet=True)


def column(recipe: Recipe, name: str) -> list[str]:
    return [row[name] for row in read_csv(Path(recipe.out) / "metrics.csv")]


def same_weights(one: Path, other: Path) -> bool:
    a, b = load(one)["model"], load(other)["model"]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
