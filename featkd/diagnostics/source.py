"""Where feature maps come from: files of them, or models that look at images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A stream of maps: whose, and which layer (from 0)."""

    model: str
    index: int

    def __str__(self) -> str:
        return f"{self.model} layer {self.index}".strip()


@dataclass
class Chunk:
    """Some images' maps; a chunk is what is computed at once, whichever process does it.

    Attributes:
        number: which chunk.
        images: (B,) int64 indices of those that could be read.
        maps: for each layer (B, N, D), floating.
        bad: what is wrong with the others, by name.
    """

    number: int
    images: Tensor
    maps: dict[Layer, Tensor]
    bad: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """Feature maps of numbered images, in chunks of a fixed size.

    Attributes:
        layers: what each chunk has maps of.
        num_images: images in all, over all processes.
        chunk_size: images in a chunk; the last one can have fewer.
        repeatable: whether chunks can be made again rather than be kept.
        notes: what a reader of the figures must know.
    """

    layers: tuple[Layer, ...]
    num_images: int
    chunk_size: int
    repeatable: bool
    notes: list[str]

    def chunks(self, numbers: Sequence[int]) -> Iterator[Chunk]:
        """The chunks of these numbers, in this order."""
        ...

    def name(self, image: int) -> str:
        """What to call an image in a message."""
        ...

    def identity(self) -> dict[str, Any]:
        """What a state that goes on with this source must agree with; plain values."""
        ...


def num_chunks(source: Source) -> int:
    return -(-source.num_images // source.chunk_size)


class UnreadableError(RuntimeError):
    """An image or a feature file can't be used; names it and says why."""


def fingerprint(paths: Sequence[str | Path]) -> str:
    """A digest of files' names, sizes and times of change."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        facts = os.stat(path)
        digest.update(f"{path}\n{facts.st_size}\n{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def evenly(count: int, limit: int | None) -> list[int]:
    """At most `limit` of the numbers below `count`, evenly: files are sorted by class."""
    if limit is None or limit >= count:
        return list(range(count))
    return [position * count // limit for position in range(limit)]
