"""Singular spectrum: energy ranks of each image and the mean energy curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from featkd import linalg
from featkd.diagnostics.exact_sum import ExactSum
from featkd.diagnostics.per_image import CurveStats, Summary
from featkd.runtime import checks


@dataclass(frozen=True)
class SpectrumResult:
    """Spectra of M images, n = min(N, D); summaries and curves are over nonzero images.

    Attributes:
        thresholds: the T shares of energy.
        images: (M,) int64 indices, ascending.
        ranks: (M, T) int32 energy ranks; 0 for an image whose features are all zero.
        summaries: one per threshold.
        curve_mean, curve_std: (n,) float64, share of the energy in the k leading singular values.
        curve_weighted: (n,) float64, mean of the curves weighted by the images' energies.
        zero_images: number of images whose features are all zero.
        unsolved: number of images whose eigenvalues missed the trace (info 2 of
            `linalg.spectrum`).
    """

    thresholds: tuple[float, ...]
    images: Tensor
    ranks: Tensor
    summaries: tuple[Summary, ...]
    curve_mean: Tensor
    curve_std: Tensor
    curve_weighted: Tensor
    zero_images: int
    unsolved: int

    @property
    def typical(self) -> int:
        """Position of the threshold nearest to 0.9, which the report's sentences use."""
        return min(range(len(self.thresholds)), key=lambda n: abs(self.thresholds[n] - 0.9))


class SpectrumStats:
    """Accumulates sigma_k^2 / sum sigma^2 of each image's uncentred map ([EM26], Figure 1).

    Args:
        thresholds: shares of energy in (0, 1] at which ranks are taken.
    """

    def __init__(self, thresholds: Sequence[float] = linalg.THRESHOLDS) -> None:
        self.thresholds = tuple(thresholds)
        self._curves: CurveStats | None = None
        self._weighted: ExactSum | None = None
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
        own, weighted = self._parts(curves.shape[1])
        own.add(images, found.ranks, curves)
        weighted.add(found.values.double().square().sum(1) @ curves)
        self._unsolved += int((found.info != 0).sum())

    def _parts(self, length: int) -> tuple[CurveStats, ExactSum]:
        """Creates the sums on first use."""
        if self._curves is None or self._weighted is None:
            self._curves = CurveStats(length, len(self.thresholds))
            self._weighted = ExactSum((length,))
        return self._curves, self._weighted

    def merge(self, other: SpectrumStats) -> None:
        """Adds the images of another accumulator; no image may be in both."""
        if other._curves is None or other._weighted is None:
            return
        curves, weighted = self._parts(other._weighted.shape[0])
        curves.merge(other._curves)
        weighted.merge(other._weighted)
        self._unsolved += other._unsolved

    def state_dict(self) -> dict[str, Any]:
        if self._curves is None or self._weighted is None:
            return {"curves": None}
        return {
            "curves": self._curves.state_dict(),
            "weighted": self._weighted.state_dict(),
            "unsolved": self._unsolved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._curves, self._weighted, self._unsolved = None, None, 0
        if state["curves"] is None:
            return
        weighted = ExactSum.from_state_dict(state["weighted"])
        self._parts(weighted.shape[0])[0].load_state_dict(state["curves"])
        self._weighted, self._unsolved = weighted, state["unsolved"]

    def result(self) -> SpectrumResult:
        """Results over all images so far.

        Raises:
            ValueError: no image was added, or all features are zero.
        """
        if self._curves is None or self._weighted is None:
            raise ValueError("features: no image was added, so there is no spectrum")
        found = self._curves.result()
        weighted = self._weighted.value()
        return SpectrumResult(
            thresholds=self.thresholds,
            images=found.images,
            ranks=found.reached,
            summaries=found.summaries,
            curve_mean=found.mean,
            curve_std=found.std,
            curve_weighted=weighted / weighted[-1],
            zero_images=found.zero_images,
            unsolved=self._unsolved,
        )
