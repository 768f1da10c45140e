"""Base of the image storages: numbered images with compactly stored names, and held-out images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np

from featkd.data.config import DataConfig
from featkd.runtime.names import printable


class ImageSource:
    """Storage of numbered images with classes; picklable.

    The names are one bytes object, which forked workers share. A list of a million strings would be
    copied into each worker, page by page, as its reference counts change.

    Args:
        folder: folder of the files.
        classes: class names, which targets index; empty without labels, and targets are 0.
        names: names of the images, relative to the folder.
    """

    def __init__(self, folder: str, classes: list[str], names: Sequence[str]) -> None:
        self.folder = folder
        self.classes = classes
        encoded = [os.fsencode(name) for name in names]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        """Returns the name of image `index`, 0 <= index < len(self), as errors print it."""
        start, end = self._ends[index : index + 2]
        return os.path.join(self.folder, os.fsdecode(self._names[start:end]))

    def file_size(self, index: int) -> int:
        """Returns the size of the image's file in bytes, -1 if the file is missing."""
        raise NotImplementedError

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the content of the image's file, and its class index.

        Raises:
            BadImageError: the file cannot be read.
        """
        raise NotImplementedError


def in_split(
    names: Sequence[str], config: DataConfig, split: Literal["train", "val"], folder: str
) -> list[int]:
    """Returns the positions of the images on the split's side of data.val_fraction, if it is used.

    A hash of each name decides, so an image stays on its side when others are added.

    Args:
        names: names of the images, relative to the folder.
        config: the image set.
        split: "train" or "val".
        folder: the split folder.

    Raises:
        ValueError: no image is left.
    """
    if (fraction := config.held_out) is None:
        return list(range(len(names)))
    training = split == "train"
    kept = [i for i, name in enumerate(names) if _is_held_out(name, fraction) != training]
    if not kept:
        raise ValueError(
            f"data.val_fraction: {fraction:g} leaves no image of the {len(names)} in "
            f"{printable(folder)}; use a {'smaller' if training else 'larger'} fraction, or "
            "folders for both splits"
        )
    return kept


def _is_held_out(name: str, fraction: float) -> bool:
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
