"""SEP, the spectral energy pattern: a token's energy over the frequencies of its channels.

A token's D channels are read as a signal in their natural order ([EM26], section 3). The spectrum
of a real signal mirrors itself, so the published cumulative curve is point-symmetric about its
middle for any token, and noise gives the diagonal. Compare it with the null models
(`featkd.diagnostics.null_models`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featkd.diagnostics.accumulator import Accumulator
from featkd.diagnostics.exact_sum import ExactSum
from featkd.diagnostics.scaling import safe_scale
from featkd.ops import reference
from featkd.runtime import checks
from featkd.runtime.dtypes import accumulation_dtype

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
_CPU_TOKENS = 784  # per block on a CPU, so that intermediate results stay in the cache
_TIE = 1e-9  # a share this close below a level reaches it


@dataclass(frozen=True)
class SEPResult:
    """SEP over all nonzero tokens.

    Attributes:
        shares: the S shares of energy.
        mean, std: (D,) float64, cumulative share in the frequencies 0..d-1, as published.
        bandwidth: (S,) int, first d (1-based) at which the mean reaches each of `shares`.
        folded_mean, folded_std: (D // 2 + 1,) float64, the same for the one-sided spectrum.
        folded_bandwidth: (S,) int, `bandwidth` of the folded curve.
        tokens: number of tokens.
        zero_tokens: number of tokens left out because all of their channels are zero, or below
            1e-12 of the largest entry of their batch.
    """

    shares: tuple[float, ...]
    mean: Tensor
    std: Tensor
    bandwidth: tuple[int, ...]
    folded_mean: Tensor
    folded_std: Tensor
    folded_bandwidth: tuple[int, ...]
    tokens: int
    zero_tokens: int

    def relative(self) -> tuple[float, ...]:
        """Published figure: d / D at each share."""
        return tuple(d / len(self.mean) for d in self.bandwidth)

    def folded_relative(self) -> tuple[float, ...]:
        """Folded figure: d / (D // 2 + 1) at each share."""
        return tuple(d / len(self.folded_mean) for d in self.folded_bandwidth)


class SEP(Accumulator):
    """Accumulates the cumulative spectra of all tokens.

    Only the one-sided cumulative shares c are computed, and the sums of c, c^2 and c_0 c kept.
    The full curve is c up to the middle and 1 + c_0 - c, mirrored, after it; the folded curve is
    2 c - c_0.
    """

    _parts = ("_sums", "_tokens", "_zero")

    def __init__(self) -> None:
        self._sums = ExactSum()  # (3, D // 2 + 1)
        self._tokens = 0
        self._zero = 0

    def update(self, features: Tensor) -> None:
        """Adds maps (..., D), floating and finite."""
        checks.check_floating("features", features)
        self._keep_shape("features", tuple(features.shape[-1:]))
        channels = features.shape[-1]
        tokens = features.detach().reshape(-1, channels)
        scale = safe_scale(tokens)
        size = _CPU_TOKENS if tokens.device.type == "cpu" else max(1, len(tokens))
        wide = accumulation_dtype(features.dtype)
        total = tokens.new_zeros((3, channels // 2 + 1), dtype=torch.float64)
        missing = 0
        for block in torch.split(tokens, size):
            sums, zero = cumulative_moments(block.to(wide) * scale)
            total += sums
            missing += int(zero)
        self._sums.add(total)
        self._zero += missing
        self._tokens += len(tokens) - missing

    def result(self, shares: Sequence[float] = SHARES) -> SEPResult:
        """Curves over all tokens so far.

        Raises:
            ValueError: no nonzero token was added.
        """
        if not self._tokens or self._shape is None:
            raise ValueError("features: no token is nonzero, so there is no SEP")
        c, square, with_first = self._sums.value() / self._tokens
        first, first_square = c[0], with_first[0]
        after = self._shape[0] - len(c)  # frequencies past the middle
        tail = slice(0, after)  # c_{D-1-d} for d = K..D-1, to be mirrored
        mean = torch.cat([c, (1 + first - c[tail]).flip(0)])
        second = 1 + first_square + square[tail] + 2 * first - 2 * c[tail] - 2 * with_first[tail]
        second = torch.cat([square, second.flip(0)])
        folded = 2 * c - first
        folded_second = 4 * square - 4 * with_first + first_square
        folded[-1], folded_second[-1] = 1.0, 1.0  # of an even D the middle counts once
        return SEPResult(
            shares=tuple(shares),
            mean=mean,
            std=(second - mean.square()).clamp(min=0).sqrt(),
            bandwidth=first_reaching(mean, shares),
            folded_mean=folded,
            folded_std=(folded_second - folded.square()).clamp(min=0).sqrt(),
            folded_bandwidth=first_reaching(folded, shares),
            tokens=self._tokens,
            zero_tokens=self._zero,
        )


def cumulative_moments(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of c, c^2 and c_0 c over tokens (M, D).

    c_d is the share of a token's energy in the frequencies 0..d, d up to the middle. The sums are
    in the tokens' dtype; the squares of the entries must neither overflow nor all underflow.

    Returns:
        The sums (3, D // 2 + 1) in float64, and the number of zero tokens.
    """
    parts = torch.view_as_real(torch.fft.rfft(tokens)).square()
    power = parts[..., 0] + parts[..., 1]
    last = power.shape[1] if tokens.shape[1] % 2 else power.shape[1] - 1
    total = power.sum(1, keepdim=True) + power[:, 1:last].sum(1, keepdim=True)
    zero = total == 0
    c = (power / torch.where(zero, 1, total)).cumsum(1)
    sums = [c, c.square(), c * c[:, :1]]
    return torch.stack([part.sum(0) for part in sums]).double(), zero.sum()


def first_reaching(curve: Tensor, shares: Sequence[float]) -> tuple[int, ...]:
    """First 1-based index at which a curve reaches each share."""
    levels = torch.tensor(list(shares), dtype=curve.dtype)
    return tuple(reference.first_reaching(curve, levels, _TIE).tolist())
