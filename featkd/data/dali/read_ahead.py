"""Files of an epoch, read ahead in threads, and the batches that the DALI pipeline holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from featkd.data.dali.files import load, load_decodable
from featkd.data.images import BadImageError
from featkd.data.imageset import DATA_ERRORS, DataError, ImageSet, Sample
from featkd.data.loader import NO_IMAGES, RawBatch, raw_batch
from featkd.data.sampler import SampleKey

_BATCHES_AHEAD = 2
_FILES_PER_TASK = 8  # handing over a task takes about as long as checking a file


# keys, samples of consecutive keys, and whether Pillow decodes all files
_PendingBatch = tuple[list[SampleKey], list[Future[list[Sample]]], bool]


class FedBatch(NamedTuple):
    """A batch that the pipeline holds.

    Attributes:
        batch: the batch, without its images.
        requested: the keys requested for the empty batches before it, and for this batch.
        decodable: whether Pillow has decoded all its files.
    """

    batch: RawBatch
    requested: list[list[SampleKey]]
    decodable: bool


class EpochReader:
    """Iterates over the batches of an epoch that have a readable image.

    Args:
        dataset: the images.
        batches: the keys of each batch.
        threads: number of reading threads.

    Attributes:
        fed: the batches that were returned, oldest first; the caller removes those that the
            pipeline no longer holds.
        requested: keys of the empty batches since the last returned batch.
        errors: unreadable files met in them.
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

    def __iter__(self) -> Iterator[list[Sample]]:
        return self

    def __next__(self) -> list[Sample]:
        """Returns the readable samples of the next batch, with `File`s, and adds it to `fed`."""
        while True:
            while self.failure is None and len(self._pending) <= _BATCHES_AHEAD:
                if (keys := next(self._batches, None)) is None:
                    break
                self._pending.append(self._submit(keys))
            if not self._pending:
                raise StopIteration
            keys, parts, decodable = self._pending.popleft()
            try:
                samples = [sample for part in parts for sample in part.result()]
            except DATA_ERRORS as error:
                self.failure = error
                self._pending.clear()
                raise StopIteration from error
            self.requested.append(keys)
            self.errors += [error for sample in samples for error in sample.bad]
            if present := [sample for sample in samples if sample.image is not None]:
                batch = raw_batch(NO_IMAGES, present, self.errors, len(self.requested))
                self.fed.append(FedBatch(batch, self.requested, decodable))
                self.requested, self.errors = [], []
                return present

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
        decoder = load_decodable if check else load

        def read(part: list[SampleKey]) -> list[Sample]:
            return [self._dataset.decode(key, decoder) for key in part]

        size = max(1, min(_FILES_PER_TASK, len(keys) // self._count))
        parts = [keys[start : start + size] for start in range(0, len(keys), size)]
        return keys, [self._threads.submit(read, part) for part in parts], check
