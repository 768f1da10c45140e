"""Images per second of a part of training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .results import Measured
from .timing import quantiles


@dataclass(frozen=True)
class Rate:
    """Times of a part over several rounds of the same number of images."""

    name: str
    variant: str
    images: int
    """Images per round."""
    seconds: Sequence[float]
    """Seconds of each round."""

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return quantiles(self.seconds)[1]

    @property
    def images_per_s(self) -> float:
        """Images per second in the median round."""
        return self.images / self.median

    @property
    def ms_per_image(self) -> float:
        """Milliseconds per image in the median round."""
        return 1e3 * self.median / self.images

    def figures(self) -> list[Measured]:
        """Returns the figures in the JSON form."""
        low, _, high = quantiles(self.seconds)
        return [
            (self.name, self.variant, "images_per_s", "images/s", self.images_per_s),
            (self.name, self.variant, "images_per_s_q20", "images/s", self.images / high),
            (self.name, self.variant, "images_per_s_q80", "images/s", self.images / low),
            (self.name, self.variant, "rounds", "count", len(self.seconds)),
        ]


def figures(rates: Iterable[Rate]) -> list[Measured]:
    """Returns the figures of all rates in the JSON form."""
    return [figure for rate in rates for figure in rate.figures()]
