"""Names of the images of a set: their compact storage, and the split that they decide."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np


class PackedNames:
    """Sequence of file names, stored in one bytes object.

    Forked workers share it. A list of a million strings would be copied into each worker, page by
    page, as its reference counts change.
    """

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._joined = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._joined[start : self._ends[index]])


def is_held_out(name: str, fraction: float) -> bool:
    """Checks if an image belongs to the validation images that are split off a training split.

    Only the image's own name counts, so an image stays on its side when others are added.

    Args:
        name: name of the image, relative to the split folder.
        fraction: expected share of the validation images.
    """
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
