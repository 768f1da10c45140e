"""Reads rows of a cache in the background while the run computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

import torch
from torch import Tensor

_BATCHES = 2

Found = TypeVar("Found")


class ReadAhead(Generic[Found]):
    """Reads the rows of the next two batches ahead, in a thread.

    A batch always gets the rows of its keys, even if another batch was expected.

    Args:
        read: returns the rows of some keys; called by one thread only.
    """

    def __init__(self, read: Callable[[Tensor], Found]) -> None:
        self._read = read
        # Without an OpenMP team of its own; see `featkd.cache.background`.
        self._thread = ThreadPoolExecutor(1, "featkd-cache-ahead", torch.set_num_threads, (1,))
        self._upcoming: Iterator[Tensor] = iter(())
        self._ahead: deque[tuple[Tensor, Future[Found]]] = deque()  # keys and rows

    def prefetch(self, upcoming: Iterator[Tensor]) -> None:
        """Starts reading the batches with these keys, in place of those expected before."""
        for _, rows in self._ahead:
            rows.cancel()
        self._ahead.clear()
        self._upcoming = upcoming
        self._fill()

    def read(self, keys: Tensor) -> Found:
        """Returns the rows of a batch.

        Args:
            keys: (B, 3) int64, as `featkd.data.Batch.keys`.

        Raises:
            CacheError: a row of this batch is damaged; raised here, not when it was read ahead.
        """
        if self._ahead and torch.equal(self._ahead[0][0], keys):
            _, found = self._ahead.popleft()
            self._fill()
        else:
            self.prefetch(iter(()))
            found = self._thread.submit(self._read, keys)
        return found.result()

    def _fill(self) -> None:
        for keys in islice(self._upcoming, _BATCHES - len(self._ahead)):
            self._ahead.append((keys, self._thread.submit(self._read, keys)))
