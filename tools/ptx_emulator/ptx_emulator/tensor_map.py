"""Tensor maps of the emulator, in place of those that `cuTensorMapEncodeTiled` makes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

BYTES = 128
_MAGIC = 0x70616D74  # kTensorMagic of runtime/tensor.h


@dataclass(frozen=True)
class TensorMap:
    """A kernel argument that describes an array in global memory to `cp.async.bulk.tensor`.

    Args:
        array: numpy array or CPU tensor of 1 to 5 dimensions, the last one contiguous.
        box: size of the part that one copy moves, one number per dimension.
        swizzle: row bytes of the swizzle pattern in shared memory: 0 (none), 32, 64 or 128.

    Raises:
        ValueError: arguments that the driver refuses too.
    """

    array: Any
    box: tuple[int, ...]
    swizzle: int = 0

    def __post_init__(self) -> None:
        _, sizes, strides, item = self.geometry
        if not 1 <= len(sizes) <= 5 or len(self.box) != len(sizes):
            raise ValueError(f"box: expected 1 to 5 sizes as the array has, got {self.box}")
        if strides[-1] != item or any(s % 16 for s in strides[:-1]):
            raise ValueError(
                "array: the last dimension must be contiguous and the other strides multiples of "
                f"16 bytes, got strides of {strides} bytes"
            )
        if any(not 1 <= b <= 256 for b in self.box) or self.box[-1] * item % 16:
            raise ValueError(
                f"box: sizes must be from 1 to 256 and a row a multiple of 16 bytes, got {self.box}"
            )
        if self.swizzle not in (0, 32, 64, 128) or 0 < self.swizzle < self.box[-1] * item:
            raise ValueError(
                f"swizzle: expected 0, 32, 64 or 128, and at least the "
                f"{self.box[-1] * item} bytes of a row of the box, got {self.swizzle}"
            )

    @property
    def geometry(self) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
        """Address, sizes, strides in bytes, bytes of an element."""
        if isinstance(self.array, np.ndarray):
            item = self.array.itemsize
            return self.array.ctypes.data, self.array.shape, self.array.strides, item
        if not isinstance(self.array, torch.Tensor):
            raise TypeError(f"array: expected an array or tensor, got {type(self.array).__name__}")
        item = self.array.element_size()
        strides = tuple(s * item for s in self.array.stride())
        return self.array.data_ptr(), tuple(self.array.shape), strides, item

    def pack(self) -> bytes:
        """Returns the bytes of `TensorMap` in runtime/tensor.h, innermost dimension first."""
        address, sizes, strides, item = self.geometry

        def five(values: tuple[int, ...]) -> list[int]:
            return [*values[::-1], *[1] * (5 - len(values))]

        numbers = [address, len(sizes), item, *five(sizes), *five(strides), *five(self.box)]
        return struct.pack("<QII5Q5Q5III4x", *numbers, self.swizzle, _MAGIC)
