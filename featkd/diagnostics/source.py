"""Where feature maps come from: files of them, or models that look at images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
    """

    layers: tuple[Layer, ...]
    num_images: int
    chunk_size: int
    repeatable: bool

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


def fingerprint(names: Sequence[str]) -> str:
    """A digest of a list of file names."""
    return hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
