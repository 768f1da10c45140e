"""Writes shards in a thread, while the teacher computes; on a GPU it also encodes there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import torch
from torch import Tensor

from featkd.cache.manifest import CacheError
from featkd.cache.rows import NotStorable, Row, TeacherOutputs
from featkd.cache.writer import CacheWriter

_AHEAD = 2  # batches or shards that wait; on a GPU, batches hold their outputs in its memory


class BackgroundWriter:
    """Encodes batches, and writes shards in the order in which they are given, in one thread.

    On a GPU the thread also encodes, on another stream, so copies to the CPU overlap with the
    teacher. On a CPU `add` encodes.

    Args:
        writer: writes the shards.
        device: device of the outputs.
    """

    def __init__(self, writer: CacheWriter, device: torch.device) -> None:
        self._writer = writer
        # With an OpenMP team of its own, libgomp would let the threads of both teams sleep at once
        # when they wait, and each parallel operation of the teacher would have to wake them.
        self._thread = ThreadPoolExecutor(1, "featkd-cache-writer", torch.set_num_threads, (1,))
        self._pending: deque[Future[None]] = deque()
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # keys, source index and rows of the shard being filled; used by the thread alone
        self._batches: list[tuple[Tensor, Tensor, list[Row]]] = []
        self.written = 0
        """Shards written."""

    def add(self, keys: Tensor, source_index: Tensor, outputs: TeacherOutputs) -> None:
        """Adds the next batch of the shard; waits while two batches or shards are not done yet.

        Args:
            keys: (B, 3) int64, as `featkd.data.Batch.keys`.
            source_index: (B,) int64, the image that each row was computed from.
            outputs: outputs for the batch; the caller does not change them afterwards.

        Raises:
            CacheError: a batch (on a GPU an earlier one) can't be stored, or an earlier shard not
                written.
        """
        if self._stream is None:
            rows = self._encode(keys, outputs)
            self._submit(lambda: self._batches.append((keys, source_index, rows)))
            return
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        self._submit(lambda: self._encode_on_stream(keys, source_index, outputs, ready))

    def end_shard(self, view: int, shard: int) -> None:
        """Writes the batches added since the last shard; see `CacheWriter.write`.

        Raises:
            CacheError: an earlier batch can't be stored, or an earlier shard not written.
        """
        self._submit(lambda: self._write(view, shard))

    def flush(self) -> None:
        """Waits until everything is written.

        Raises:
            CacheError: a batch can't be stored, or a shard not written.
        """
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Drops what has not begun, and ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _submit(self, work: Callable[[], None]) -> None:
        while len(self._pending) >= _AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(work))

    def _encode_on_stream(
        self, keys: Tensor, source_index: Tensor, outputs: TeacherOutputs, ready: torch.cuda.Event
    ) -> None:
        with torch.cuda.stream(self._stream):
            ready.wait()
            self._batches.append((keys, source_index, self._encode(keys, outputs)))

    def _encode(self, keys: Tensor, outputs: TeacherOutputs) -> list[Row]:
        try:
            return self._writer.manifest.layout.encode(outputs)
        except NotStorable as error:
            epoch, image, copy = keys[error.index].tolist()
            raise CacheError(
                f"image {image}, copy {copy} of view {epoch}: {error.cause}; try another amp"
            ) from error

    def _write(self, view: int, shard: int) -> None:
        keys, source_index, rows = zip(*self._batches, strict=True)
        every = list(chain.from_iterable(rows))
        self._writer.write(view, shard, torch.cat(keys), torch.cat(source_index), every)
        self._batches = []
        self.written += 1
