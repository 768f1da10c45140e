"""Images/s of a part of training: what was timed, its figures, and the table that is printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .results import Measured
from .timing import quantiles


@dataclass(frozen=True)
class Rate:
    """A part that was timed in some rounds, each over the same number of images."""

    name: str
    variant: str
    images: int
    seconds: Sequence[float]
    """Of each round."""

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return quantiles(list(self.seconds))[1]

    @property
    def images_per_s(self) -> float:
        """Of the median round."""
        return self.images / self.median

    @property
    def ms_per_image(self) -> float:
        """Of the median round."""
        return 1e3 * self.median / self.images

    def figures(self) -> list[Measured]:
        """In the JSON form."""
        low, _, high = quantiles(list(self.seconds))
        return [
            (self.name, self.variant, "images_per_s", "images/s", self.images_per_s),
            (self.name, self.variant, "images_per_s_q20", "images/s", self.images / high),
            (self.name, self.variant, "images_per_s_q80", "images/s", self.images / low),
            (self.name, self.variant, "rounds", "count", len(self.seconds)),
        ]


def figures(rates: Iterable[Rate]) -> list[Measured]:
    """Of all of them, in the JSON form."""
    return [figure for rate in rates for figure in rate.figures()]
