"""Size of a cache, estimated before it is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from featkd.cache.manifest import Manifest
from featkd.cache.rows import Layout, TeacherOutputs

_INDEX_BYTES = 40  # per row of a shard: key, image and checksum
_ENDS_BYTES = 8  # per row and column that differs in length
_HEADER_BYTES = 400  # per shard, roughly
_COLUMN_BYTES = 80  # per shard and column, roughly


class CacheSize(NamedTuple):
    """Estimated size of a cache.

    Attributes:
        total: bytes of all shards.
        per_row: bytes per row.
        at_most: True for an upper bound, False for an estimate.
    """

    total: int
    per_row: int
    at_most: bool

    def describe(self, folder: Path) -> str:
        """Returns the size in words, beside the free space of the disk of `folder`."""
        there = next(x for x in (folder.absolute(), *folder.absolute().parents) if x.exists())
        free = shutil.disk_usage(there).free
        text = (
            f"{'at most' if self.at_most else 'about'} {as_size(self.total)}, "
            f"{as_size(self.per_row)} per row; {as_size(free)} free in {there}"
        )
        return text if self.total <= free else f"{text}, which may not suffice"


def estimate_size(manifest: Manifest, outputs: TeacherOutputs | None = None) -> CacheSize:
    """Estimates the size of a cache from the teacher's outputs for some images.

    Args:
        manifest: manifest of the cache.
        outputs: outputs for a batch. None takes noise in their place; this gives the exact size of
            rows of a fixed size, and an upper bound for maps stored up to a share of their energy.
    """
    layout = manifest.layout
    rows = layout.encode(_noise(layout) if outputs is None else outputs)
    columns = sum(x.numel() * x.element_size() for row in rows for x in row.values())
    per_row = columns // len(rows) + _INDEX_BYTES + _ENDS_BYTES * len(layout.varying)
    shards = manifest.views * manifest.shards
    header = _HEADER_BYTES + _COLUMN_BYTES * (len(rows[0]) + len(layout.varying))
    total = manifest.views * manifest.rows * per_row + shards * header
    return CacheSize(total, per_row, at_most=outputs is None and layout.energy is not None)


def _noise(layout: Layout) -> TeacherOutputs:
    generator = torch.Generator().manual_seed(0)

    def draw(dtype: str, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, dtype))

    maps = [draw(x.dtype, 1, x.tokens, x.channels) for x in layout.layers]
    return TeacherOutputs(draw(layout.logits_dtype, 1, layout.classes), maps)


def as_size(count: int) -> str:
    """Returns a number of bytes in words, for example "98.3 GB"."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"
