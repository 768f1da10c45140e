"""A shard: some rows of a view in one safetensors file, in which no changed bit goes unseen.

    keys   (n, 3) int64    the epoch, image and copy of each row          \\
    shown  (n,)   int64    the image that it is of: another than its       | the index
                           key's where that one could not be read          |
    crc    (n,)   int64    CRC-32 of each row's columns                   /
    check  (32,)  uint8    SHA-256 of the file's header and its index
    ...                    the columns; one whose rows differ in length is flat, and the index has
                           `<column>.ends`, (n,) int64

A file is checked in three steps: its length when the cache is opened, its header and index when its
first row is asked for, each row when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from featkd.cache.manifest import CacheError
from featkd.cache.rows import Row
from featkd.data import Key
from featkd.runtime.files import atomic_write

_HEAD = 8  # bytes that say how long the header is
_DIGEST = 32
_META = "featkd"
_ENDS = ".ends"
_FIXED = ("keys", "shown", "crc")


def write_shard(
    path: Path,
    identity: str,
    keys: Tensor,
    shown: Tensor,
    rows: Sequence[Row],
    varying: Iterable[str] = (),
) -> None:
    """Write a shard whole.

    Args:
        path: the file.
        identity: of the cache.
        keys: (n, 3) int64.
        shown: (n,) int64, the image that each row is of.
        rows: as many, with the same columns.
        varying: columns whose rows differ in shape; they are read back flat.
    """
    names = sorted(rows[0])
    tensors: dict[str, Tensor] = {
        "keys": keys,
        "shown": shown.clone(),  # which may be a view of the keys, of which safetensors wants none
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
    # One word: safetensors writes several in any order.
    content = memoryview(save(tensors, {_META: identity}))
    header, start = _header(path, content)
    place = start + _offsets(header["check"])[0]
    index = b"".join(content[start + first : start + last] for first, last in _index(header))
    with atomic_write(path) as file:
        file.write(content[:place])
        file.write(_digest(content[:start], index))
        file.write(content[place + _DIGEST :])


class Shard:
    """A shard that is open for reading: memory-mapped, without a file descriptor.

    Args:
        path: the file.
        identity: of the cache it has to belong to.

    Raises:
        CacheError: it is missing, damaged, or of another cache.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        with _refusing(path):
            self._check(path)
            with safe_open(path, "pt") as file:
                found, names = file.metadata()[_META], list(file.keys())
                self._tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
        if found != identity:
            raise CacheError(
                f"{path}: belongs to another cache ({found[:12]}, not {identity[:12]})"
            )
        # Arrays: an element of a tensor takes microseconds, and lists of numbers half a megabyte a
        # shard. These are the mapped file itself.
        self._crc, self._shown, self._keys = (
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

    @property
    def nbytes(self) -> int:
        """Of the columns."""
        return sum(self._tensors[name].nbytes for name in self._columns)

    def key(self, number: int) -> Key:
        """Of row `number`."""
        return Key(*self._keys[number].tolist())

    def shown(self, number: int) -> int:
        """The image that row `number` is of."""
        return int(self._shown[number])

    def row(self, number: int) -> Row:
        """Row `number`, checked, as views of the mapped file.

        Raises:
            CacheError: it does not have its checksum.
        """
        row = {name: self._part(name, number) for name in self._columns}
        if _crc(row, self._columns) != self._crc[number]:
            key = self.key(number)
            raise CacheError(
                f"{self.path}: damaged: row {number} (image {key.image}, copy {key.copy} of view "
                f"{key.epoch}) does not have its checksum"
            )
        return row

    def damages(self, keys: Sequence[Key]) -> Iterator[str]:
        """Check every row; a message for each that is not as it was written.

        Args:
            keys: those that its rows have to have.
        """
        if len(self) != len(keys):
            yield f"{self.path}: damaged: has {len(self)} rows, not {len(keys)}"
            return
        for number, key in enumerate(keys):
            if self.key(number) != key:  # and so, no doubt, are the others
                yield f"{self.path}: damaged: row {number} is {self.key(number)}, not {key}"
                return
            try:
                self.row(number)
            except CacheError as error:
                yield str(error)

    @staticmethod
    def _check(path: Path) -> None:
        """Raise CacheError unless length, header and index are as they were written."""
        with path.open("rb") as file:
            head, header, start, size = _whole_header(path, file)

            def read(first: int, last: int) -> bytes:
                file.seek(start + first)
                return file.read(min(last - first, size))

            index = b"".join(read(first, last) for first, last in _index(header))
            if read(*_offsets(header["check"])) != _digest(head, index):
                raise CacheError(f"{path}: damaged: header or index do not have their checksum")

    def _part(self, name: str, number: int) -> Tensor:
        values = self._tensors[name]
        ends = self._ends.get(name)
        if ends is None:
            return values[number]
        return values[int(ends[number - 1]) if number else 0 : int(ends[number])]


def damages_of(path: Path, identity: str, keys: Sequence[Key]) -> list[str]:
    """What is wrong with a shard's file, every row of which is read; nothing where it is whole."""
    try:
        return list(Shard(path, identity).damages(keys))
    except CacheError as error:
        return [str(error)]


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Whatever a damaged or absent file makes of its reading is a CacheError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, SafetensorError) as error:
        raise CacheError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    except OSError as error:
        raise CacheError(f"{path}: can't be read: {error}") from error


def check_length(path: Path) -> None:
    """Read a shard's header alone.

    Raises:
        CacheError: it can't be read, or the file's length is another than it says.
    """
    with _refusing(path), path.open("rb") as file:
        _whole_header(path, file)


def _whole_header(path: Path, file: BinaryIO) -> tuple[bytes, dict[str, Any], int, int]:
    """The first bytes, what they say, where the data begin, and the file's length, which fits."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(_HEAD)
    head += file.read(min(int.from_bytes(head, "little"), size))
    header, start = _header(path, memoryview(head))
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    end = start + max(_offsets(entry)[1] for entry in entries)
    if size != end:
        raise CacheError(f"{path}: damaged: has {size} bytes, its header says {end}")
    return head, header, start, size


def _header(path: Path, content: memoryview) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data begin."""
    start = _HEAD + int.from_bytes(content[:_HEAD], "little")
    try:
        header = json.loads(bytes(content[_HEAD:start]))
    except ValueError as error:
        raise CacheError(f"{path}: damaged: its header can't be read: {error}") from error
    if len(content) < start or not isinstance(header, dict):
        raise CacheError(f"{path}: damaged: cut off within its header")
    return header, start


def _index(header: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Where the index's tensors are in the data."""
    names = [name for name in header if name in _FIXED or name.endswith(_ENDS)]
    return [_offsets(header[name]) for name in names]


def _offsets(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Where a tensor's data begin and end; a flipped bit can make one number of the two."""
    offsets = entry["data_offsets"]
    if not (isinstance(offsets, list) and [type(x) for x in offsets] == [int, int]):
        raise ValueError(f"data_offsets: expected two whole numbers, got {offsets!r}")
    first, last = offsets
    return first, last


def _digest(head: bytes | memoryview, index: bytes) -> bytes:
    return hashlib.sha256(bytes(head) + index).digest()


def _crc(row: Row, names: Iterable[str]) -> int:
    crc = 0
    for name in names:
        crc = zlib.crc32(_bytes(row[name]), crc)
    return crc


def _bytes(x: Tensor) -> memoryview:
    """The content of a tensor on the CPU."""
    content: memoryview = x.contiguous().flatten().view(torch.uint8).numpy().data
    return content
