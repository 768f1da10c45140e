"""Low-rank compression of a teacher's feature maps, and its inverse.

One image's map needs few singular directions ([EM26], "per-image low rank"; docs/method.md,
section 5): U_k S_k and V_k at an energy threshold are smaller than the map wherever
k < N C / (N + C).
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

_MOST = 1e38  # what is near float32's largest could be rounded to Inf
_RESOLVED = 2.0**-23  # of the largest: a smaller singular value is float32's rounding


class LowRank(NamedTuple):
    """Feature maps (B, N, C) as `left @ right.mT`, image by image.

    Attributes:
        left: (B, N, k) float32, U_k S_k of each image's own rank, and zeros beyond it.
        right: (B, C, k) float32, V_k, orthonormal columns, and zeros beyond the image's rank.
    """

    left: Tensor
    right: Tensor


def compress(
    features: Tensor, *, energy: float | None = None, rank: int | None = None
) -> tuple[LowRank, Tensor]:
    """The leading singular directions of each image's map, as many as an energy or a rank asks for.

    X ~ (U_k S_k) V_k^T with, for an energy t, the smallest k with
    sum_{i<=k} s_i^2 >= t sum_i s_i^2: the rank of `featkd.linalg.energy_ranks`, so that
    ||X - X_k||^2 <= (1 - t) ||X||^2 ([EM26], Figure 1).

    Args:
        features: (B, N, C), floating.
        energy: the share to keep, above 0 and at most 1; each image has a rank of its own.
        rank: or a number of directions, from 0 to min(N, C), the same for all images.

    Returns:
        (factors in float32, ranks (B,) int64). k is the largest of the ranks; an image's columns
        beyond its own rank are zeros. With `rank` k is that rank, and an image whose further
        singular values are below float32's rounding of the largest has a lower one in `ranks`.

    Raises:
        TypeError: not a real floating-point tensor, or an energy or rank that is no number.
        ValueError: another shape, neither or both of energy and rank, one out of range, or a map
            that holds NaN or Inf.

    Notes:
        Computed in float64. Waits for the device once or twice, to learn k. No gradient. Repeats
        bitwise. The signs of the columns are arbitrary.

    Example:
        >>> import torch
        >>> x = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0, 4.0]))[None]
        >>> factors, ranks = compress(x, energy=0.99)
        >>> factors.left.shape, factors.right.shape, ranks.tolist()
        (torch.Size([1, 2, 1]), torch.Size([1, 3, 1]), [1])
    """
    checks.check_floating("features", features, ("B", "N", "C"))
    if (energy is None) == (rank is None):
        raise ValueError(f"energy, rank: expected one of them, got {energy!r} and {rank!r}")
    batch, tokens, channels = features.shape
    if energy is not None:
        checks.check_shares("energy", (energy,))
    else:
        _check_rank(rank, min(tokens, channels))
    x = features.detach()
    bad = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
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
        ranks = ((s > _RESOLVED * s[:, :1]).sum(1)).to(torch.int64)
    kept = torch.arange(count, device=x.device) < ranks[:, None]
    left.copy_(u * (s * kept).unsqueeze(1))
    right.copy_(vh.mT * kept.unsqueeze(1))
    return LowRank(left, right), ranks


def restore(factors: LowRank, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiplies the factors to maps (B, N, C): one batched product in float32, then in `dtype`.

    A column of U_k S_k can exceed float16's range where no value of the map does, and a product
    of rounded factors would err more than the map's own rounding. Autocast is ignored.

    Example:
        >>> restore(LowRank(torch.ones(1, 2, 1), torch.ones(1, 3, 1)))
        tensor([[[1., 1., 1.],
                 [1., 1., 1.]]])
    """
    left, right = factors
    with torch.autocast(left.device.type, enabled=False):
        return torch.bmm(left, right.mT).to(dtype)


def _check_rank(rank: object, most: int) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank: expected an int from 0 to {most}, got {rank!r}")
    if not 0 <= rank <= most:
        raise ValueError(f"rank: expected an int from 0 to {most}, min(N, C), got {rank}")


def quantise(x: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """A factor, or a map, in half precision or 8 bits, with one scale a column.

    "fp16" divides each column by the power of two that puts its largest magnitude between 2^14 and
    2^15: the division is exact, nothing overflows, however large a teacher's massive activations,
    and what is lost to underflow is below 2^-39 of the largest. "int8" is symmetric,
    round(127 x / max|x|). A column's scale takes up its length, so that S may stay in U_k S_k:
    neither factor's range depends on the singular values.

    Args:
        x: (..., R, k), floating: k columns of R values.
        form: "fp16" or "int8".

    Returns:
        (stored (..., R, k) float16 or int8, scales (..., 1, k) float32); `dequantise` multiplies
        them. A column of zeros, or of less than 1e-33, has the scale 0 and comes back as zeros.

    Raises:
        TypeError: not a real floating-point tensor.
        ValueError: fewer than two dimensions, an unknown form, or NaN, Inf or more than 1e38.

    Example:
        >>> import torch
        >>> stored, scale = quantise(torch.tensor([[2e6, 1.0], [-1e6, 0.5]]), "int8")
        >>> stored.tolist()
        [[127, 127], [-64, 64]]
    """
    checks.check_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected at least 2 dimensions, got shape {tuple(x.shape)}")
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}; got {form!r}")
    exact = x.detach().float()
    if not (exact.abs() <= _MOST).all():
        raise ValueError(f"x: holds NaN, Inf or more than {_MOST:g}, the most that can be stored")
    if not exact.shape[-2]:
        scale = exact.new_zeros(*exact.shape[:-2], 1, exact.shape[-1])
    else:
        largest = exact.abs().amax(-2, keepdim=True)
        if form == "fp16":
            scale = torch.ldexp((largest > 0).float(), torch.frexp(largest).exponent - 15)
        else:
            scale = largest / 127
    # a scale that is no normal number has lost its digits
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0, scale)
    quotient = exact / torch.where(scale == 0, torch.inf, scale)
    if form == "fp16":
        return quotient.to(torch.float16), scale
    return quotient.round().clamp(-127, 127).to(torch.int8), scale


def dequantise(stored: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `quantise` stored, (..., R, k) times the (..., 1, k) scales, in `dtype`.

    Example:
        >>> import torch
        >>> dequantise(*quantise(torch.tensor([[2.0**20, 1.0], [-(2.0**20), 0.5]]), "fp16"))
        tensor([[ 1.0486e+06,  1.0000e+00],
                [-1.0486e+06,  5.0000e-01]])
    """
    return (stored.to(scale.dtype) * scale).to(dtype)
