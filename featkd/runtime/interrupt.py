"""Ctrl-C and SIGTERM as a request to stop after the current update."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupt:
    """Context in which the first SIGINT or SIGTERM only sets `signal`; the second acts as usual.

    It has no effect outside the main thread, where Python delivers no signals.
    """

    _CAUGHT = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self._CAUGHT}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def stop_signal(self, any_true: Callable[[bool], bool]) -> int | None:
        """Returns the signal if any rank received one, otherwise None; a collective.

        Args:
            any_true: `ProcessContext.any_true`.
        """
        if not any_true(self.signal is not None):
            return None
        return self.signal or signal.SIGTERM

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
