"""Adapts images and feature maps where a teacher expects others than the student has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImageAdapter(nn.Module):
    """Maps images that are normalised for one model to another model's normalisation and size.

    An affine map per channel, x std / std' + (mean - mean') / std', and a bilinear, antialiased
    resize. What would change nothing is left out.

    Args:
        mean, std: statistics that the images are normalised by, per channel.
        new_mean, new_std: statistics of the model that receives them.
        size: height and width of the images.
        new_size: height and width that the model receives.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        new_mean: Sequence[float],
        new_std: Sequence[float],
        size: int,
        new_size: int,
    ) -> None:
        super().__init__()
        self.renormalises = not (same_values(mean, new_mean) and same_values(std, new_std))
        self.new_size = None if new_size == size else new_size
        old, old_std, new, divisor = (
            torch.tensor(list(x), dtype=torch.float64).view(-1, 1, 1)
            for x in (mean, std, new_mean, new_std)
        )
        self.register_buffer("scale", (old_std / divisor).float(), persistent=False)
        self.register_buffer("shift", ((old - new) / divisor).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        if self.renormalises:
            images = torch.addcmul(self.shift, images, self.scale)
        if self.new_size is not None:
            size = (self.new_size, self.new_size)
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        return images


def same_values(one: Sequence[float], other: Sequence[float]) -> bool:
    """Compares two statistics, up to rounding."""
    return all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(one, other, strict=True))


def resize_map(tokens: Tensor, side: int) -> Tensor:
    """Resizes a map on a square grid to another square grid: bilinear, antialiased.

    Args:
        tokens: (B, N, C) with N a square number, in row-major order.
        side: height and width of the new grid.

    Returns:
        (B, side * side, C) in the same dtype, a strided view.
    """
    old = math.isqrt(tokens.shape[1])
    images = tokens.transpose(1, 2).reshape(len(tokens), -1, old, old)
    # In float32: a sum of rounded products is less exact than one rounding.
    resized = F.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True)
    return resized.to(tokens.dtype).flatten(2).transpose(1, 2)
