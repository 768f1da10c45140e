"""Results of a launch: reports of faults, counters, time."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

# in the order of ReportKind in runtime/thread.h
KINDS = (
    "shared-race",
    "global-race",
    "block-race",
    "uninitialised-read",
    "out-of-bounds",
    "misaligned",
    "divergent-barrier",
    "deadlock",
    "missing-async-wait",
    "unwritten-output",
    "time-limit",
    "trap",
    "warp-mismatch",
    "stack-overflow",
    "cluster-exit",
    "invalid-mbarrier",
    "missing-fence",
    "invalid-tensor-map",
)
_SPACES = ("global", "shared", "local", "")
_MEANING = {
    "shared-race": "two threads access the same shared memory, at least one writes, and no barrier "
    "orders them",
    "global-race": "two threads of a block access the same global memory, at least one writes, and "
    "no barrier orders them",
    "block-race": "two blocks access the same global memory, and at least one writes",
    "uninitialised-read": "reads memory that was never written",
    "out-of-bounds": "accesses memory outside of every allocation",
    "misaligned": "the address is not a multiple of the access size",
    "divergent-barrier": "threads of the block meet a barrier at different lines, or some have "
    "exited",
    "deadlock": "no thread of the block can continue",
    "missing-async-wait": "accesses memory or registers of an asynchronous operation without "
    "waiting for it",
    "unwritten-output": "the launch did not write all bytes of this output",
    "time-limit": "the launch was stopped at the time limit",
    "trap": "a trap or a failed device assertion",
    "warp-mismatch": "the lanes of a warp disagree on a warp operation: different lines, a lane "
    "outside of the mask, or an incomplete warp",
    "stack-overflow": "local memory is exhausted: recursion is not supported",
    "cluster-exit": "accesses the shared memory of another block of the cluster, which may exit "
    "before",
    "invalid-mbarrier": "the mbarrier is not initialised, is initialised twice or with count 0, or "
    "gets more arrivals than expected",
    "invalid-tensor-map": "the tensor map is invalid or has another number of dimensions",
    "missing-fence": "an asynchronous operation reads what ordinary instructions wrote, without "
    "fence.proxy.async (shared memory) or wgmma.fence (registers) between them",
}


class RawReport(ctypes.Structure):
    """`Report` of runtime/machine.h."""

    _fields_ = [
        ("kind", ctypes.c_uint32),
        ("space", ctypes.c_uint32),
        ("line", ctypes.c_uint32),
        ("other_line", ctypes.c_uint32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_int32),
        ("other", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("argument", ctypes.c_int32),
        ("unused", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class Report:
    """A fault; of those of one kind at the same lines, the first in block order.

    Attributes:
        kind: one of `KINDS`.
        kernel: the kernel's name.
        line: PTX line, or 0.
        source: source line, or "" if the PTX does not name it.
        other_line: PTX line of the access that it conflicts with, or 0.
        other_source: source line of that access, or "".
        block: x, y and z of the block.
        threads: ids, in their blocks, of the threads; empty for "block-race".
        rank: rank of the second thread's block in the cluster, None if it is the same block.
        count: number of times the fault was found.
        message: all of this as text.
    """

    kind: str
    kernel: str
    line: int
    source: str
    other_line: int
    other_source: str
    block: tuple[int, int, int]
    threads: tuple[int, ...]
    rank: int | None
    count: int
    message: str

    def __str__(self) -> str:
        return self.message


def make_report(raw: RawReport, kernel: str, sources: dict[int, str], names: list[str]) -> Report:
    """Converts a report of the runtime.

    Args:
        sources: source line of each PTX line.
        names: name of each allocation.
    """
    kind = KINDS[raw.kind]
    source, other_source = sources.get(raw.line, ""), sources.get(raw.other_line, "")
    block: tuple[int, int, int] = (raw.block[0], raw.block[1], raw.block[2])
    threads = tuple(t for t in (raw.thread, raw.other) if t >= 0) if kind != "block-race" else ()
    parts = [f"{kind} in {kernel}: {_MEANING[kind]}"]
    if raw.line:
        parts.append(f"PTX line {raw.line}" + (f" ({source})" if source else ""))
    if raw.other_line:
        text = f"with PTX line {raw.other_line}" + (f" ({other_source})" if other_source else "")
        parts.append(text)
    if kind == "block-race":
        parts.append(f"block {block} and block number {raw.other}")
    elif kind != "unwritten-output":
        parts.append(f"block {block}")
    if threads:
        parts.append("threads " + " and ".join(str(t) for t in threads))
    rank = raw.rank if raw.rank >= 0 else None
    if rank is not None:
        parts[-1] += f" of block {rank} of the cluster"
    space = _SPACES[raw.space]
    if raw.argument >= 0:
        parts.append(f"{raw.bytes} bytes at offset {raw.offset} of {names[raw.argument]}")
    elif space:
        parts.append(f"{raw.bytes} bytes at {space} address {raw.offset:#x}")
    parts.append(f"found {raw.count} times")
    return Report(
        kind,
        kernel,
        raw.line,
        source,
        raw.other_line,
        other_source,
        block,
        threads,
        rank,
        raw.count,
        "; ".join(parts),
    )


# in the order of Total in runtime/machine.h
TOTALS = (
    "global_read_bytes",
    "global_write_bytes",
    "global_read_sectors",
    "global_write_sectors",
    "global_read_requests",
    "global_write_requests",
    "shared_requests",
    "shared_wavefronts",
    "shared_conflicts",
    "barriers",
    "warp_syncs",
    "atomics",
    "local_read_bytes",
    "local_write_bytes",
    "distinct_read_bytes",
    "distinct_write_bytes",
)


@dataclass(frozen=True)
class Counters:
    """Exact counts of a launch.

    Attributes:
        instructions: executed thread instructions by class ("memory", "fma.f32", "mma.bf16", ...).
        flops: floating-point operations by class; an fma is two, a matrix product 2 M N K.
        global_read_bytes, global_write_bytes: bytes requested by threads.
        global_read_sectors, global_write_sectors: 32-byte sectors of each warp access.
        global_read_requests, global_write_requests: warp accesses.
        shared_requests: warp accesses of shared memory.
        shared_wavefronts: passes that these accesses take over 32 banks of 4 bytes.
        shared_conflicts: passes caused by bank conflicts.
        barriers, warp_syncs: completed block barriers and `bar.warp.sync`s.
        atomics: atomic operations of threads.
        local_read_bytes, local_write_bytes: traffic of local memory.
        distinct_read_bytes, distinct_write_bytes: different bytes of global memory: the least
            possible traffic.
    """

    instructions: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    global_read_bytes: int = 0
    global_write_bytes: int = 0
    global_read_sectors: int = 0
    global_write_sectors: int = 0
    global_read_requests: int = 0
    global_write_requests: int = 0
    shared_requests: int = 0
    shared_wavefronts: int = 0
    shared_conflicts: int = 0
    barriers: int = 0
    warp_syncs: int = 0
    atomics: int = 0
    local_read_bytes: int = 0
    local_write_bytes: int = 0
    distinct_read_bytes: int = 0
    distinct_write_bytes: int = 0

    @property
    def read_efficiency(self) -> float:
        """Share of the bytes in the read sectors that threads requested."""
        return self.global_read_bytes / max(32 * self.global_read_sectors, 1)

    @property
    def write_efficiency(self) -> float:
        """Share of the bytes in the written sectors that threads requested."""
        return self.global_write_bytes / max(32 * self.global_write_sectors, 1)


@dataclass(frozen=True)
class Launch:
    """The outcome of a launch.

    Attributes:
        seconds: run time.
        reports: faults that were found.
        counters: counts, or None if counting is off.
    """

    seconds: float
    reports: tuple[Report, ...]
    counters: Counters | None
