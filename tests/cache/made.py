"""A small cache of random outputs, without a teacher."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from featkd.cache import CacheWriter, LayerShape, Layout, Manifest, TeacherOutputs
from featkd.cache.writer import lock_folder, prepare_folder
from featkd.data.loader import as_tensor

TOKENS, CHANNELS, CLASSES = 6, 5, 4
SHAPE = LayerShape(1, TOKENS, CHANNELS, "float32")
FULL = Layout(CLASSES, "float32", None, "full", None, None, "fp32", (SHAPE,))
LOWRANK = Layout(CLASSES, "float32", 2, "lowrank", 0.9, None, "int8", (SHAPE,))


def outputs(count: int, seed: int = 0) -> TeacherOutputs:
    """Random logits, and maps of several ranks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, TOKENS, CHANNELS, generator=generator)
    x *= 8.0 ** -(torch.arange(CHANNELS) * torch.arange(count)[:, None, None] % 7)
    return TeacherOutputs(torch.randn(count, CLASSES, generator=generator), [x])


def manifest(layout: Layout, views: int = 2, images: int = 20, repeats: int = 1) -> Manifest:
    subject = {"data.images": images, "seed": 3, "data.augment.repeats": repeats, "of": "made"}
    return Manifest(subject, "weights", 2, layout, images, 8, 4, views)


def write(folder: Path, head: Manifest, seed: int = 0) -> TeacherOutputs:
    """Writes a whole cache; returns its outputs, view by view in the order of the rows."""
    stored = outputs(head.views * head.rows, seed)
    rows = head.layout.encode(stored)
    with lock_folder(folder):
        prepare_folder(folder, head)
        writer = CacheWriter(folder, head)
        for view in range(head.views):
            keys = keys_of(head, view)
            for shard in range(head.shards):
                positions = head.positions(shard)
                at = slice(positions.start, positions.stop)
                own = rows[view * head.rows :][at]
                writer.write(view, shard, keys[at], keys[at, 1], own)
    return stored


def keys_of(head: Manifest, view: int) -> torch.Tensor:
    sampler = head.sampler()
    sampler.set_epoch(view)
    return as_tensor(list(sampler))


def column_of(shard: bytes | bytearray, name: str) -> int:
    """Offset of a column in a shard's file."""
    start = 8 + int.from_bytes(shard[:8], "little")
    offset: int = json.loads(shard[8:start])[name]["data_offsets"][0]
    return start + offset


@contextmanager
def two_threads() -> Iterator[None]:
    """Lets torch use two OpenMP threads in this thread and in new ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)
