"""Dataset PCA: the axes of all tokens, and the energy each image has in the leading ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featkd import checks, linalg, reference
from featkd.diagnostics.exact_sum import ExactSum
from featkd.diagnostics.per_image import ImageTable, Summary, summarise

_CPU_TOKENS = 784
_SLAB = 1568  # tokens that are summed in the features' precision before float64 takes over
_TIE = 1e-10  # of featkd.linalg: a share this close below a threshold reaches it
_NEAR = 2e-6  # float32 decides no dimension whose share is this near to a threshold


@dataclass(frozen=True)
class PCAResult:
    """The axes of the data set.

    Attributes:
        eigenvalues: (D,) float64, descending, of the second moment over all tokens.
        vectors: (D, D) float64, the axes as columns, largest first.
        mean: (D,) float64, the mean token.
        tokens: how many tokens.
        centred: whether the mean was subtracted.
        spread: (D,) float64, share of the energy in the r leading axes.
    """

    eigenvalues: Tensor
    vectors: Tensor
    mean: Tensor
    tokens: int
    centred: bool
    spread: Tensor


class DatasetPCA:
    """Accumulates C = sum_i X_i^T X_i / tokens ([EM26], Figure 2).

    Tokens are taken relative to a pilot mean, so that a large common part costs no accuracy;
    `result` puts it back in float64. Products, and sums within 1568 tokens, are in the features'
    own precision (float32 at least), sums beyond that exact (`ExactSum`).
    """

    def __init__(self) -> None:
        self._pilot: Tensor | None = None
        self._second: ExactSum | None = None
        self._first: ExactSum | None = None
        self._tokens = 0

    def calibrate(self, features: Tensor) -> None:
        """Take the pilot mean from some features; nothing is counted.

        Accumulators that are to be merged need the same pilot. `update` calibrates by its first
        features where this wasn't called.
        """
        tokens = _tokens(features).double()
        self._pilot = tokens.mean(0).float().cpu()
        d = features.shape[-1]
        self._second, self._first = ExactSum((d, d)), ExactSum((d,))

    def update(self, features: Tensor) -> None:
        """Add maps (B, N, D), floating and finite."""
        checks.check_floating("features", features)
        if self._pilot is None:
            self.calibrate(features)
        assert self._pilot is not None
        assert self._second is not None
        assert self._first is not None
        if features.shape[-1] != len(self._pilot):
            raise ValueError(
                f"features: expected {len(self._pilot)} channels as before, got "
                f"{features.shape[-1]}"
            )
        tokens = _tokens(features)
        second, first = moments(tokens, self._pilot.to(tokens))
        self._second.add(second)
        self._first.add(first)
        self._tokens += len(tokens)

    def merge(self, other: DatasetPCA) -> None:
        """Take over what `other`, which has the same pilot, has seen."""
        if other._pilot is None:
            return
        if self._pilot is None:
            self.load_state_dict(other.state_dict())
            return
        assert self._second is not None
        assert self._first is not None
        assert other._second is not None
        assert other._first is not None
        if not torch.equal(self._pilot, other._pilot):
            raise ValueError("other: was calibrated by other features; call calibrate on both")
        self._second.merge(other._second)
        self._first.merge(other._first)
        self._tokens += other._tokens

    def state_dict(self) -> dict[str, Any]:
        if self._pilot is None or self._second is None or self._first is None:
            return {"pilot": None}
        return {
            "pilot": self._pilot,
            "second": self._second.state_dict(),
            "first": self._first.state_dict(),
            "tokens": self._tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["pilot"] is None:
            self.__init__()  # type: ignore[misc]
            return
        self._pilot = state["pilot"]
        self._second = ExactSum.from_state_dict(state["second"])
        self._first = ExactSum.from_state_dict(state["first"])
        self._tokens = state["tokens"]

    def result(self, centred: bool = False) -> PCAResult:
        """Eigenvectors and eigenvalues of the second moment, by torch.linalg.eigh in float64.

        Args:
            centred: subtract the mean token, which the published definition does not.

        Raises:
            ValueError: no token came.
        """
        if not self._tokens or self._second is None or self._first is None:
            raise ValueError("features: no token came, so there is no PCA")
        assert self._pilot is not None
        pilot = self._pilot.double()
        offset = self._first.value() / self._tokens  # of the mean from the pilot
        moment = self._second.value() / self._tokens
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


def moments(tokens: Tensor, pilot: Tensor) -> tuple[Tensor, Tensor]:
    """Y^T Y and the column sums of Y = tokens (M, D) - pilot (D,), in float64.

    Sums of at most 1568 products are in the tokens' precision. The upper triangle alone is
    multiplied, in two block rows: 3/4 of the work of the square.
    """
    d = tokens.shape[1]
    second = tokens.new_zeros((d, d), dtype=torch.float64)
    first = tokens.new_zeros(d, dtype=torch.float64)
    block = max(64, -(-d // 2))
    for slab in torch.split(tokens, _SLAB):
        y = slab - pilot
        for low in range(0, d, block):
            second[low : low + block, low:] += y[:, low : low + block].T @ y[:, low:]
        first += y.sum(0).double()
    return second.triu() + second.triu(1).T, first


@dataclass(frozen=True)
class CapturedResult:
    """Over M images.

    Attributes:
        thresholds: the T shares of energy.
        images: (M,) int64 indices, ascending.
        dims: (M, T) int32: the least d whose axes hold the share; 0 where all features are zero.
        summaries: one for each threshold, over the images that are not zero, as are the curves.
        curve_mean, curve_std: (D,) float64, share of an image's energy in the d leading axes.
    """

    thresholds: tuple[float, ...]
    images: Tensor
    dims: Tensor
    summaries: tuple[Summary, ...]
    curve_mean: Tensor
    curve_std: Tensor


class CapturedEnergy:
    """Accumulates captured_i(d) = ||X_i V_d||^2 / ||X_i||^2 of every image ([EM26], Figure 2).

    Args:
        pca: the axes; features are centred by its mean where it was.
        thresholds: shares of energy in (0, 1] at which dimensions are taken.

    Notes:
        Narrower features than float64 are projected in float32; where a share comes within 2e-6
        of a threshold the image is projected once more in float64.
    """

    def __init__(self, pca: PCAResult, thresholds: Sequence[float] = linalg.THRESHOLDS) -> None:
        self.thresholds = tuple(thresholds)
        self._vectors = pca.vectors
        self._mean = pca.mean if pca.centred else None
        d = len(pca.vectors)
        self._table = ImageTable(len(self.thresholds))
        self._curve = ExactSum((d,))
        self._square = ExactSum((d,))

    def update(self, features: Tensor, images: Tensor) -> None:
        """Add the maps (B, N, D) of the images (B,)."""
        curve = self._captured(features, reference.accumulation_dtype(features.dtype))
        levels = torch.tensor(self.thresholds, dtype=torch.float64, device=curve.device)
        near = ((curve.unsqueeze(-1) - levels).abs() < _NEAR).flatten(1).any(1)
        if features.dtype != torch.float64 and near.any():
            curve[near] = self._captured(features[near], torch.float64)
        reached = curve.unsqueeze(-1) >= levels - _TIE  # (B, D, T)
        dims = reached.to(torch.uint8).argmax(1) + 1
        empty = curve[:, -1:] == 0
        self._table.add(images, torch.where(empty, 0, dims))
        self._curve.add(curve.sum(0))
        self._square.add(curve.square().sum(0))

    def _captured(self, features: Tensor, dtype: torch.dtype) -> Tensor:
        """Cumulative shares (B, D) in float64."""
        vectors = self._vectors.to(features.device, dtype)
        mean = None if self._mean is None else self._mean.to(features.device, dtype)
        # on a CPU a few images at a time, whose product stays in the cache
        on_cpu = features.device.type == "cpu"
        size = max(1, _CPU_TOKENS // features.shape[1]) if on_cpu else len(features)
        parts = []
        for part in torch.split(features, size):
            x = part.to(dtype) if mean is None else part.to(dtype) - mean
            parts.append((x @ vectors).square_().sum(1).double())
        energy = torch.cat(parts)
        total = energy.sum(1, keepdim=True)
        return energy.cumsum(1) / torch.where(total == 0, 1, total)

    def merge(self, other: CapturedEnergy) -> None:
        """Take over what `other`, which has the same axes, has seen."""
        self._table.merge(other._table)
        self._curve.merge(other._curve)
        self._square.merge(other._square)

    def state_dict(self) -> dict[str, Any]:
        return {
            "table": self._table.state_dict(),
            "curve": self._curve.state_dict(),
            "square": self._square.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._table.load_state_dict(state["table"])
        self._curve = ExactSum.from_state_dict(state["curve"])
        self._square = ExactSum.from_state_dict(state["square"])

    def result(self) -> CapturedResult:
        """The figures over all images so far.

        Raises:
            ValueError: no image came.
        """
        images, dims = self._table.sorted()
        some = dims[dims[:, 0] != 0]
        if not len(some):
            raise ValueError("features: no image with any energy came, so none was captured")
        mean = self._curve.value() / len(some)
        variance = self._square.value() / len(some) - mean.square()
        return CapturedResult(
            thresholds=self.thresholds,
            images=images,
            dims=dims,
            summaries=tuple(summarise(column) for column in some.T),
            curve_mean=mean,
            curve_std=variance.clamp(min=0).sqrt(),
        )


def _tokens(features: Tensor) -> Tensor:
    """(B, N, D) -> (B*N, D), half precision widened."""
    checks.check_shape("features", features, ("B", "N", "D"))
    wide = reference.accumulation_dtype(features.dtype)
    return features.detach().flatten(0, 1).to(wide)


def _fixed_signs(vectors: Tensor) -> Tensor:
    """The same axes with the largest entry of each positive: LAPACK leaves the sign open."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
