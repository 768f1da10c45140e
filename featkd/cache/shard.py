"""Shards: rows of a view in one safetensors file, with checksums over every bit.

    keys   (n, 3) int64    epoch, image and copy of each row                \\
    shown  (n,)   int64    image that the row was computed from; differs     | the index
                           from the key's if that one was unreadable         |
    crc    (n,)   int64    CRC-32 of each row's columns                     /
    check  (32,)  uint8    SHA-256 of the file's header and index
    ...                    the columns; if the rows of a column differ in length, it is stored flat
                           and the index has `<column>.ends`, (n,) int64

The length of a file is checked when the cache is opened, header and index when its first row is
read, and each row whenever it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from featkd.cache.manifest import MOST_HEADER_BYTES, CacheError, as_cache_error
from featkd.cache.rows import Row
from featkd.data import SampleKey
from featkd.runtime.files import atomic_write, open_regular

_LENGTH_BYTES = 8  # length of the header, at the start of the file
_DIGEST = 32
_META = "featkd"
_ENDS = ".ends"
_FIXED = ("keys", "shown", "crc")
_MOST_BYTES = 1 << 40


def write_shard(
    path: Path,
    identity: str,
    keys: Tensor,
    source_index: Tensor,
    rows: Sequence[Row],
    varying: Iterable[str] = (),
) -> None:
    """Writes a shard atomically.

    Args:
        path: the file.
        identity: identity of the cache.
        keys: (n, 3) int64, in the order of their positions in the view.
        source_index: (n,) int64, the image that each row was computed from.
        rows: n rows with the same columns.
        varying: columns whose rows differ in shape; they are read back flat.
    """
    names = sorted(rows[0])
    tensors: dict[str, Tensor] = {
        "keys": keys,
        "shown": source_index.clone(),  # may be a view of the keys, which safetensors refuses
        "crc": torch.tensor([_crc(row, names) for row in rows]),
        "check": torch.zeros(_DIGEST, dtype=torch.uint8),
    }
    for name in names:
        parts = [row[name] for row in rows]
        if name in varying:
            tensors[name + _ENDS] = torch.tensor([x.numel() for x in parts]).cumsum(0)
            tensors[name] = torch.cat([x.flatten() for x in parts])
        else:
            tensors[name] = torch.stack(parts)
    # A single metadata entry: safetensors writes several in any order.
    content = memoryview(save(tensors, {_META: identity}))
    start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(bytes(content[_LENGTH_BYTES:start]))
    place = start + _offsets(header["check"])[0]
    with atomic_write(path) as file:
        file.write(content[:place])
        file.write(_digest(content[:start], header, tensors))
        file.write(content[place + _DIGEST :])


class Shard:
    """Opens a shard for reading; memory-mapped, without an open file descriptor.

    Args:
        path: the file.
        identity: identity of the cache that the shard must belong to.
        most: largest size of the file in bytes, see `Manifest.most_shard_bytes`.

    Raises:
        CacheError: it is missing, damaged, too large, no regular file, or belongs to another cache.
    """

    def __init__(self, path: Path, identity: str, most: int = _MOST_BYTES) -> None:
        self.path = path
        with as_cache_error(path):
            with open_regular(path) as file:
                head, header = _checked_header(path, file, most)
            with safe_open(path, "pt") as opened:
                names = [name for name in header if name != "__metadata__"]
                self._tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in names}
            if _bytes(self._tensors["check"]) != _digest(head, header, self._tensors):
                raise CacheError(f"{path}: damaged: header or index do not match their checksum")
            found = header["__metadata__"][_META]
        if found != identity:
            raise CacheError(
                f"{path}: belongs to another cache ({found[:12]}, not {identity[:12]})"
            )
        # NumPy views of the mapped file: faster to index than tensors, smaller than lists.
        self._crc, self._source_index, self._keys = (
            self._tensors[name].numpy() for name in ("crc", "shown", "keys")
        )
        self._ends = {
            name.removesuffix(_ENDS): x.numpy()
            for name, x in self._tensors.items()
            if name.endswith(_ENDS)
        }
        self._columns = sorted(
            name for name in self._tensors if name not in (*_FIXED, "check") and _ENDS not in name
        )

    def __len__(self) -> int:
        return len(self._crc)

    def key(self, number: int) -> SampleKey:
        """Key of row `number`."""
        return SampleKey(*self._keys[number].tolist())

    def source_index(self, number: int) -> int:
        """Image that row `number` was computed from."""
        return int(self._source_index[number])

    def row(self, number: int) -> Row:
        """Returns row `number` as views of the mapped file, after checking it.

        Raises:
            CacheError: it does not match its checksum.
        """
        row = {}
        for name in self._columns:
            if (ends := self._ends.get(name)) is None:
                row[name] = self._tensors[name][number]
            else:
                start = int(ends[number - 1]) if number else 0
                row[name] = self._tensors[name][start : int(ends[number])]
        if _crc(row, self._columns) != self._crc[number]:
            key = self.key(number)
            raise CacheError(
                f"{self.path}: damaged: row {number} (image {key.image}, copy {key.copy} of view "
                f"{key.epoch}) does not match its checksum"
            )
        return row


def find_damage(path: Path, identity: str, keys: Sequence[SampleKey], most: int) -> list[str]:
    """Checks a shard's file and every row; returns error messages, none for an intact file.

    Args:
        path, identity, most: see `Shard`.
        keys: the keys that the rows must have.
    """
    found: list[str] = []
    try:
        shard = Shard(path, identity, most)
        if len(shard) != len(keys):
            raise CacheError(f"{path}: damaged: has {len(shard)} rows, not {len(keys)}")
        for number, key in enumerate(keys):
            if shard.key(number) != key:  # the other rows are misplaced as well
                raise CacheError(f"{path}: damaged: row {number} is {shard.key(number)}, not {key}")
            try:
                shard.row(number)
            except CacheError as error:
                found.append(str(error))
    except CacheError as error:
        found.append(str(error))
    return found


def check_length(path: Path, most: int) -> None:
    """Checks a file's length against its header.

    Raises:
        CacheError: the header can't be read, the length differs or is more than `most`.
    """
    with as_cache_error(path), open_regular(path) as file:
        _checked_header(path, file, most)


def _checked_header(path: Path, file: IO[bytes], most: int) -> tuple[bytes, dict[str, Any]]:
    """Reads the header, and checks the file's size against it; returns its bytes and content."""
    size = os.fstat(file.fileno()).st_size
    if size > most:
        raise CacheError(f"{path}: damaged: has {size} bytes, expected at most {most}")
    head = file.read(_LENGTH_BYTES)
    length = int.from_bytes(head, "little")
    if length > MOST_HEADER_BYTES:
        raise CacheError(
            f"{path}: damaged: a header of {length} bytes, expected at most {MOST_HEADER_BYTES}"
        )
    text = file.read(length)
    header: dict[str, Any] = json.loads(text)
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    end = len(head + text) + max(_offsets(entry)[1] for entry in entries)
    if size != end:
        raise CacheError(f"{path}: damaged: has {size} bytes, expected {end} by its header")
    return head + text, header


def _offsets(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Start and end of a tensor's data; a flipped bit can merge the two numbers."""
    offsets = entry["data_offsets"]
    if not (isinstance(offsets, list) and [type(x) for x in offsets] == [int, int]):
        raise ValueError(f"data_offsets: expected two whole numbers, got {offsets!r}")
    first, last = offsets
    return first, last


def _digest(
    head: bytes | memoryview, header: Iterable[str], tensors: Mapping[str, Tensor]
) -> bytes:
    """SHA-256 of the header and the index, whose tensors are in the header's order."""
    digest = hashlib.sha256(head)
    for name in header:
        if name in _FIXED or name.endswith(_ENDS):
            digest.update(_bytes(tensors[name]))
    return digest.digest()


def _crc(row: Row, names: Iterable[str]) -> int:
    crc = 0
    for name in names:
        crc = zlib.crc32(_bytes(row[name]), crc)
    return crc


def _bytes(x: Tensor) -> memoryview:
    """Bytes of a CPU tensor."""
    content: memoryview = x.contiguous().flatten().view(torch.uint8).numpy().data
    return content
