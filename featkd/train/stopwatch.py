"""How long updates take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Wall time of updates, without the pauses for saving."""

    def __init__(self) -> None:
        self.updates = 0
        self._since = time.perf_counter()

    def lap(self) -> tuple[float, int]:
        """Seconds and updates since the last lap."""
        now = time.perf_counter()
        lap = now - self._since, self.updates
        self._since, self.updates = now, 0
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        stopped = time.perf_counter()
        yield
        self._since += time.perf_counter() - stopped
