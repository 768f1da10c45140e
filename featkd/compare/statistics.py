"""Student's t intervals of means and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Interval:
    """A mean and its t interval.

    Attributes:
        mean: mean of the values.
        low, high: ends of the interval; None for a single value, which has none.
        count: number of values.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """True if there is an interval and 0 lies outside."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Computes the mean and its two-sided t interval.

    Examples:
        >>> found = interval([1.0, 2.0, 3.0])
        >>> f"{found.mean:g} {found.low:.3f} {found.high:.3f}"
        '2 -0.484 4.484'
    """
    count, middle = len(values), mean(values)
    if count == 1:
        return Interval(middle, None, None, 1)
    half = t_quantile(level, count - 1) * stdev(values) / math.sqrt(count)
    return Interval(middle, middle - half, middle + half, count)


def t_quantile(level: float, freedom: int) -> float:
    """Returns the t for which Student's distribution has `level` of its mass in [-t, t].

    Args:
        level: mass, 0 < level < 1.
        freedom: degrees of freedom, a whole number >= 1.
    """
    low, high = 0.0, 1.0
    while _mass(high, freedom) < level:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        if _mass(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return high


def _mass(t: float, freedom: int) -> float:
    """Mass of Student's distribution in [-t, t] [Abramowitz and Stegun 1964, 26.7.3 and 26.7.4]."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    if freedom == 1:
        return 2 * angle / math.pi
    term = cosine if odd else 1.0
    total = term
    for number in range(3 if odd else 2, freedom - 1, 2):
        term *= (number - 1) / number * cosine * cosine
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
