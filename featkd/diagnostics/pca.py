"""Dataset PCA: axes of all tokens, and each image's energy in the leading axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featkd import linalg
from featkd.diagnostics.accumulator import Accumulator
from featkd.diagnostics.exact_sum import ExactSum
from featkd.diagnostics.per_image import CurveResult, CurveStats
from featkd.diagnostics.scaling import in_range, safe_scale
from featkd.ops import reference
from featkd.runtime import checks
from featkd.runtime.dtypes import accumulation_dtype

_CPU_TOKENS = 784  # per block on a CPU, so that products stay in the cache
_SLAB = 1568  # tokens summed in the features' precision; slabs are summed in float64
_NEAR = 2e-6  # shares this close to a threshold are computed again in float64


@dataclass(frozen=True)
class PCAResult:
    """Axes of the data set.

    Attributes:
        eigenvalues: (D,) float64, descending, of the second moment over all tokens.
        vectors: (D, D) float64, the axes as columns, by descending eigenvalue.
        mean: (D,) float64, the mean token.
        tokens: number of tokens.
        centred: True if the mean token was subtracted.
        spread: (D,) float64, cumulative share of the energy in the leading axes.
    """

    eigenvalues: Tensor
    vectors: Tensor
    mean: Tensor
    tokens: int
    centred: bool
    spread: Tensor


class DatasetPCA(Accumulator):
    """Accumulates C = sum_i X_i^T X_i / tokens ([EM26], Figure 2).

    Tokens are summed relative to a pilot mean, so a large common component costs no accuracy;
    `result` adds it back in float64. Products, and sums of up to 1568 tokens, are in the features'
    own precision (at least float32); further sums are exact (`ExactSum`).
    """

    _parts = ("_pilot", "_products", "_total", "_tokens")

    def __init__(self) -> None:
        self._pilot: Tensor | None = None
        self._products, self._total = ExactSum(), ExactSum()  # relative to the pilot mean
        self._tokens = 0

    def calibrate(self, features: Tensor) -> None:
        """Sets the pilot mean from some features, without counting them.

        Accumulators that will be merged need the same pilot mean. Without a call, the first
        `update` sets it.
        """
        self._pilot = mean_token(features)

    def update(self, features: Tensor) -> None:
        """Adds maps (B, N, D), floating and finite."""
        checks.check_floating("features", features)
        self._keep_shape("features", tuple(features.shape[-1:]))
        tokens = _tokens(features)
        if self._pilot is None:
            self.calibrate(features)
        assert self._pilot is not None
        second, first = moments(tokens, self._pilot.to(tokens))
        self._products.add(second)
        self._total.add(first)
        self._tokens += len(tokens)

    def merge(self, other: DatasetPCA) -> None:
        """Adds the tokens of another accumulator with the same pilot mean."""
        if self._pilot is None:
            self._pilot = other._pilot
        elif other._pilot is not None and not torch.equal(self._pilot, other._pilot):
            raise ValueError(
                "other: expected the same pilot mean; call calibrate with the same features on both"
            )
        super().merge(other)

    def result(self, centred: bool = False) -> PCAResult:
        """Eigenvectors and eigenvalues of the second moment, by torch.linalg.eigh in float64.

        Args:
            centred: subtract the mean token; the published definition does not.

        Raises:
            ValueError: no token was added.
        """
        if not self._tokens or self._pilot is None:
            raise ValueError("features: no token was added, so there is no PCA")
        pilot = self._pilot.double()
        # second moment about the pilot, and the mean's offset from it
        moment, offset = (x.value() / self._tokens for x in (self._products, self._total))
        if centred:
            moment = moment - torch.outer(offset, offset)
        else:
            cross = torch.outer(offset, pilot)
            moment = moment + cross + cross.T + torch.outer(pilot, pilot)
        values, vectors = torch.linalg.eigh(moment)
        values = values.flip(0).clamp(min=0)
        total = values.sum()
        return PCAResult(
            eigenvalues=values,
            vectors=_fixed_signs(vectors.flip(1)),
            mean=pilot + offset,
            tokens=self._tokens,
            centred=centred,
            spread=values.cumsum(0) / torch.where(total == 0, 1, total),
        )


def mean_token(features: Tensor) -> Tensor:
    """Mean (D,) of the tokens of (B, N, D), float32 on the CPU."""
    return _tokens(features).double().mean(0).float().cpu()


def moments(tokens: Tensor, pilot: Tensor) -> tuple[Tensor, Tensor]:
    """Second moment Y^T Y and column sums of Y = tokens (M, D) - pilot (D,), in float64.

    Sums of at most 1568 products are in the tokens' precision; entries whose squares are out of
    its range are scaled first. Two block rows cover the upper triangle, 3/4 of the full product.
    """
    d = tokens.shape[1]
    scale = safe_scale(tokens, pilot)
    if scale != 1:
        tokens, pilot = tokens * scale, pilot * scale
    second = tokens.new_zeros((d, d), dtype=torch.float64)
    first = tokens.new_zeros(d, dtype=torch.float64)
    block = max(64, -(-d // 2))
    for slab in torch.split(tokens, _SLAB):
        y = slab - pilot
        for low in range(0, d, block):
            second[low : low + block, low:] += y[:, low : low + block].T @ y[:, low:]
        first += y.sum(0).double()
    second = (second.triu() + second.triu(1).T) / scale / scale
    return second, first / scale


class CapturedResult(CurveResult):
    """Captured energy of M images: `CurveResult` with n = D."""

    @property
    def dims(self) -> Tensor:
        """(M, T) int32, smallest d whose d leading axes hold the share; 0 for zero features."""
        return self.reached


class CapturedEnergy(CurveStats):
    """Accumulates captured_i(d) = ||X_i V_d||^2 / ||X_i||^2 of each image ([EM26], Figure 2).

    Features below float64 are projected in float32. An image with a share within 2e-6 of a
    threshold is projected again in float64.

    Args:
        pca: axes of the data set; features are centred if the PCA is.
        thresholds: shares of energy in (0, 1] at which dimensions are taken.
    """

    def __init__(self, pca: PCAResult, thresholds: Sequence[float] = linalg.THRESHOLDS) -> None:
        super().__init__(thresholds)
        self._vectors = pca.vectors
        self._mean = pca.mean if pca.centred else None

    def update(self, features: Tensor, images: Tensor) -> None:
        """Adds the maps (B, N, D) of the images (B,)."""
        curve = self._captured(features, accumulation_dtype(features.dtype))
        levels = torch.tensor(self.thresholds, dtype=torch.float64, device=curve.device)
        near = ((curve.unsqueeze(-1) - levels).abs() < _NEAR).flatten(1).any(1)
        if features.dtype != torch.float64 and near.any():
            curve[near] = self._captured(features[near], torch.float64)
        dims = reference.first_reaching(curve, levels)
        empty = curve[:, -1:] == 0
        self._add(images, torch.where(empty, 0, dims), curve)

    def _captured(self, features: Tensor, dtype: torch.dtype) -> Tensor:
        """Cumulative shares (B, D) in float64."""
        vectors = self._vectors.to(features.device, dtype)
        mean = None if self._mean is None else self._mean.to(features.device, dtype)
        on_cpu = features.device.type == "cpu"
        size = max(1, _CPU_TOKENS // features.shape[1]) if on_cpu else len(features)
        parts = []
        for part in torch.split(features, size):
            x = part.to(dtype) if mean is None else part.to(dtype) - mean
            parts.append((in_range(x) @ vectors).square_().sum(1).double())
        energy = torch.cat(parts)
        total = energy.sum(1, keepdim=True)
        return energy.cumsum(1) / torch.where(total == 0, 1, total)

    def result(self) -> CapturedResult:
        """Results over all images so far.

        Raises:
            ValueError: no image was added, or all features are zero.
        """
        return CapturedResult(**vars(super().result()))


def _tokens(features: Tensor) -> Tensor:
    """Flattens (B, N, D) to (B*N, D), in at least float32."""
    checks.check_shape("features", features, ("B", "N", "D"))
    wide = accumulation_dtype(features.dtype)
    return features.detach().flatten(0, 1).to(wide)


def _fixed_signs(vectors: Tensor) -> Tensor:
    """Makes the largest entry of each axis positive: eigenvectors have no unique sign."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
