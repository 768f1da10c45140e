"""Mean losses and speed of a logged interval, and checks that values are finite."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featkd.losses import DistillationTerms
from featkd.runtime.distributed import ProcessContext
from featkd.train.parallel import full


class TrainingDiverged(RuntimeError):
    """A loss or a weight is not finite."""


class Means(NamedTuple):
    """Mean losses over the micro-batches of all processes."""

    loss: float
    logits_loss: float
    feature_loss: float
    pooled_loss: float


class Meter:
    """Sums losses since the last `clear`; `add` does not wait for the device.

    Args:
        context: this process; all processes must call `means` and `state_dict` together.
    """

    def __init__(self, context: ProcessContext) -> None:
        self._context = context
        self._sums = torch.zeros(len(Means._fields), device=context.device)
        self._count = 0

    def add(self, terms: DistillationTerms) -> None:
        """Adds the losses of one micro-batch."""
        self._sums += torch.stack((terms.total.detach(), *terms[1:]))
        self._count += 1

    def means(self, when: str) -> Means:
        """Mean losses since the last `clear`; waits for the device.

        Args:
            when: end of the error message.

        Raises:
            TrainingDiverged: the loss is not finite.
        """
        return self._reduced(when)[1]

    def state_dict(self, when: str) -> dict[str, Any]:
        """Sums over all processes, for a checkpoint; waits and raises as `means` does."""
        return {"meter": self._reduced(when)[0], "metered": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the sums of a checkpoint, saved by any number of processes."""
        if self._context.is_main:  # the sum over all processes; the others start from zero
            # Scaled because the mean divides by the present number of processes.
            saved = state["meter"] * (self._context.world_size / state["world_size"])
            self._sums[: len(saved)] = saved.to(self._sums.device)  # 3 in earlier versions
        self._count = state["metered"]

    def clear(self) -> None:
        """Starts a new interval."""
        self._sums.zero_()
        self._count = 0

    def _reduced(self, when: str) -> tuple[Tensor, Means]:
        """Sums and means over all processes; see `means`."""
        sums = self._context.sum(self._sums)
        batches = max(1, self._count * self._context.world_size)
        means = Means(*(x / batches for x in sums.tolist()))
        if not math.isfinite(means.loss):
            raise TrainingDiverged(
                f"the loss is {means.loss} {when} (logits {means.logits_loss}, features "
                f"{means.feature_loss}, pooled {means.pooled_loss})"
            )
        return sums, means


class Stopwatch:
    """Measures the wall time of updates, without pauses for saving."""

    def __init__(self) -> None:
        self.updates = 0  # since the last lap
        self._total = 0.0, 0  # seconds and updates of all laps

    def start(self) -> None:
        """Begins to measure, after a time that does not count."""
        self._since, self.updates = time.perf_counter(), 0

    def lap(self) -> float:
        """Returns the updates per second since the last lap, and begins another."""
        now = time.perf_counter()
        seconds, updates = now - self._since, self.updates
        self._total = self._total[0] + seconds, self._total[1] + updates
        self._since, self.updates = now, 0
        return updates / seconds

    @property
    def updates_per_s(self) -> float:
        """Updates per second of all laps; NaN without one."""
        seconds, updates = self._total
        return updates / seconds if seconds else math.nan

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside the context."""
        stopped = time.perf_counter()
        yield
        self._since += time.perf_counter() - stopped


def check_weights(parameters: Iterable[nn.Parameter], when: str) -> None:
    """Checks that all weights are finite; waits for the device. A collective for sharded ones.

    A gradient that overflows under a finite loss is noticed here one update before the loss.

    Args:
        parameters: the weights.
        when: end of the error message.

    Raises:
        TrainingDiverged: a weight is not finite.
    """
    norm = full(nn.utils.get_total_norm(p.detach() for p in parameters))
    if not norm.isfinite():
        raise TrainingDiverged(f"the norm of the weights is {norm.item()} {when}")
