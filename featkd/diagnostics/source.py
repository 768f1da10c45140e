"""Interface of the feature sources: files of feature maps, or models applied to images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from featkd.runtime.names import printable_lines


@dataclass(frozen=True)
class Layer:
    """A layer of a model.

    Attributes:
        model: "student", "teacher", or "" for a single model or feature files.
        index: index of the layer, from 0.
    """

    model: str
    index: int

    def __str__(self) -> str:
        return f"{self.model} layer {self.index}".strip()


@dataclass
class Chunk:
    """Feature maps of a fixed group of images, which one process computes at once.

    Attributes:
        number: index of the chunk.
        images: (B,) int64 indices of the images that could be read.
        maps: (B, N, D) floating-point maps of each layer.
        left_out: reason for each unreadable image, by name.
    """

    number: int
    images: Tensor
    maps: dict[Layer, Tensor]
    left_out: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """Feature maps of numbered images, in chunks of a fixed size.

    Attributes:
        layers: layers of which each chunk has maps.
        num_images: number of images over all processes.
        chunk_size: images per chunk; the last chunk may have fewer.
        repeatable: the second pass may compute chunks again instead of reading kept features.
        notes: facts that affect how the figures are to be read.
    """

    layers: tuple[Layer, ...]
    num_images: int
    chunk_size: int
    repeatable: bool
    notes: list[str]

    def chunks(self, numbers: Sequence[int]) -> Iterator[Chunk]:
        """Yields the chunks of these indices, in this order."""
        ...

    def name(self, image: int) -> str:
        """Name of an image in messages and tables."""
        ...

    def identity(self) -> dict[str, Any]:
        """Plain values that a state must share with this source to be resumed."""
        ...


def num_chunks(source: Source) -> int:
    return -(-source.num_images // source.chunk_size)


class UnreadableError(RuntimeError):
    """An image or a feature file cannot be used; the message names it and the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(printable_lines(message))


def fingerprint(paths: Sequence[str | Path]) -> str:
    """Hashes names, sizes and modification times of files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        facts = os.stat(path)
        digest.update(os.fsencode(f"{path}\n{facts.st_size}\n{facts.st_mtime_ns}\n"))
    return digest.hexdigest()
