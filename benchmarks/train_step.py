"""Images per second of loading and updates together, and the bottleneck."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice

import numpy as np

from featkd.data import Batch, Loader, build_loader
from featkd.runtime.distributed import ProcessContext
from featkd.train.recipe import Recipe
from featkd.train.trainer import Trainer

from . import step
from .throughput import Rate
from .timing import rotated


@dataclass(frozen=True)
class Together:
    """Rates of training with its loader, by variant, and of the loader alone."""

    loader: Rate
    train: dict[str, Rate]
    waiting: dict[str, float]
    """Share of the training time that the loop waited for batches."""


def measure(
    recipe: Recipe,
    context: ProcessContext,
    variants: Mapping[str, step.Way],
    *,
    updates: int,
    rounds: int,
) -> Together:
    """Times some updates of each variant in turn, and an epoch of the loader alone.

    Two updates before the rounds warm up and compile. The loader holds as many batches ready at
    the beginning of a round as at its end.

    Args:
        recipe: run with the folders and the loader to use.
        variants: values of `step.ways` by name.
        updates: updates per round.
        rounds: timed rounds.
    """
    loader = build_loader(
        recipe.data, split="train", batch_size=recipe.batch_size, device=context.device
    )
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    waited: dict[str, list[float]] = {name: [] for name in variants}
    loading: list[float] = []
    with closing(loader), step.built(recipe, context, variants) as trainers:
        runs = {name: _Run(trainers[name], way) for name, way in variants.items()}
        images = _epoch(loader, 0)
        for run in runs.values():
            run.go(2)
        for number in range(rounds):
            start = time.perf_counter()
            _epoch(loader, number + 1)
            loading.append(time.perf_counter() - start)
            for name in rotated(list(variants), number):
                spent, waiting = runs[name].go(updates)
                seconds[name].append(spent)
                waited[name].append(waiting / spent)
    images_trained = updates * recipe.batch_size
    return Together(
        Rate("loader", recipe.data.backend, images, loading),
        {name: Rate("train", name, images_trained, seconds[name]) for name in variants},
        {name: float(np.median(shares)) for name, shares in waited.items()},
    )


class _Run:
    """A training run that continues at the next batch in each round."""

    def __init__(self, trainer: Trainer, way: step.Way) -> None:
        self._trainer = trainer
        self._way = way
        self._batches = _endless(trainer)
        trainer.components.student.train()

    def go(self, updates: int) -> tuple[float, float]:
        """Runs some updates; returns their seconds and the seconds of waiting for batches.

        On a GPU it waits for the last update.
        """
        clock = time.perf_counter
        waiting = 0.0
        start = asked = clock()
        with self._way.in_use():
            for batch in islice(self._batches, updates):
                waiting += clock() - asked
                terms = self._trainer.step([batch])
                asked = clock()
        terms.total.item()
        return clock() - start, waiting


def _endless(trainer: Trainer) -> Iterator[Batch]:
    for epoch in count():
        yield from trainer.batches(epoch)


def _epoch(loader: Loader, number: int) -> int:
    loader.set_epoch(number)
    return sum(len(batch.targets) for batch in loader)


def bottleneck(waiting: float, shares: Mapping[str, float]) -> str:
    """Returns the bottleneck of a run: the loader, or a part of the update.

    Args:
        waiting: share of the run's time that the loop waited for batches.
        shares: share of each part in the update.
    """
    parts = {name: share * (1 - waiting) for name, share in shares.items()}
    parts["loader"] = waiting
    return max(parts, key=lambda name: parts[name])
