"""Sizes of `feature_distance`'s tiles and launches, from shapes and the GPU alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton


@dataclass(frozen=True)
class Config:
    """Sizes of a tile: image rows, places per row, channels; and its warps."""

    image_rows: int
    places: int
    block: int
    num_warps: int

    def sums(self, channels: int) -> int:
        """Rows of the sums over rows: those of a tile, or one per block of channels."""
        blocks = -(-channels // self.block)
        return self.image_rows * self.places if blocks == 1 else triton.next_power_of_2(blocks)


@lru_cache(maxsize=256)
def config(height: int, width: int, channels: int, itemsize: int) -> Config:
    """Tiles of about 2,048 elements, 16 per thread.

    A thread then has two 16-byte loads of each bf16 map in flight, and three or four programs fit
    a processor: some 24 KB on their way, which is the bandwidth times the latency of an H100.

    Args:
        height, width: image rows and tokens per image row; width 1 if image rows don't matter.
        itemsize: bytes of the accumulators; float64 halves the tiles.
    """
    whole = triton.next_power_of_2(channels)
    places = triton.next_power_of_2(width)
    if places == 1:
        block = whole
        image_rows = max(1, 8192 // itemsize // block)
    else:
        most = min(max(16, whole), 8192 // itemsize // max(16, places))
        # padding costs work, and so does every block: 192 is cut by 64, 384 by 128
        sizes = [size for size in (16, 32, 64, 128) if size <= max(16, most)]
        block = min(sizes, key=lambda size: (-(-channels // size) * (size + 16), -size))
        image_rows = max(1, 16 // places)
    image_rows = min(image_rows, triton.next_power_of_2(height))
    return Config(image_rows, places, block, 8 if image_rows * places * block > 2048 else 4)


@lru_cache(maxsize=256)
def grid(
    chosen: Config,
    images: int,
    height: int,
    width: int,
    resident: int,
    *,
    per_image: bool,
    sums: bool,
) -> tuple[int, ...]:
    """Programs of a launch: at most as many as fit the GPU at once.

    Programs that write sums over rows, a channel vector each, get 16 rows or more: with fewer, the
    sums would be more than a sixth of the traffic.

    Args:
        height, width: as of `config`.
        resident: programs that fit the GPU at once.
        per_image: a mean over each image is formed: returns (images, programs per image).
        sums: gradients of a norm are formed.
    """
    tiles = -(-height // chosen.image_rows)
    rows_allow = max(1, height * width // 16)
    if per_image:  # the fewest rounds of all, times the tiles of a program
        return images, min(
            range(1, min(tiles, rows_allow) + 1),
            key=lambda n: (-(-images * n // resident) * -(-tiles // n), n),
        )
    return (min(resident, images * tiles, images * rows_allow if sums else resident),)
