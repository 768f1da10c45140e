"""Files of an epoch, read ahead in threads, and the batches that the DALI pipeline holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from featkd.data.dali.files import File, load, load_decodable
from featkd.data.images import BadImageError
from featkd.data.imageset import DATA_ERRORS, DataError, ImageSet, Sample
from featkd.data.sampler import SampleKey

_BATCHES_AHEAD = 2
_FILES_PER_TASK = 8  # handing over a task takes about as long as checking a file


class FedBatch(NamedTuple):
    """A batch that the pipeline holds.

    Attributes:
        samples: samples of the batch, without their files.
        errors: unreadable files met for this batch and for the empty batches before it.
        requested: the keys requested for the empty batches before it, and for this batch.
        decodable: whether Pillow has decoded all its files.
    """

    samples: list[Sample]
    errors: list[BadImageError]
    requested: list[list[SampleKey]]
    decodable: bool


class _PendingBatch(NamedTuple):
    keys: list[SampleKey]
    samples: list[Future[list[Sample]]]  # of consecutive keys
    decodable: bool


class EpochReader:
    """Iterates over the batches of an epoch: samples with `File`s, and their `decodable` flag.

    Args:
        dataset: the images.
        batches: the keys of each batch.
        threads: number of reading threads.

    Attributes:
        fed: batches that the pipeline holds, oldest first; filled by the caller.
        requested: keys of the empty batches since the last fed batch; filled by the caller.
        errors: unreadable files met in them; filled by the caller.
        failure: the error that ended the epoch early, to be raised after the preceding batches.
    """

    def __init__(self, dataset: ImageSet, batches: Iterator[Any], threads: int) -> None:
        self.fed: deque[FedBatch] = deque()
        self.requested: list[list[SampleKey]] = []
        self.errors: list[BadImageError] = []
        self.failure: DataError | None = None
        self._dataset = dataset
        self._batches = batches
        self._count = max(threads, 1)
        self._threads = ThreadPoolExecutor(self._count, "featkd-read")
        self._pending: deque[_PendingBatch] = deque()

    def __iter__(self) -> Iterator[tuple[list[Sample], bool]]:
        return self

    def __next__(self) -> tuple[list[Sample], bool]:
        while self.failure is None and len(self._pending) <= _BATCHES_AHEAD:
            if (keys := next(self._batches, None)) is None:
                break
            self._pending.append(self._submit(keys))
        if not self._pending:
            raise StopIteration
        _, parts, decodable = self._pending.popleft()
        try:
            return [sample for part in parts for sample in part.result()], decodable
        except DATA_ERRORS as error:
            self.failure = error
            self._pending.clear()
            raise StopIteration from error

    def retry_fed(self) -> None:
        """Puts the batches that the pipeline held back in front, each file checked with Pillow."""
        held = [keys for fed in self.fed for keys in fed.requested] + self.requested
        retries = [self._submit(keys, check=True) for keys in held]
        self._pending.extendleft(reversed(retries))
        self.fed.clear()
        self.requested, self.errors = [], []

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _submit(self, keys: list[SampleKey], *, check: bool = False) -> _PendingBatch:
        read = partial(self._read, decoder=load_decodable if check else load)
        size = max(1, min(_FILES_PER_TASK, len(keys) // self._count))
        parts = [keys[start : start + size] for start in range(0, len(keys), size)]
        return _PendingBatch(keys, [self._threads.submit(read, part) for part in parts], check)

    def _read(self, keys: list[SampleKey], decoder: Callable[[bytes, str], File]) -> list[Sample]:
        return [self._dataset.decode(key, decoder) for key in keys]
