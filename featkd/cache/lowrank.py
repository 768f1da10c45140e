"""Low-rank compression of a teacher's feature maps, and its inverse.

The map of one image needs few singular directions ([EM26], "per-image low rank"; docs/method.md,
section 5). U_k S_k and V_k are smaller than the map if k < N C / (N + C).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from featkd import linalg
from featkd.runtime import checks

__all__ = ["FORMS", "LowRank", "compress", "dequantise", "quantise", "restore"]

Form = Literal["fp16", "int8"]
FORMS: tuple[Form, ...] = ("fp16", "int8")

LARGEST = 1e38  # larger values could be rounded to Inf
_RESOLUTION = 2.0**-23  # relative; smaller singular values are float32 rounding errors


class LowRank(NamedTuple):
    """Factors of feature maps: `left @ right.mT` is (B, N, C).

    Attributes:
        left: (B, N, k) float32, U_k S_k, with zeros beyond each image's rank.
        right: (B, C, k) float32, V_k with orthonormal columns, and zeros beyond each image's rank.
    """

    left: Tensor
    right: Tensor


def compress(
    features: Tensor, *, energy: float | None = None, rank: int | None = None
) -> tuple[LowRank, Tensor]:
    """Computes the leading singular directions of each image's map, for an energy or a rank.

    X ~ (U_k S_k) V_k^T with, for an energy t, the smallest k with
    sum_{i<=k} s_i^2 >= t sum_i s_i^2: the rank of `featkd.linalg.energy_ranks`, so that
    ||X - X_k||^2 <= (1 - t) ||X||^2 ([EM26], Figure 1).

    Args:
        features: (B, N, C), floating.
        energy: share of the energy to keep, above 0 and at most 1; ranks differ between images.
        rank: number of directions instead, from 0 to min(N, C), the same for all images.

    Returns:
        (factors in float32, ranks (B,) int64). k is the largest rank, or `rank` if given; columns
        beyond an image's rank are zeros. With `rank`, an image has a lower rank if its further
        singular values are below the float32 rounding error of the largest.

    Raises:
        TypeError: not a real floating-point tensor, or energy or rank is not a number.
        ValueError: another shape, neither or both of energy and rank, one out of range, or a map
            with NaN or Inf.

    Notes:
        Computed in float64, without gradient, and bitwise deterministic. Waits for the device once
        or twice, to read k. The signs of the columns are arbitrary.

    Examples:
        >>> import torch
        >>> x = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0, 4.0]))[None]
        >>> factors, ranks = compress(x, energy=0.99)
        >>> factors.left.shape, factors.right.shape, ranks.tolist()
        (torch.Size([1, 2, 1]), torch.Size([1, 3, 1]), [1])
    """
    checks.check_floating("features", features, ("B", "N", "C"))
    if (energy is None) == (rank is None):
        raise ValueError(f"energy, rank: expected exactly one of them, got {energy!r} and {rank!r}")
    batch, tokens, channels = features.shape
    if energy is not None:
        checks.check_shares("energy", (energy,))
    else:
        most = min(tokens, channels)
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise TypeError(f"rank: expected an int from 0 to {most}, got {rank!r}")
        if not 0 <= rank <= most:
            raise ValueError(f"rank: expected an int from 0 to {most}, min(N, C), got {rank}")
    x = features.detach()
    if bad := (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist():
        raise ValueError(f"features: image {bad[0]} of the batch holds NaN or Inf")
    ranks = torch.zeros(batch, dtype=torch.int64, device=x.device)
    if energy is not None and x.numel():
        ranks = linalg.energy_ranks(x, (energy,)).squeeze(1)
    count = rank if rank is not None else int(ranks.max()) if batch else 0
    left, right = (x.new_zeros(batch, size, count, dtype=torch.float32) for size in x.shape[1:])
    if not (count and batch):
        return LowRank(left, right), ranks
    u, s, vh = linalg.svd(x, k=count)
    if rank is not None:
        ranks = ((s > _RESOLUTION * s[:, :1]).sum(1)).to(torch.int64)
    kept = torch.arange(count, device=x.device) < ranks[:, None]
    left.copy_(u * (s * kept).unsqueeze(1))
    right.copy_(vh.mT * kept.unsqueeze(1))
    return LowRank(left, right), ranks


def restore(factors: LowRank, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiplies the factors to maps (B, N, C) in float32, then casts to `dtype`.

    Autocast is ignored: columns of U_k S_k can exceed float16's range even if the map does not,
    and rounded factors would add an error larger than the rounding of the map.

    Examples:
        >>> restore(LowRank(torch.ones(1, 2, 1), torch.ones(1, 3, 1)))
        tensor([[[1., 1., 1.],
                 [1., 1., 1.]]])
    """
    left, right = factors
    with torch.autocast(left.device.type, enabled=False):
        return torch.bmm(left, right.mT).to(dtype)


def quantise(x: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Quantises a factor or a map to half precision or 8 bits, with one scale per column.

    - "fp16" divides each column by a power of two that brings its largest magnitude between 2^14
      and 2^15. The division is exact, massive activations do not overflow, and underflow loses
      less than 2^-39 of the largest magnitude.
    - "int8" is symmetric: round(127 x / max|x|).

    Since each column has its own scale, the singular values in U_k S_k do not affect the precision.

    Args:
        x: (..., R, k), floating: k columns of R values.
        form: "fp16" or "int8".

    Returns:
        (stored (..., R, k) float16 or int8, scales (..., 1, k) float32), as `dequantise` takes
        them. A column with no magnitude above 1e-33 has the scale 0 and is restored as zeros.

    Raises:
        TypeError: not a real floating-point tensor.
        ValueError: fewer than two dimensions, an unknown form, or NaN, Inf or more than 1e38.

    Examples:
        >>> import torch
        >>> stored, scale = quantise(torch.tensor([[2e6, 1.0], [-1e6, 0.5]]), "int8")
        >>> stored.tolist()
        [[127, 127], [-64, 64]]
    """
    checks.check_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected at least 2 dimensions, got shape {tuple(x.shape)}")
    checks.check_choice("form", form, FORMS)
    exact = x.detach().float()
    if not (exact.abs() <= LARGEST).all():
        raise ValueError(
            f"x: expected finite values up to {LARGEST:g} in magnitude, got NaN, Inf or larger"
        )
    if not exact.shape[-2]:
        scale = exact.new_zeros(*exact.shape[:-2], 1, exact.shape[-1])
    else:
        largest = exact.abs().amax(-2, keepdim=True)
        if form == "fp16":
            scale = torch.ldexp((largest > 0).float(), torch.frexp(largest).exponent - 15)
        else:
            scale = largest / 127
    # A subnormal scale has too few digits.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0, scale)
    quotient = exact / torch.where(scale == 0, torch.inf, scale)
    if form == "fp16":
        return quotient.to(torch.float16), scale
    return quotient.round().clamp(-127, 127).to(torch.int8), scale


def dequantise(stored: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Restores what `quantise` returned: (..., R, k) times the (..., 1, k) scales, in `dtype`.

    Examples:
        >>> import torch
        >>> dequantise(*quantise(torch.tensor([[2.0**20, 1.0], [-(2.0**20), 0.5]]), "fp16"))
        tensor([[ 1.0486e+06,  1.0000e+00],
                [-1.0486e+06,  5.0000e-01]])
    """
    return (stored.to(scale.dtype) * scale).to(dtype)
