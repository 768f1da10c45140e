"""Runs PTX kernels on the CPU, with checks and counters: `Emulator(ptx).launch(...)`."""

from __future__ import annotations

import ctypes
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptx_emulator.build import build
from ptx_emulator.parser import PtxError, Variable, parse
from ptx_emulator.reports import TOTALS, Counters, Launch, RawReport, make_report
from ptx_emulator.tensor_map import BYTES as MAP_BYTES
from ptx_emulator.tensor_map import TensorMap
from ptx_emulator.translate import Kernel, translate

# bytes of shared memory a block may have, from NVIDIA's table of compute capabilities
SHARED_LIMITS = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227}
_MOST_THREADS = 1024
_MOST_BLOCKS = 16  # of a cluster, where the kernel allows sizes that are not portable
_GRID_LIMITS = (2**31 - 1, 65535, 65535)


class _RawAllocation(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("granule", ctypes.c_uint32),
        ("poisoned", ctypes.c_uint32),
        ("gaps", ctypes.c_void_p),
    ]
    kept: np.ndarray | None = None  # what `gaps` points to


class _RawLaunch(ctypes.Structure):
    """`LaunchRequest` of runtime/launch.h."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("size", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("allocation_count", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("time_limit", ctypes.c_double),
        ("parameters", ctypes.c_void_p),
        ("allocations", ctypes.c_void_p),
    ]


def _signature(kernel: Kernel) -> str:
    def one(p: Variable) -> str:
        if p.count != 1:
            return f"{p.bytes} bytes {p.name}"
        return f"{'pointer' if p.pointer else p.type} {p.name}"

    return f"{kernel.name}({', '.join(one(p) for p in kernel.parameters)})"


@dataclass(frozen=True)
class _Memory:
    """Where an array lies; `bytes` from its address to the end of the last element."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    item: int

    @property
    def bytes(self) -> int:
        if 0 in self.sizes:
            return 0
        return self.item + sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))

    def poison(self) -> np.ndarray | None:
        """Fill the elements with 0xFF; returns a 2 for each byte between them, None without any."""
        if self.bytes <= math.prod(self.sizes) * self.item:
            ctypes.memset(self.address, 0xFF, self.bytes)
            return None
        gaps = np.full(self.bytes, 2, np.uint8)
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * self.bytes).from_address(self.address))
        for target, value in ((memory, 0xFF), (gaps, 0)):
            shape, strides = (*self.sizes, self.item), (*self.strides, 1)
            np.lib.stride_tricks.as_strided(target, shape, strides)[...] = value
        return gaps


def _memory(value: object, name: str) -> _Memory | None:
    """Where the array lies that argument `name` is; None where it is no array."""
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
    return _Memory(address, sizes, strides, item)


def _scalar(value: Any, parameter: Variable) -> bytes | None:
    """The bytes of a scalar argument; None where it does not fit the parameter."""
    kind, size = parameter.type, parameter.bytes
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


def _triple(name: str, value: int | Sequence[int], limits: Sequence[int]) -> list[int]:
    sizes = list(value) if isinstance(value, Sequence) else [value]
    if not all(isinstance(size, int | np.integer) for size in sizes):
        raise TypeError(f"{name}: expected an int or up to 3 of them, got {value!r}")
    sizes = [int(size) for size in sizes]
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{name}: expected 1 to 3 sizes, got {value!r}")
    sizes += [1] * (3 - len(sizes))
    for size, limit in zip(sizes, limits, strict=True):
        if not 1 <= size <= limit:
            raise ValueError(f"{name}: sizes must be from 1 to {limit}, got {value!r}")
    return sizes


