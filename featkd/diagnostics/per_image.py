"""What is kept of every image, and the mean of its curve, whatever order the images came in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featkd.diagnostics.exact_sum import ExactSum


class ImageTable:
    """Rows of small integers by image index; merged tables are sorted, and no image is twice.

    Args:
        columns: how many integers a row has.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._images: list[Tensor] = []
        self._rows: list[Tensor] = []

    def add(self, images: Tensor, rows: Tensor) -> None:
        """Add rows (B, columns) of the images (B,)."""
        self._images.append(images.to("cpu", torch.int64))
        self._rows.append(rows.to("cpu", torch.int32))

    def merge(self, other: ImageTable) -> None:
        self._images += other._images
        self._rows += other._rows

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Images (M,) int64, ascending, and their rows (M, columns) int32.

        Raises:
            ValueError: an image was added twice.
        """
        images = torch.cat([torch.empty(0, dtype=torch.int64), *self._images])
        rows = torch.cat([torch.empty((0, self.columns), dtype=torch.int32), *self._rows])
        images, order = images.sort(stable=True)
        twice = images[1:][images[1:] == images[:-1]]
        if len(twice):
            raise ValueError(f"images: {len(twice)} came twice, the first is {int(twice[0])}")
        return images, rows[order]

    def state_dict(self) -> dict[str, Any]:
        images, rows = self.sorted()
        self._images, self._rows = [images], [rows]
        return {"images": images, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._images, self._rows = [state["images"]], [state["rows"]]


@dataclass(frozen=True)
class Summary:
    """One number an image, over the images, as the paper's tables have it.

    Attributes:
        percentile99: numpy's linear 99th percentile, rounded: the published summary.
        mean, std, median: std is that of the images at hand (ddof 0).
        smallest, largest: over the images.
    """

    percentile99: int
    mean: float
    std: float
    median: float
    smallest: int
    largest: int


def summarise(values: Tensor) -> Summary:
    """The summary of integers (M,), M >= 1."""
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
    """Over M images; summaries and curves over those that are not zero.

    Attributes:
        images: (M,) int64 indices, ascending.
        reached: (M, T) int32, where each image's curve reaches the thresholds; 0 for one that
            is all zero.
        summaries: one for each threshold.
        mean, std: (n,) float64, of the curves.
        zero_images: images that are all zero.
    """

    images: Tensor
    reached: Tensor
    summaries: tuple[Summary, ...]
    mean: Tensor
    std: Tensor
    zero_images: int


class CurveStats:
    """Accumulates rising curves of energy shares, one an image, and where they reach thresholds.

    Args:
        length: n, of the curves.
        thresholds: T, how many.
    """

    def __init__(self, length: int, thresholds: int) -> None:
        self._table = ImageTable(thresholds)
        self._sum, self._square = ExactSum((length,)), ExactSum((length,))

    def add(self, images: Tensor, reached: Tensor, curves: Tensor) -> None:
        """Add curves (B, n) float64 of the images (B,), which reach the thresholds at (B, T)."""
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
        """The figures over all images so far.

        Raises:
            ValueError: no image came, or all features are zero.
        """
        images, reached = self._table.sorted()
        some = reached[reached[:, 0] != 0]
        if not len(some):
            why = "all of them are zero" if len(reached) else "no image came"
            raise ValueError(f"features: {why}, so there is no curve")
        mean = self._sum.value() / len(some)
        variance = self._square.value() / len(some) - mean.square()
        return CurveResult(
            images=images,
            reached=reached,
            summaries=tuple(summarise(column) for column in some.T),
            mean=mean,
            std=variance.clamp(min=0).sqrt(),
            zero_images=len(reached) - len(some),
        )
