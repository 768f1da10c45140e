"""Ctrl-C while a command loads, and as a request to stop after the current update."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

CHECKPOINT_THREAD = "checkpoint"
"""Name of the thread that saves a checkpoint; a process can end beside it only by `os._exit`."""

_before_loading: Any = None  # SIGINT's handler, while `exit_while_loading` replaces it


def exit_while_loading() -> None:
    """Makes SIGINT end the process with one line and exit code 130, until `loading_done`.

    An exception would not do: imports of libraries swallow it or turn it into another one.
    """
    global _before_loading
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        _before_loading = signal.signal(signal.SIGINT, _exit)


def loading_done() -> None:
    """Restores SIGINT's handler; a command calls it once it has imported what it needs."""
    global _before_loading
    if _before_loading is not None:
        signal.signal(signal.SIGINT, _before_loading)
        _before_loading = None


def raise_on_signals() -> None:
    """Makes SIGINT and SIGTERM end this process by an exception, which also ends its children.

    A second signal ends the process at once, and with it the children that it waits for.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup
            signal.signal(number, _raise)


def _raise(number: int, _: FrameType | None) -> NoReturn:
    for caught in (signal.SIGINT, signal.SIGTERM):
        signal.signal(caught, signal.SIG_DFL)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _exit(number: int, _: FrameType | None) -> None:
    os.write(2, b"featkd: interrupted\n")
    os._exit(128 + number)


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
