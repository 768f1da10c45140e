"""Saves checkpoints in a thread, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from featkd.runtime.interrupt import CHECKPOINT_THREAD
from featkd.train.parallel import full


class BackgroundSaver:
    """Runs one save at a time in a thread.

    A store can take minutes. Meanwhile the other ranks would wait for the main one in their next
    collective, and NCCL ends processes that wait ten minutes.

    A loader may fork workers while the thread runs, which holds no lock that they use. The thread
    is a daemon: a second Ctrl-C ends the process without waiting. Files are whole in any case.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, *steps: Callable[[], None]) -> None:
        """Starts the steps of a save, one after another; waits for the save before."""
        self.wait()

        def run() -> None:
            try:
                for step in steps:
                    step()
            except BaseException as error:  # raised again by `check` or `wait`
                self._error = error

        self._thread = threading.Thread(target=run, name=CHECKPOINT_THREAD, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises the error of a save that has failed; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits for the end of the save; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @contextmanager
    def finishing(self, say: Callable[..., None]) -> Iterator[None]:
        """Waits for a running save before an error leaves; the checkpoint is from before it.

        Args:
            say: prints the message of a save that fails too.
        """
        try:
            yield
        except Exception:
            try:
                self.wait()
            except Exception as error:
                say(str(error), warning=True)
            raise


def snapshot(state: Any, *, keep: bool) -> Any:
    """Copies all tensors of nested dicts, lists and tuples to the CPU.

    A collective if some are sharded: each is gathered and copied before the next.

    Args:
        state: tensors and plain values.
        keep: return the copy; otherwise only take part in the collectives and return None.
    """
    copied = _copy(state, keep)
    if keep and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.current_stream().synchronize()  # once, for all copies
    return copied


def _copy(value: Any, keep: bool) -> Any:
    if isinstance(value, Tensor):
        x = full(value.detach())
        if not keep:
            return None
        copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        return copy.copy_(x, non_blocking=True)
    if isinstance(value, Mapping):
        copies = {name: _copy(entry, keep) for name, entry in value.items()}
        return copies if keep else None
    if isinstance(value, (list, tuple)):
        entries = [_copy(entry, keep) for entry in value]
        return type(value)(entries) if keep else None
    return value
