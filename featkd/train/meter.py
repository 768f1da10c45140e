"""The losses of a logged interval, summed on the device; and what is not finite any more."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featkd.losses import DistillationTerms
from featkd.runtime.distributed import ProcessContext


class TrainingDiverged(RuntimeError):
    """The loss, or a weight, is no longer finite."""


class Means(NamedTuple):
    """Over the micro-batches of all processes: the objective, its logits part, its features."""

    loss: float
    logits: float
    features: float


class Meter:
    """Sums of the losses since the last `clear`; `add` waits for no device.

    Args:
        context: this process; all must call `means` and `state_dict` at the same point.
    """

    def __init__(self, context: ProcessContext) -> None:
        self._context = context
        self._sums = torch.zeros(3, device=context.device)
        self._count = 0

    def add(self, terms: DistillationTerms) -> None:
        """One micro-batch."""
        self._sums += torch.stack((terms.total.detach(), terms.logits, terms.features))
        self._count += 1

    def means(self, when: str) -> Means:
        """What was added; waits for the device.

        Raises:
            TrainingDiverged: the loss is not finite; `when` ends the message.
        """
        return self._means(self._context.sum(self._sums), when)

    def state_dict(self, when: str) -> dict[str, Any]:
        """The sums over all processes, for a checkpoint; waits for the device.

        Raises:
            TrainingDiverged: as of `means`.
        """
        sums = self._context.sum(self._sums)
        self._means(sums, when)
        return {"meter": sums, "metered": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint, saved by however many processes."""
        if self._context.is_main:  # the sum over all processes; the others start from zero
            # scaled: the interval's mean divides it by the micro-batches of as many as there are
            self._sums.copy_(state["meter"] * (self._context.world_size / state["world_size"]))
        self._count = state["metered"]

    def clear(self) -> None:
        """Begin a new interval."""
        self._sums.zero_()
        self._count = 0

    def _means(self, sums: Tensor, when: str) -> Means:
        batches = max(1, self._count * self._context.world_size)
        means = Means(*(x / batches for x in sums.tolist()))
        if not math.isfinite(means.loss):
            raise TrainingDiverged(
                f"the loss is {means.loss} {when} (logits {means.logits}, features "
                f"{means.features})"
            )
        return means


def check_weights(parameters: Iterable[nn.Parameter], when: str) -> None:
    """Look at all weights at once; waits for the device.

    A gradient that overflows under a finite loss shows here first, an update before the loss.

    Raises:
        TrainingDiverged: one is not finite; `when` ends the message.
    """
    norm = nn.utils.get_total_norm(p.detach() for p in parameters)
    if not norm.isfinite():
        raise TrainingDiverged(f"the norm of the weights is {norm.item()} {when}")
