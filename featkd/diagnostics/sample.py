"""A sample of images whose features are kept: the same images in any order and on any process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from featkd.runtime.seeding import derive_seed


class FeatureSample:
    """Keeps the features of the `size` images whose hashes of (seed, index) are the smallest.

    Images whose features are all zero are passed over.

    Every image is as likely to be in it, and two samples merge into the sample of both.

    Args:
        size: most images to keep.
        seed: which sample.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size: expected >= 1, got {size}")
        self.size = size
        self.seed = seed
        self._images = torch.empty(0, dtype=torch.int64)
        self._features: Tensor | None = None

    def update(self, features: Tensor, images: Tensor) -> None:
        """Offer the maps (B, N, D) of the images (B,)."""
        some = features.detach().flatten(1).any(1).cpu()
        images = images.to("cpu", torch.int64)[some]
        features = features[some.to(features.device)]
        if not len(images):
            return
        if len(self._images) == self.size:
            last = _keys(self._images, self.seed).max()
            able = torch.from_numpy(_keys(images, self.seed) < last)
            if not able.any():
                return
            images, features = images[able], features[able.to(features.device)]
        self._take(features.detach().cpu(), images)

    def _take(self, features: Tensor, images: Tensor) -> None:
        both = torch.cat([self._images, images])
        chosen = np.argsort(_keys(both, self.seed), kind="stable")[: self.size]
        order = torch.from_numpy(chosen)
        if self._features is not None:
            features = torch.cat([self._features, features])
        self._images, self._features = both[order], features[order]

    def merge(self, other: FeatureSample) -> None:
        """Take over what `other`, of the same size and seed, holds."""
        if other._features is not None:
            self._take(other._features, other._images)

    def state_dict(self) -> dict[str, Any]:
        return {"images": self._images, "features": self._features}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._images, self._features = state["images"], state["features"]

    def first(self, count: int) -> Tensor:
        """Features of a sample of the sample, in no order that the images have."""
        if self._features is None:
            raise ValueError("features: no image with any energy came, so there is no sample")
        return self._features[:count]

    def result(self) -> tuple[Tensor, Tensor]:
        """Indices (M,) in ascending order, and the features (M, N, D) as they came.

        Raises:
            ValueError: no image came.
        """
        if self._features is None:
            raise ValueError("features: no image came, so there is no sample")
        images, order = self._images.sort()
        return images, self._features[order]


def _keys(images: Tensor, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([derive_seed(seed, image) for image in images.tolist()], dtype=np.int64)
