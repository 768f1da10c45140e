"""Reads rows of a cache by key, and verifies whole caches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featkd.cache.manifest import CacheError, read_manifest
from featkd.cache.rows import Row, TeacherOutputs
from featkd.cache.shard import Shard, check_length, find_damage
from featkd.data import SampleKey
from featkd.models.features import Layer

_OPEN_SHARDS = 4096  # memory maps; Linux allows 65,530 per process
_MOST_READERS = 8
_CACHED_ORDERS = 2  # of the present epoch and the next

_Positions = np.ndarray[Any, np.dtype[np.int64]]


class TeacherCache:
    """Reads a teacher's outputs for the keys of a run's batches.

    The length of every needed file is checked when the cache is opened. A file is opened when its
    first row is read, and every row is checked each time it is read.

    Args:
        folder: folder that `featkd cache` wrote.
        views: number of views needed, from the first; default, or if there are fewer: all.

    Raises:
        CacheError: there is no cache, its manifest is damaged, or shards of the needed views are
            missing or truncated.
    """

    def __init__(self, folder: Path, views: int | None = None) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        needed = min(views or self.manifest.views, self.manifest.views)
        if missing := list(self._missing(needed)):
            raise CacheError(
                f"{folder}: {len(missing)} of the {needed * self.manifest.shards} shards of views "
                f"0 to {needed - 1} are missing, such as {missing[0]}; run the same featkd cache "
                "command again to complete the cache"
            )
        self._identity = self.manifest.identity
        self._sampler = self.manifest.sampler()
        self._order = lru_cache(_CACHED_ORDERS)(self._inverse_order)
        self._shard = lru_cache(_OPEN_SHARDS)(self._open_shard)
        # Checksums and page faults release the interpreter lock.
        self._readers = min(_MOST_READERS, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(self._readers, "featkd-cache")
        files = product(range(needed), range(self.manifest.shards))
        for _ in self._threads.map(lambda file: check_length(*self._file(*file)), files):
            pass

    def read(
        self,
        keys: Tensor,
        layers: Sequence[Layer],
        device: torch.device | str = "cpu",
    ) -> tuple[TeacherOutputs, Tensor]:
        """Reads the teacher's outputs for some samples.

        Args:
            keys: (B, 3) int64, as `featkd.data.Batch.keys`.
            layers: teacher layers whose maps are returned.
            device: device of the outputs.

        Returns:
            Logits (B, K) and one map per layer (see `Layout.decode`); and (B,) int64 on the CPU,
            the number of the image that each row was computed from. It differs from the key's
            image if that one could not be read when the cache was made.

        Raises:
            CacheError: a key belongs to no view of this cache, or its row is damaged.
        """
        places = [self._place(SampleKey(*key)) for key in keys.tolist()]
        parts = [places[first :: self._readers] for first in range(self._readers)]
        found = list(self._threads.map(_read, parts)) if self._readers > 1 else [_read(places)]
        rows = [found[i % self._readers][i // self._readers] for i in range(len(places))]
        source_index = torch.tensor([shard.source_index(offset) for shard, offset in places])
        return self.manifest.layout.decode(rows, layers, device), source_index

    def _missing(self, views: int) -> Iterator[str]:
        """Yields the names of missing shards; lists each folder once."""
        for view in range(views):
            names = [self.manifest.shard_name(view, n) for n in range(self.manifest.shards)]
            folder = (self.folder / names[0]).parent
            existing = set(os.listdir(folder)) if folder.is_dir() else set()
            yield from (name for name in names if name.rpartition("/")[2] not in existing)

    def _place(self, key: SampleKey) -> tuple[Shard, int]:
        """Returns the shard that holds a key's row, and the row's number in it."""
        number, offset = divmod(self._position(key), self.manifest.shard_rows)
        shard = self._shard(key.epoch, number)
        if shard.key(offset) != key:
            raise CacheError(f"{shard.path}: row {offset} is {shard.key(offset)}, not {key}")
        return shard, offset

    def _position(self, key: SampleKey) -> int:
        """Position of a key's row within its view."""
        manifest = self.manifest
        if 0 <= key.epoch < manifest.views and 0 <= key.image < manifest.images:
            position = int(self._order(key.epoch)[key.image]) * manifest.repeats + key.copy
            if 0 <= key.copy < manifest.repeats and position < manifest.rows:
                return position
        raise CacheError(
            f"{self.folder}: holds no row of {key}; it has views 0 to {manifest.views - 1} of "
            f"{manifest.rows} rows, of {manifest.images} images in {manifest.repeats} copies"
        )

    def _inverse_order(self, view: int) -> _Positions:
        """Place of each image in the order of a view."""
        order = self._sampler.order(view)
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return inverse

    def _file(self, view: int, number: int) -> tuple[Path, int]:
        """Path of a shard, and the upper bound of its size."""
        path = self.folder / self.manifest.shard_name(view, number)
        return path, self.manifest.most_shard_bytes(number)

    def _open_shard(self, view: int, number: int) -> Shard:
        path, most = self._file(view, number)
        shard = Shard(path, self._identity, most)
        if len(shard) != (rows := len(self.manifest.positions(number))):
            raise CacheError(f"{path}: damaged: has {len(shard)} rows, not {rows}")
        return shard


def verify_cache(folder: Path) -> Iterator[str | None]:
    """Checks every row of a cache; yields an error message or None for each shard.

    Raises:
        CacheError: there is no cache, or its manifest is damaged.
    """
    manifest = read_manifest(folder)
    shards = range(manifest.shards)
    for view in range(manifest.views):
        for number, keys in zip(shards, manifest.keys(view, shards), strict=True):
            path = folder / manifest.shard_name(view, number)
            most = manifest.most_shard_bytes(number)
            if path.exists():
                yield "\n".join(find_damage(path, manifest.identity, keys, most)) or None
            else:
                yield f"{path}: missing"


def _read(places: Sequence[tuple[Shard, int]]) -> list[Row]:
    return [shard.row(offset) for shard, offset in places]