class Emulator:
    """A PTX file, translated and compiled for the CPU.

    Args:
        ptx: PTX text.
        check: look for races, uninitialised reads, out-of-bounds accesses and the like. Without
            it nothing is checked, and a wrong address can crash the process.
        count: fill `Launch.counters`.

    Raises:
        PtxError: the text cannot be read, or its target is newer than the emulator knows.
        UnsupportedInstruction: it holds an instruction that is not implemented.
        CompilerError: there is no C++ compiler.
    """

    def __init__(self, ptx: str, check: bool = True, count: bool = False) -> None:
        module = parse(ptx)
        digits = module.target.removeprefix("sm_").rstrip("af")
        self.arch = int(digits) if digits.isdigit() else 0
        if self.arch not in SHARED_LIMITS:
            known = ", ".join(f"sm_{a}" for a in SHARED_LIMITS)
            raise PtxError(f"target {module.target} is not supported; those that are: {known}")
        self.check, self.count = check, count
        self.program = translate(module)
        self.library: Path = build(self.program.code, check, count)
        self._library = ctypes.CDLL(str(self.library))
        for name, result in (
            ("reports", ctypes.POINTER(RawReport)),
            ("totals", ctypes.POINTER(ctypes.c_uint64)),
            ("executed", ctypes.POINTER(ctypes.c_uint64)),
            ("report_count", ctypes.c_uint32),
            ("seconds", ctypes.c_double),
            ("free", None),
        ):
            function = getattr(self._library, f"ptx_emulator_{name}")
            function.argtypes, function.restype = [ctypes.c_void_p], result

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that can be launched."""
        return tuple(self.program.kernels)

    def _kernel(self, name: str) -> Kernel:
        if name not in self.program.kernels:
            raise ValueError(f"name: no kernel {name!r}; those there: {', '.join(self.kernels)}")
        return self.program.kernels[name]

    def _arguments(
        self, kernel: Kernel, args: Sequence[Any], outputs: Sequence[int]
    ) -> tuple[list[bytes], list[_RawAllocation], dict[int, str]]:
        expected = f"expected {_signature(kernel)}"
        if len(args) != len(kernel.parameters):
            wanted = len(kernel.parameters)
            raise TypeError(f"args: {kernel.name} takes {wanted}, got {len(args)}; {expected}")
        data: list[bytes] = []
        allocations: list[_RawAllocation] = []
        places: dict[int, str] = {}
        filled: dict[int, _Memory] = {}
        for i, (value, parameter) in enumerate(zip(args, kernel.parameters, strict=True)):
            is_map = isinstance(value, TensorMap)
            memory = _memory(value.array if is_map else value, f"args[{i}]")
            if memory is not None:
                if parameter.bytes != (MAP_BYTES if is_map else 8) or parameter.type[0] == "f":
                    takes = "tensor map" if is_map else "array"
                    raise TypeError(f"args[{i}]: {parameter.name} takes no {takes}; {expected}")
                data.append(value.pack() if is_map else struct.pack("<Q", memory.address))
                places[len(allocations)] = f"args[{i}]"
                granule = math.gcd(memory.item, 4)
                if i in outputs:
                    filled[len(allocations)] = memory
                allocations.append(
                    _RawAllocation(memory.address, memory.bytes, granule, i in outputs)
                )
                continue
            if i in outputs:
                raise TypeError(f"outputs: args[{i}] is no array")
            is_null = value is None and parameter.bytes == 8 and parameter.type[0] != "f"
            packed = b"\0" * 8 if is_null else None
            packed = packed or _scalar(value, parameter)
            if packed is None or (parameter.pointer and value is not None):
                got = f"{type(value).__name__} {value!r:.40}"
                raise TypeError(
                    f"args[{i}]: {got} does not fit .{parameter.type} {parameter.name}; {expected}"
                )
            data.append(packed)
        for place, memory in filled.items():
            gaps = memory.poison()
            if gaps is not None:
                allocations[place].kept, allocations[place].gaps = gaps, gaps.ctypes.data
        for name, size, ptx_name in self.program.globals:
            function = getattr(self._library, f"{name}_address")
            function.restype = ctypes.c_void_p
            places[len(allocations)] = ptx_name
            allocations.append(_RawAllocation(function(), size, 1, False))
        return data, allocations, places

    def _cluster(
        self, kernel: Kernel, cluster: int | Sequence[int] | None, grid: list[int]
    ) -> list[int]:
        sizes = _triple("cluster", cluster or kernel.cluster or 1, (_MOST_BLOCKS,) * 3)
        if math.prod(sizes) > (_MOST_BLOCKS if self.arch >= 90 else 1):
            raise ValueError(
                f"cluster: {sizes} has {math.prod(sizes)} blocks; from sm_90 on at most "
                f"{_MOST_BLOCKS} are allowed, before none, and this is sm_{self.arch}"
            )
        if kernel.cluster and sizes != _triple("cluster", kernel.cluster, (_MOST_BLOCKS,) * 3):
            raise ValueError(f"cluster: {kernel.name} requires {kernel.cluster}, got {cluster!r}")
        if any(blocks % size for blocks, size in zip(grid, sizes, strict=True)):
            raise ValueError(f"grid: {grid} is no multiple of the cluster's {sizes}")
        return sizes

    def launch(
        self,
        name: str,
        args: Sequence[Any],
        grid: int | Sequence[int],
        block: int | Sequence[int],
        shared_bytes: int = 0,
        seed: int = 0,
        time_limit: float = 60.0,
        outputs: Sequence[int] = (),
        workers: int | None = None,
        cluster: int | Sequence[int] | None = None,
    ) -> Launch:
        """Run a kernel; arrays are read and written in place.

        Args:
            name: the kernel, as the PTX names it.
            args: for a pointer a numpy array, a CPU tensor or None (a null pointer); for a
                number a numpy scalar, int or float; for a struct its bytes; for a tensor map a
                `TensorMap`.
            grid, block: up to three sizes.
            shared_bytes: dynamic shared memory of a block.
            seed: order in which threads run; 0 is by thread id, any other a random one. Results
                and reports are the same for the same seed.
            time_limit: seconds after which the launch is stopped and reported.
            outputs: positions in `args` of arrays that the kernel must fill: they are overwritten
                with 0xFF bytes, and reading or leaving such a byte is reported.
            workers: OS threads that share the blocks, by default one a core. Kernels with atomics
                on global memory always get one, so that sums come in one order.
            cluster: up to three sizes in blocks; by default what the kernel requires, else 1.

        Raises:
            ValueError: no such kernel; sizes or shared memory beyond the chip's.
            TypeError: wrong number or type of arguments; says the signature.
        """
        kernel = self._kernel(name)
        sizes = _triple("block", block, (1024, 1024, 64))
        if math.prod(sizes) > _MOST_THREADS:
            raise ValueError(f"block: {math.prod(sizes)} threads, at most {_MOST_THREADS} allowed")
        if kernel.threads and math.prod(kernel.threads) != math.prod(sizes):
            raise ValueError(f"block: {name} requires {kernel.threads} threads, got {block!r}")
        blocks = _triple("grid", grid, _GRID_LIMITS)
        clusters = self._cluster(kernel, cluster, blocks)
        limit, total = SHARED_LIMITS[self.arch] * 1024, kernel.static_shared + shared_bytes
        if shared_bytes < 0 or total > limit:
            raise ValueError(
                f"shared_bytes: {shared_bytes} and {kernel.static_shared} static bytes; a block "
                f"of sm_{self.arch} may have {limit}"
            )
        bad = [i for i in outputs if not 0 <= i < len(args)]
        if bad:
            raise ValueError(f"outputs: no args{bad}; there are {len(args)}")
        data, allocations, places = self._arguments(kernel, args, outputs)
        cores = workers or len(os.sched_getaffinity(0))
        if self.program.uses_global_atomics:
            cores = 1
        buffers = [ctypes.create_string_buffer(x, max(16, len(x))) for x in data]
        parameters = (ctypes.c_void_p * max(len(buffers), 1))(*map(ctypes.addressof, buffers))
        table = (_RawAllocation * max(len(allocations), 1))(*allocations)
        request = _RawLaunch(
            (ctypes.c_uint32 * 3)(*blocks),
            (ctypes.c_uint32 * 3)(*sizes),
            (ctypes.c_uint32 * 3)(*clusters),
            shared_bytes,
            min(cores, math.prod(blocks) // math.prod(clusters)),
            len(allocations),
            seed & (2**64 - 1),
            time_limit,
            ctypes.addressof(parameters),
            ctypes.addressof(table),
        )
        start = getattr(self._library, kernel.function)
        start.argtypes, start.restype = [ctypes.c_void_p], ctypes.c_void_p
        outcome = start(ctypes.addressof(request))
        try:
            return self._outcome(outcome, kernel, places)
        finally:
            self._library.ptx_emulator_free(outcome)

    def _outcome(self, outcome: int, kernel: Kernel, places: dict[int, str]) -> Launch:
        library = self._library
        sources = {line: str(source) for line, source in self.program.sources.items()}
        found = library.ptx_emulator_reports(outcome)
        reports = tuple(
            make_report(found[i], kernel.name, sources, places)
            for i in range(library.ptx_emulator_report_count(outcome))
        )
        counters = None
        if self.count:
            totals = library.ptx_emulator_totals(outcome)
            executed = library.ptx_emulator_executed(outcome)
            instructions: dict[str, int] = {}
            flops: dict[str, int] = {}
            for i, (kind, each) in enumerate(self.program.classes):
                instructions[kind] = instructions.get(kind, 0) + executed[i]
                if each:
                    flops[kind] = flops.get(kind, 0) + each * executed[i]
            named = {name: int(totals[i]) for i, name in enumerate(TOTALS)}
            counters = Counters(instructions, flops, **named)
        return Launch(library.ptx_emulator_seconds(outcome), reports, counters)
