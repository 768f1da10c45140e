"""Random erasing: the boxes of a batch, drawn together, and the noise that fills them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featkd.data.draws import normal, uniforms

_AREA = (0.02, 1 / 3)  # share of the image, as in timm
_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_TRIES = 10  # boxes as large as the image are drawn again
_POOL = 1 << 18  # positions at which an image's noise can begin


@dataclass(frozen=True)
class Eraser:
    """Draws the boxes of timm's `RandomErasing` in "pixel" mode with one box per image.

    The noise of an image is a part of one sequence of normal numbers, from an offset on that is
    drawn like the box. A sample's pixels therefore follow from the run's seed and its key.

    Args:
        probability: probability that an image has a box.
        side: height and width of the images.
        seed: seed of the run.
    """

    probability: float
    side: int
    seed: int

    def boxes(self, keys: NDArray[Any]) -> NDArray[np.int32]:
        """Draws the boxes of a batch.

        Args:
            keys: (B, 3) integers, the `SampleKey` of each image.

        Returns:
            (B, 5) int32: top, left, height, width, offset of the noise; height 0 without a box.
        """
        drawn = uniforms(self.seed, keys, 4 + 2 * _TRIES, purpose="erase")
        erased, offset, top, left = drawn[:, :4].T
        area = _between(*_AREA, drawn[:, 4 : 4 + _TRIES]) * self.side**2
        aspect = np.exp(_between(*_LOG_ASPECT, drawn[:, 4 + _TRIES :]))
        heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (heights < self.side) & (widths < self.side)
        rows, chosen = np.arange(len(keys)), fits.argmax(1)
        height, width = heights[rows, chosen], widths[rows, chosen]
        height = np.where((erased < self.probability) & fits[rows, chosen], height, 0)
        # truncated below to whole numbers from 0 to side - length
        top, left = top * (self.side - height + 1), left * (self.side - width + 1)
        return np.stack((top, left, height, width, offset * _POOL), axis=1).astype(np.int32)

    def noise(self) -> Tensor:
        """Makes the sequence of normal numbers, long enough for an image at any offset.

        Not by a generator of torch or NumPy, whose numbers may differ between versions.
        """
        length = _POOL + 3 * self.side**2
        pairs = uniforms(self.seed, np.arange(length)[:, None], 2, purpose="noise").T
        return torch.from_numpy(normal(*pairs).astype(np.float32))


def _between(low: float, high: float, drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    return low + (high - low) * drawn
