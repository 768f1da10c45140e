"""Arguments of a launch: arrays, scalars and tensor maps as the runtime reads them."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ptx_emulator.parser import Variable
from ptx_emulator.tensor_map import BYTES as TENSOR_MAP_BYTES
from ptx_emulator.tensor_map import TensorMap
from ptx_emulator.translate import Kernel


class RawAllocation(ctypes.Structure):
    """`Allocation` of runtime/machine.h."""

    _fields_ = [
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("granule", ctypes.c_uint32),
        ("is_output", ctypes.c_uint32),
        ("gaps", ctypes.c_void_p),
    ]
    gap_array: np.ndarray | None = None  # keeps the memory of `gaps` alive


@dataclass(frozen=True)
class ArrayMemory:
    """Location of an array in memory; sizes in elements, strides in bytes."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    item: int

    @property
    def bytes(self) -> int:
        """Bytes from the first element to the end of the last one."""
        if 0 in self.sizes:
            return 0
        return self.item + sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))

    def poison(self) -> np.ndarray | None:
        """Fills the elements with 0xFF.

        Returns:
            For each byte 2 if it lies between the elements, else 0; None if no byte does.
        """
        if self.bytes <= math.prod(self.sizes) * self.item:
            ctypes.memset(self.address, 0xFF, self.bytes)
            return None
        gaps = np.full(self.bytes, 2, np.uint8)
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * self.bytes).from_address(self.address))
        for target, value in ((memory, 0xFF), (gaps, 0)):
            shape, strides = (*self.sizes, self.item), (*self.strides, 1)
            np.lib.stride_tricks.as_strided(target, shape, strides)[...] = value
        return gaps


@dataclass(frozen=True)
class PackedArguments:
    """The arguments of a launch.

    Attributes:
        values: bytes of each parameter.
        allocations: memory of the arrays.
        names: name of each allocation in reports.
    """

    values: list[bytes]
    allocations: list[RawAllocation]
    names: list[str]


def signature(kernel: Kernel) -> str:
    """Returns a kernel's name and the types and names of its parameters."""

    def one(p: Variable) -> str:
        if p.count != 1:
            return f"{p.bytes} bytes {p.name}"
        return f"{'pointer' if p.pointer else p.type} {p.name}"

    return f"{kernel.name}({', '.join(one(p) for p in kernel.parameters)})"


def pack_arguments(kernel: Kernel, args: Sequence[Any], outputs: Sequence[int]) -> PackedArguments:
    """Packs the arguments of a launch, and fills the output arrays with 0xFF.

    Args:
        outputs: positions of the output arrays.

    Raises:
        TypeError: wrong number or type of arguments.
        ValueError: an array has negative strides.
    """
    expected = f"expected {signature(kernel)}"
    if len(args) != len(kernel.parameters):
        wanted = len(kernel.parameters)
        raise TypeError(f"args: {kernel.name} takes {wanted}, got {len(args)}; {expected}")
    packed = PackedArguments([], [], [])
    output_arrays: list[tuple[RawAllocation, ArrayMemory]] = []
    for i, (value, parameter) in enumerate(zip(args, kernel.parameters, strict=True)):
        is_map = isinstance(value, TensorMap)
        memory = _array_memory(value.array if is_map else value, f"args[{i}]")
        if memory is None:
            if i in outputs:
                raise TypeError(f"outputs: args[{i}] is no array")
            scalar = _scalar_bytes(value, parameter)
            if scalar is None:
                got = f"{type(value).__name__} {value!r:.40}"
                raise TypeError(
                    f"args[{i}]: {got} does not fit .{parameter.type} {parameter.name}; {expected}"
                )
            packed.values.append(scalar)
            continue
        if parameter.bytes != (TENSOR_MAP_BYTES if is_map else 8) or parameter.type[0] == "f":
            takes = "tensor map" if is_map else "array"
            raise TypeError(f"args[{i}]: {parameter.name} takes no {takes}; {expected}")
        packed.values.append(value.pack() if is_map else struct.pack("<Q", memory.address))
        granule = math.gcd(memory.item, 4)
        allocation = RawAllocation(memory.address, memory.bytes, granule, i in outputs)
        packed.allocations.append(allocation)
        packed.names.append(f"args[{i}]")
        if i in outputs:
            output_arrays.append((allocation, memory))
    for allocation, memory in output_arrays:  # last: a wrong argument must leave them unchanged
        gaps = memory.poison()
        if gaps is not None:
            allocation.gap_array, allocation.gaps = gaps, gaps.ctypes.data
    return packed


def _array_memory(value: object, name: str) -> ArrayMemory | None:
    """Returns the location of an array argument, or None if the argument is no array."""
    if isinstance(value, np.ndarray):
        sizes, strides, item = value.shape, value.strides, value.itemsize
        address = value.ctypes.data
    elif isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise TypeError(f"{name}: tensors must be on the CPU, got one on {value.device}")
        item, sizes = value.element_size(), tuple(value.shape)
        strides, address = tuple(s * item for s in value.stride()), value.data_ptr()
    else:
        return None
    if any(s < 0 for s in strides):
        raise ValueError(f"{name}: arrays must not have negative strides, got {strides} bytes")
    return ArrayMemory(address, sizes, strides, item)


def _scalar_bytes(value: Any, parameter: Variable) -> bytes | None:
    """Returns the bytes of a scalar argument, or None if it does not fit the parameter."""
    kind, size = parameter.type, parameter.bytes
    if value is None:
        return b"\0" * 8 if size == 8 and not kind.startswith("f") else None
    if parameter.pointer:
        return None
    if isinstance(value, bytes):
        return value if len(value) == size else None
    if isinstance(value, np.generic) and value.nbytes == size:
        # untyped parameters and structs take any bytes
        same_kind = kind.startswith("f") == isinstance(value, np.floating)
        return value.tobytes() if same_kind or kind.startswith("b") else None
    if parameter.count != 1 or isinstance(value, np.generic):
        return None
    if isinstance(value, bool | int):
        if kind.startswith("f"):
            return None
        low, high = -(2 ** (8 * size - 1)), 2 ** (8 * size)
        return (int(value) % high).to_bytes(size, "little") if low <= value < high else None
    if isinstance(value, float):
        code = {"f32": "<f", "f64": "<d", "b32": "<f", "b64": "<d"}.get(kind)
        return struct.pack(code, value) if code else None
    return None
