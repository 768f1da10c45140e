"""Wall time of updates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures the wall time of updates, without pauses for saving."""

    def __init__(self) -> None:
        self.updates = 0
        self._since = time.perf_counter()

    def lap(self) -> tuple[float, int]:
        """Returns seconds and updates since the last lap."""
        now = time.perf_counter()
        lap = now - self._since, self.updates
        self._since, self.updates = now, 0
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside the context."""
        stopped = time.perf_counter()
        yield
        self._since += time.perf_counter() - stopped
