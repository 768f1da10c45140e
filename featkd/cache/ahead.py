"""Rows read while the run computes: `ReadAhead`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

_BATCHES = 2

Found = TypeVar("Found")


class _Ahead(NamedTuple, Generic[Found]):
    keys: Tensor
    rows: Future[Found]


class ReadAhead(Generic[Found]):
    """What a cache says of a run's batches; that of the next ones is read in a thread.

    Every batch gets the rows of its own keys, whatever was expected.

    Args:
        read: the rows of some keys; only one thread calls it.
    """

    def __init__(self, read: Callable[[Tensor], Found]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, "featkd-cache-ahead")
        self._upcoming: Iterator[Tensor] = iter(())
        self._ahead: deque[_Ahead[Found]] = deque()

    def follow(self, upcoming: Iterator[Tensor]) -> None:
        """Expect batches of these keys from now on, and of no other; begin to read them."""
        for batch in self._ahead:
            batch.rows.cancel()
        self._ahead.clear()
        self._upcoming = upcoming
        self._go_on()

    def rows(self, keys: Tensor) -> Found:
        """The rows of a batch.

        Args:
            keys: (B, 3) int64, as `featkd.data.Batch.keys`.

        Raises:
            CacheError: of this batch's rows, however early they were read.
        """
        if self._ahead and torch.equal(self._ahead[0].keys, keys):
            found = self._ahead.popleft().rows
            self._go_on()
        else:
            self.follow(iter(()))
            found = self._thread.submit(self._read, keys)
        return found.result()

    def _go_on(self) -> None:
        for keys in islice(self._upcoming, _BATCHES - len(self._ahead)):
            self._ahead.append(_Ahead(keys, self._thread.submit(self._read, keys)))
