"""Made-up feature maps with real structure: low rank per image, rotating subspaces."""

from __future__ import annotations

import torch
from torch import Tensor

from featkd.diagnostics import Settings

QUICK = Settings(sample=6, permuted=3, permutations=10, k=3)


def feature_maps(images: int, tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Maps (images, tokens, channels) with a decaying spectrum, a mean, and unequal channels."""
    generator = torch.Generator().manual_seed(seed)
    n = min(tokens, channels)
    left = torch.randn(images, tokens, n, generator=generator) / torch.arange(1, n + 1)
    right = torch.randn(images, n, channels, generator=generator)
    common = torch.randn(channels, generator=generator)
    scales = torch.randn(channels, generator=generator).exp()
    return (left @ right + common) * scales
