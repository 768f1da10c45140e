"""Wall time of updates."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures the wall time of updates, without pauses for saving."""

    def __init__(self) -> None:
        self.updates = 0  # since the last lap
        self._total = 0.0, 0  # seconds and updates of all laps

    def start(self) -> None:
        """Begins to measure, after a time that does not count."""
        self._since, self.updates = time.perf_counter(), 0

    def lap(self) -> float:
        """Returns the updates per second since the last lap, and begins another."""
        now = time.perf_counter()
        seconds, updates = now - self._since, self.updates
        self._total = self._total[0] + seconds, self._total[1] + updates
        self._since, self.updates = now, 0
        return updates / seconds

    @property
    def updates_per_s(self) -> float:
        """Updates per second of all laps; NaN without one."""
        seconds, updates = self._total
        return updates / seconds if seconds else math.nan

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside the context."""
        stopped = time.perf_counter()
        yield
        self._since += time.perf_counter() - stopped
