"""Comparison of the scores of evaluations, as checkpoints store them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_ACCURACIES = {"top1": "top-1", "knn_top1": "kNN top-1"}  # the first one present decides


def rank(scores: Mapping[str, Any]) -> float:
    """Value by which evaluations are compared, higher is better; -inf without scores.

    The top-1 accuracy, without one that of kNN, without both the negative loss.
    """
    accuracies = [float(scores[name]) for name in _ACCURACIES if name in scores]
    value = accuracies[0] if accuracies else -float(scores.get("loss", math.inf))
    return -math.inf if math.isnan(value) else value


def describe(scores: Mapping[str, Any]) -> str:
    """Describes the score that decides, for example "top-1 71.20 %"; "none" without one."""
    for name, text in _ACCURACIES.items():
        if name in scores:
            return f"{text} {scores[name]:.2f} %"
    return f"loss {scores['loss']:.4f}" if "loss" in scores else "none"
