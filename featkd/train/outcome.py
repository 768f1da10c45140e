"""Result of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Outcome:
    """Result of a run.

    Attributes:
        updates: optimizer updates done.
        scores: last evaluation: weights ("model", "ema") -> {"top1", "top5", "loss"}; see
            `featkd.train.validation.validate` for a run without labels.
        best: best evaluation, with its update, epoch and weights.
        images_per_s: training throughput of this process's session; NaN if nothing was trained.
        bad_files: unreadable images that were left out: path -> cause.
        interrupted_by: the signal that ended the run early, if any.
    """

    updates: int
    scores: dict[str, dict[str, float]]
    best: dict[str, Any]
    images_per_s: float
    bad_files: dict[str, str]
    interrupted_by: int | None = None
