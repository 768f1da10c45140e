"""A random sample of images whose features are kept, independent of order and processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from featkd.diagnostics.accumulator import Accumulator
from featkd.runtime.seeding import derive_seed


class FeatureSample(Accumulator):
    """Keeps the features of the `size` images with the smallest hashes of (seed, index).

    Each image is equally likely to be sampled, and two samples merge into the sample of both.
    Images whose features are all zero are skipped.

    Args:
        size: maximum number of images.
        seed: random seed of the hash.
    """

    _parts = ("_images", "_features")

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
        self._images = torch.empty(0, dtype=torch.int64)
        self._features: Tensor | None = None

    def update(self, features: Tensor, images: Tensor) -> None:
        """Offers the maps (B, N, D) of the images (B,)."""
        nonzero = features.detach().flatten(1).any(1).cpu()
        images = images.to("cpu", torch.int64)[nonzero]
        features = features[nonzero.to(features.device)]
        if not len(images):
            return
        if len(self._images) == self.size:
            largest = _hashes(self._images, self.seed).max()
            smaller = torch.from_numpy(_hashes(images, self.seed) < largest)
            if not smaller.any():
                return
            images, features = images[smaller], features[smaller.to(features.device)]
        self._add(features.detach().cpu(), images)

    def _add(self, features: Tensor, images: Tensor) -> None:
        both = torch.cat([self._images, images])
        chosen = np.argsort(_hashes(both, self.seed), kind="stable")[: self.size]
        order = torch.from_numpy(chosen)
        if self._features is not None:
            features = torch.cat([self._features, features])
        self._images, self._features = both[order], features[order]

    def merge(self, other: FeatureSample) -> None:
        """Adds the images of another sample of the same size and seed."""
        if other._features is not None:
            self._add(other._features, other._images)

    def first(self, count: int) -> Tensor:
        """Features of the `count` images with the smallest hashes.

        Raises:
            ValueError: no image with nonzero features was added.
        """
        if self._features is None:
            raise ValueError("features: no image has nonzero features, so there is no sample")
        return self._features[:count]

    def result(self) -> tuple[Tensor, Tensor]:
        """Indices (M,) in ascending order, and the features (M, N, D) in their own dtype.

        Raises:
            ValueError: no image with nonzero features was added.
        """
        features = self.first(self.size)
        images, order = self._images.sort()
        return images, features[order]


def _hashes(images: Tensor, seed: int) -> Any:
    return np.array([derive_seed(seed, image) for image in images.tolist()], dtype=np.int64)
