"""Execution of PTX kernels on the CPU: `Emulator(ptx).launch(...)`."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptx_emulator.arguments import RawAllocation, pack_arguments
from ptx_emulator.build import build
from ptx_emulator.parser import PtxError, parse
from ptx_emulator.reports import TOTALS, Counters, Launch, RawReport, make_report
from ptx_emulator.translate import Kernel, translate

# KiB of shared memory per block, from NVIDIA's table of compute capabilities
SHARED_LIMITS = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227}
_MAX_THREADS = 1024
_BLOCK_LIMITS = (1024, 1024, 64)
_MAX_CLUSTER = 16  # blocks, for kernels that allow sizes which are not portable
_CLUSTER_LIMITS = (_MAX_CLUSTER,) * 3
_GRID_LIMITS = (2**31 - 1, 65535, 65535)


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


class Emulator:
    """A PTX file, translated to C++ and compiled for the CPU.

    Args:
        ptx: PTX text.
        check: report races, uninitialised reads, accesses out of bounds and other faults. Without
            it, a wrong address can crash the process.
        count: fill `Launch.counters`.

    Raises:
        PtxError: the text cannot be read, or its target is not supported.
        UnsupportedInstruction: an instruction is not implemented.
        CompilerError: there is no C++ compiler, or it fails.
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
        """Names of the kernels."""
        return tuple(self.program.kernels)

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
        """Runs a kernel; arrays are read and written in place.

        Args:
            name: name of the kernel in the PTX.
            args: for a pointer a numpy array, a CPU tensor or None (a null pointer); for a
                number a numpy scalar, int or float; for a struct its bytes; for a tensor map a
                `TensorMap`.
            grid: up to three sizes.
            block: up to three sizes.
            shared_bytes: dynamic shared memory per block.
            seed: order in which threads run: 0 is by thread id, any other seed a random order.
                The same seed gives the same results and reports.
            time_limit: seconds after which the launch is stopped and reported.
            outputs: positions in `args` of arrays that the kernel must fill. They are filled with
                0xFF; reading such a byte before it is written, or not writing it, is reported.
            workers: OS threads that share the blocks, by default one per core. Kernels with
                atomics on global memory run on one thread, so that sums have one order.
            cluster: up to three sizes in blocks; by default the size that the kernel requires,
                else 1.

        Raises:
            ValueError: no such kernel, or sizes or shared memory beyond the limits of the chip.
            TypeError: wrong number or type of arguments.
        """
        if name not in self.program.kernels:
            raise ValueError(f"name: no kernel {name!r}; the kernels are {', '.join(self.kernels)}")
        kernel = self.program.kernels[name]
        shape = self._shape(kernel, grid, block, cluster, shared_bytes)
        bad = [i for i in outputs if not 0 <= i < len(args)]
        if bad:
            raise ValueError(f"outputs: no args{bad}; there are {len(args)}")
        packed = pack_arguments(kernel, args, outputs)
        for symbol, size, global_name in self.program.globals:
            function = getattr(self._library, f"{symbol}_address")
            function.restype = ctypes.c_void_p
            packed.allocations.append(RawAllocation(function(), size, 1, False))
            packed.names.append(global_name)
        clusters = math.prod(shape[0]) // math.prod(shape[2])
        if self.program.uses_global_atomics:
            workers = 1
        buffers = [ctypes.create_string_buffer(x, max(16, len(x))) for x in packed.values]
        parameters = (ctypes.c_void_p * max(len(buffers), 1))(*map(ctypes.addressof, buffers))
        count = len(packed.allocations)
        table = (RawAllocation * max(count, 1))(*packed.allocations)
        request = _RawLaunch(
            *((ctypes.c_uint32 * 3)(*sizes) for sizes in shape),
            shared_bytes,
            min(workers or len(os.sched_getaffinity(0)), clusters),
            count,
            seed & (2**64 - 1),
            time_limit,
            ctypes.addressof(parameters),
            ctypes.addressof(table),
        )
        start = getattr(self._library, kernel.function)
        start.argtypes, start.restype = [ctypes.c_void_p], ctypes.c_void_p
        outcome = start(ctypes.addressof(request))
        try:
            return self._outcome(outcome, kernel, packed.names)
        finally:
            self._library.ptx_emulator_free(outcome)

    def _shape(
        self,
        kernel: Kernel,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        cluster: int | Sequence[int] | None,
        shared_bytes: int,
    ) -> tuple[list[int], list[int], list[int]]:
        """Checks the sizes of a launch; returns those of the grid, the block and the cluster."""
        threads = _three_sizes("block", block, _BLOCK_LIMITS)
        if math.prod(threads) > _MAX_THREADS:
            raise ValueError(f"block: {math.prod(threads)} threads, at most {_MAX_THREADS} allowed")
        if kernel.threads and math.prod(kernel.threads) != math.prod(threads):
            raise ValueError(f"block: {kernel.name} requires {kernel.threads}, got {block!r}")
        limit, total = SHARED_LIMITS[self.arch] * 1024, kernel.static_shared + shared_bytes
        if shared_bytes < 0 or total > limit:
            raise ValueError(
                f"shared_bytes: {shared_bytes} and {kernel.static_shared} static bytes; a block "
                f"of sm_{self.arch} may have {limit}"
            )
        blocks = _three_sizes("grid", grid, _GRID_LIMITS)
        return blocks, threads, self._cluster(kernel, cluster, blocks)

    def _cluster(
        self, kernel: Kernel, cluster: int | Sequence[int] | None, grid: list[int]
    ) -> list[int]:
        """Checks the cluster's sizes; returns three."""
        sizes = _three_sizes("cluster", cluster or kernel.cluster or 1, _CLUSTER_LIMITS)
        if math.prod(sizes) > (_MAX_CLUSTER if self.arch >= 90 else 1):
            raise ValueError(
                f"cluster: {sizes} has {math.prod(sizes)} blocks; sm_{self.arch} allows "
                f"{_MAX_CLUSTER if self.arch >= 90 else 1}"
            )
        if kernel.cluster and sizes != _three_sizes("cluster", kernel.cluster, _CLUSTER_LIMITS):
            raise ValueError(f"cluster: {kernel.name} requires {kernel.cluster}, got {cluster!r}")
        if any(blocks % size for blocks, size in zip(grid, sizes, strict=True)):
            raise ValueError(f"grid: {grid} must be a multiple of the cluster {sizes}")
        return sizes

    def _outcome(self, outcome: int, kernel: Kernel, names: list[str]) -> Launch:
        """Reads reports, counters and time of a launch."""
        library = self._library
        sources = {line: str(source) for line, source in self.program.sources.items()}
        found = library.ptx_emulator_reports(outcome)
        reports = tuple(
            make_report(found[i], kernel.name, sources, names)
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


def _three_sizes(name: str, value: int | Sequence[int], limits: Sequence[int]) -> list[int]:
    """Checks an argument of one to three sizes; returns three."""
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
