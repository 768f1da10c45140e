"""Singular spectrum: energy ranks of each image and the mean energy curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from featkd import linalg
from featkd.diagnostics.exact_sum import ExactSum
from featkd.diagnostics.per_image import CurveResult, CurveStats
from featkd.runtime import checks


@dataclass(frozen=True)
class SpectrumResult(CurveResult):
    """Spectra of M images: `CurveResult` with n = min(N, D).

    Attributes:
        curve_weighted: (n,) float64, mean of the curves weighted by the images' energies.
        unsolved: number of images whose eigenvalues missed the trace (info 2 of
            `linalg.spectrum`).
    """

    curve_weighted: Tensor
    unsolved: int

    @property
    def ranks(self) -> Tensor:
        """(M, T) int32 energy ranks; 0 for an image whose features are all zero."""
        return self.reached

    @property
    def typical(self) -> int:
        """Position of the threshold nearest to 0.9, which the report's sentences use."""
        return min(range(len(self.thresholds)), key=lambda n: abs(self.thresholds[n] - 0.9))


class SpectrumStats(CurveStats):
    """Accumulates sigma_k^2 / sum sigma^2 of each image's uncentred map ([EM26], Figure 1).

    Args:
        thresholds: shares of energy in (0, 1] at which ranks are taken.
    """

    _parts = (*CurveStats._parts, "_weighted", "_unsolved")

    def __init__(self, thresholds: Sequence[float] = linalg.THRESHOLDS) -> None:
        super().__init__(thresholds)
        self._weighted = ExactSum()
        self._unsolved = 0

    def update(self, features: Tensor, images: Tensor) -> None:
        """Adds the maps of some images.

        Args:
            features: (B, N, D), floating and finite.
            images: (B,) int64 image indices.
        """
        checks.check_floating("features", features)
        found = linalg.spectrum(features.detach(), self.thresholds)
        curves = found.curve.double()
        self._add(images, found.ranks, curves)
        self._weighted.add(found.values.double().square().sum(1) @ curves)
        self._unsolved += int((found.info != 0).sum())

    def result(self) -> SpectrumResult:
        """Results over all images so far.

        Raises:
            ValueError: no image was added, or all features are zero.
        """
        curves = vars(super().result())
        weighted = self._weighted.value()
        return SpectrumResult(
            **curves, curve_weighted=weighted / weighted[-1], unsolved=self._unsolved
        )
