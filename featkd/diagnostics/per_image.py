"""One row of integers for every image, whatever order the images came in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
