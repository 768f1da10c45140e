"""The per-image spectrum: energy ranks of every image and the mean energy curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from featkd import checks, linalg
from featkd.diagnostics.exact_sum import ExactSum
from featkd.diagnostics.per_image import ImageTable, Summary, summarise


@dataclass(frozen=True)
class SpectrumResult:
    """Over M images, n = min(N, D).

    Attributes:
        thresholds: the T shares of energy.
        images: (M,) int64 indices, ascending.
        ranks: (M, T) int32 energy ranks; 0 for an image whose features are all zero.
        summaries: one for each threshold, over the images that are not zero, as are the curves.
        curve_mean, curve_std: (n,) float64, share of the energy in the r leading values.
        curve_weighted: (n,) float64, mean of the curves weighted by the images' energies.
        zero_images: images whose features are all zero.
        unsolved: images whose eigenvalues missed the trace (info 2 of `linalg.spectrum`).
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
        """Position of the threshold nearest to 0.9, at which figures are put into words."""
        return min(range(len(self.thresholds)), key=lambda n: abs(self.thresholds[n] - 0.9))


class SpectrumStats:
    """Accumulates sigma_k^2 / sum sigma^2 of every image's map, not centred ([EM26], Figure 1).

    Args:
        thresholds: shares of energy in (0, 1] at which ranks are taken.
    """

    def __init__(self, thresholds: Sequence[float] = linalg.THRESHOLDS) -> None:
        self.thresholds = tuple(thresholds)
        self._table = ImageTable(len(self.thresholds))
        self._unsolved = 0
        self._curve: ExactSum | None = None
        self._square: ExactSum | None = None
        self._weighted: ExactSum | None = None

    def update(self, features: Tensor, images: Tensor) -> None:
        """Add the maps of some images.

        Args:
            features: (B, N, D), floating and finite.
            images: (B,) int64, the images' indices.
        """
        checks.check_floating("features", features)
        found = linalg.spectrum(features.detach(), self.thresholds)
        curve = found.curve.double()
        if self._curve is None or self._square is None or self._weighted is None:
            self._curve = ExactSum((curve.shape[1],))
            self._square = ExactSum((curve.shape[1],))
            self._weighted = ExactSum((curve.shape[1],))
        self._curve.add(curve.sum(0))
        self._square.add(curve.square().sum(0))
        energy = found.values.double().square().sum(1)
        self._weighted.add(energy @ curve)
        self._table.add(images, found.ranks)
        self._unsolved += int((found.info != 0).sum())

    def merge(self, other: SpectrumStats) -> None:
        """Take over what `other` has seen; the images must be others."""
        self._table.merge(other._table)
        self._unsolved += other._unsolved
        for name in ("_curve", "_square", "_weighted"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None:
                setattr(self, name, theirs and ExactSum.from_state_dict(theirs.state_dict()))
            elif theirs is not None:
                mine.merge(theirs)

    def state_dict(self) -> dict[str, Any]:
        return {
            "table": self._table.state_dict(),
            "unsolved": self._unsolved,
            "curve": None if self._curve is None else self._curve.state_dict(),
            "square": None if self._square is None else self._square.state_dict(),
            "weighted": None if self._weighted is None else self._weighted.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._table.load_state_dict(state["table"])
        self._unsolved = state["unsolved"]
        for name in ("curve", "square", "weighted"):
            part = state[name]
            setattr(self, f"_{name}", None if part is None else ExactSum.from_state_dict(part))

    def result(self) -> SpectrumResult:
        """The figures over all images so far.

        Raises:
            ValueError: no image came, or all features are zero.
        """
        images, ranks = self._table.sorted()
        if self._curve is None or self._square is None or self._weighted is None:
            raise ValueError("features: no image came, so there is no spectrum")
        some = ranks[ranks[:, 0] != 0]
        if not len(some):
            raise ValueError("features: all of them are zero, so there is no spectrum")
        mean = self._curve.value() / len(some)
        variance = self._square.value() / len(some) - mean.square()
        weighted = self._weighted.value()
        return SpectrumResult(
            thresholds=self.thresholds,
            images=images,
            ranks=ranks,
            summaries=tuple(summarise(column) for column in some.T),
            curve_mean=mean,
            curve_std=variance.clamp(min=0).sqrt(),
            curve_weighted=weighted / weighted[-1],
            zero_images=len(ranks) - len(some),
            unsolved=self._unsolved,
        )
