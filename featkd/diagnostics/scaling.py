"""Power-of-two scales for features whose squares would overflow or underflow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SAFE = (1e-12, 1e12)  # values whose squares are far from the limits of float32


def safe_scale(*tensors: Tensor) -> float:
    """A power of two that brings the largest entry near 1; 1.0 if its square is in range."""
    ends = [float(end) for x in tensors if x.numel() for end in x.aminmax()]
    largest = max(map(abs, ends), default=0.0)
    if _SAFE[0] < largest < _SAFE[1] or largest == 0:
        return 1.0
    return math.ldexp(1.0, min(-math.frexp(largest)[1], _largest_exponent(tensors[0].dtype)))


def in_range(maps: Tensor) -> Tensor:
    """Scales each of the maps (B, N, D) whose squares are out of range by a power of two.

    Shares of a map's energy do not depend on its scale.
    """
    low, high = maps.flatten(1).aminmax(dim=1)
    largest = torch.maximum(-low, high)
    unsafe = ((largest <= _SAFE[0]) | (largest >= _SAFE[1])) & (largest != 0)
    if not unsafe.any():
        return maps
    exponents = torch.where(unsafe, -torch.frexp(largest).exponent, 0)
    exponents = exponents.clamp(max=_largest_exponent(maps.dtype))
    return maps * torch.ldexp(torch.ones_like(largest), exponents).view(-1, 1, 1)


def _largest_exponent(dtype: torch.dtype) -> int:
    """Largest exponent of a scale: subnormal numbers would need an infinite scale."""
    return 1022 if dtype == torch.float64 else 126
