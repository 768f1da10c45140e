"""One cumulative energy curve per image: where it reaches the thresholds, and the mean curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featkd.diagnostics.accumulator import Accumulator
from featkd.diagnostics.exact_sum import ExactSum


@dataclass(frozen=True)
class Summary:
    """Summary of one integer per image over the images, as in the paper's tables.

    Attributes:
        percentile99: numpy's linear 99th percentile, rounded: the published summary.
        mean, std, median: std is the population standard deviation (ddof 0).
        smallest, largest: minimum and maximum.
    """

    percentile99: int
    mean: float
    std: float
    median: float
    smallest: int
    largest: int


def summarise(values: Tensor) -> Summary:
    """Summarises integers (M,), M >= 1."""
    v = values.numpy().astype(np.float64)
    return Summary(
        percentile99=round(float(np.percentile(v, 99))),
        mean=float(v.mean()),
        std=float(v.std()),
        median=float(np.median(v)),
        smallest=int(v.min()),
        largest=int(v.max()),
    )


@dataclass(frozen=True)
class CurveResult:
    """Curves of M images; summaries and curves are over the images with nonzero features.

    Attributes:
        thresholds: the T shares of energy.
        images: (M,) int64 indices, ascending.
        reached: (M, T) int32, position at which each image's curve reaches the thresholds; 0 if
            its features are all zero.
        summaries: one per threshold.
        curve_mean, curve_std: (n,) float64, over the curves.
        zero_images: number of images whose features are all zero.
    """

    thresholds: tuple[float, ...]
    images: Tensor
    reached: Tensor
    summaries: tuple[Summary, ...]
    curve_mean: Tensor
    curve_std: Tensor
    zero_images: int


class CurveStats(Accumulator):
    """Accumulates one cumulative energy curve per image, and where it reaches the thresholds.

    Args:
        thresholds: T shares of energy in (0, 1].
    """

    _parts: tuple[str, ...] = ("_images", "_reached", "_sum", "_square")

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = tuple(thresholds)
        self._images: list[Tensor] = []
        self._reached: list[Tensor] = []
        self._sum, self._square = ExactSum(), ExactSum()

    def _add(self, images: Tensor, reached: Tensor, curves: Tensor) -> None:
        """Adds curves (B, n) float64 of the images (B,) and their positions (B, T)."""
        self._keep_shape("curves", tuple(curves.shape[1:]))
        self._images.append(images.to("cpu", torch.int64))
        self._reached.append(reached.to("cpu", torch.int32))
        self._sum.add(curves.sum(0))
        self._square.add(curves.square().sum(0))

    def _sort(self) -> tuple[Tensor, Tensor]:
        """Images (M,) in ascending order, and their positions (M, T), kept as one tensor each.

        Raises:
            ValueError: an image was added twice.
        """
        images = torch.cat([torch.empty(0, dtype=torch.int64), *self._images])
        none = torch.empty((0, len(self.thresholds)), dtype=torch.int32)
        reached = torch.cat([none, *self._reached])
        images, order = images.sort(stable=True)
        twice = images[1:][images[1:] == images[:-1]]
        if len(twice):
            raise ValueError(
                f"images: expected each index once, got {len(twice)} twice, the first is "
                f"{int(twice[0])}"
            )
        self._images, self._reached = [images], [reached[order]]
        return images, reached[order]

    def state_dict(self) -> dict[str, Any]:
        self._sort()
        return super().state_dict()

    def result(self) -> CurveResult:
        """Results over all images so far.

        Raises:
            ValueError: no image was added, or all features are zero.
        """
        images, reached = self._sort()
        nonzero = reached[reached[:, 0] != 0]
        if not len(nonzero):
            reason = "all of them are zero" if len(reached) else "no image was added"
            raise ValueError(f"features: {reason}, so there is no curve")
        mean = self._sum.value() / len(nonzero)
        variance = self._square.value() / len(nonzero) - mean.square()
        return CurveResult(
            thresholds=self.thresholds,
            images=images,
            reached=reached,
            summaries=tuple(summarise(column) for column in nonzero.T),
            curve_mean=mean,
            curve_std=variance.clamp(min=0).sqrt(),
            zero_images=len(reached) - len(nonzero),
        )
