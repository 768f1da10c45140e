"""Integers per image and the mean of the images' curves, independent of the images' order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featkd.diagnostics.exact_sum import ExactSum


class ImageTable:
    """Rows of small integers by image index.

    Args:
        columns: integers per row.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._images: list[Tensor] = []
        self._rows: list[Tensor] = []

    def add(self, images: Tensor, rows: Tensor) -> None:
        """Adds rows (B, columns) of the images (B,)."""
        self._images.append(images.to("cpu", torch.int64))
        self._rows.append(rows.to("cpu", torch.int32))

    def merge(self, other: ImageTable) -> None:
        self._images += other._images
        self._rows += other._rows

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Images (M,) int64 in ascending order, and their rows (M, columns) int32.

        Raises:
            ValueError: an image was added twice.
        """
        images = torch.cat([torch.empty(0, dtype=torch.int64), *self._images])
        rows = torch.cat([torch.empty((0, self.columns), dtype=torch.int32), *self._rows])
        images, order = images.sort(stable=True)
        twice = images[1:][images[1:] == images[:-1]]
        if len(twice):
            raise ValueError(
                f"images: expected each index once, got {len(twice)} twice, the first is "
                f"{int(twice[0])}"
            )
        return images, rows[order]

    def state_dict(self) -> dict[str, Any]:
        images, rows = self.sorted()
        self._images, self._rows = [images], [rows]
        return {"images": images, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._images, self._rows = [state["images"]], [state["rows"]]


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
        images: (M,) int64 indices, ascending.
        reached: (M, T) int32, position at which each image's curve reaches the thresholds; 0 if
            its features are all zero.
        summaries: one per threshold.
        mean, std: (n,) float64, over the curves.
        zero_images: number of images whose features are all zero.
    """

    images: Tensor
    reached: Tensor
    summaries: tuple[Summary, ...]
    mean: Tensor
    std: Tensor
    zero_images: int


class CurveStats:
    """Accumulates one cumulative energy curve per image, and where it reaches the thresholds.

    Args:
        length: n, points per curve.
        thresholds: T, number of thresholds.
    """

    def __init__(self, length: int, thresholds: int) -> None:
        self._table = ImageTable(thresholds)
        self._sum, self._square = ExactSum((length,)), ExactSum((length,))

    def add(self, images: Tensor, reached: Tensor, curves: Tensor) -> None:
        """Adds curves (B, n) float64 of the images (B,) and their positions (B, T)."""
        self._table.add(images, reached)
        self._sum.add(curves.sum(0))
        self._square.add(curves.square().sum(0))

    def merge(self, other: CurveStats) -> None:
        self._table.merge(other._table)
        self._sum.merge(other._sum)
        self._square.merge(other._square)

    def state_dict(self) -> dict[str, Any]:
        return {
            "table": self._table.state_dict(),
            "sum": self._sum.state_dict(),
            "square": self._square.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._table.load_state_dict(state["table"])
        self._sum = ExactSum.from_state_dict(state["sum"])
        self._square = ExactSum.from_state_dict(state["square"])

    def result(self) -> CurveResult:
        """Results over all images so far.

        Raises:
            ValueError: no image was added, or all features are zero.
        """
        images, reached = self._table.sorted()
        nonzero = reached[reached[:, 0] != 0]
        if not len(nonzero):
            reason = "all of them are zero" if len(reached) else "no image was added"
            raise ValueError(f"features: {reason}, so there is no curve")
        mean = self._sum.value() / len(nonzero)
        variance = self._square.value() / len(nonzero) - mean.square()
        return CurveResult(
            images=images,
            reached=reached,
            summaries=tuple(summarise(column) for column in nonzero.T),
            mean=mean,
            std=variance.clamp(min=0).sqrt(),
            zero_images=len(reached) - len(nonzero),
        )
