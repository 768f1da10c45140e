"""What a launch hands back: reports of faults, counters, time."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

# the order is that of ReportKind in runtime/machine.h
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
    "shared-race": "two threads touch the same shared memory, one of them writes, and no barrier "
    "lies between",
    "global-race": "two threads of a block touch the same global memory, one of them writes, and "
    "no barrier lies between",
    "block-race": "two blocks touch the same global memory and one of them writes",
    "uninitialised-read": "reads what nothing has written",
    "out-of-bounds": "outside of every allocation",
    "misaligned": "the address is no multiple of the access size",
    "divergent-barrier": "threads of the block meet a barrier at different places, or some have "
    "exited",
    "deadlock": "no thread of the block can go on",
    "missing-async-wait": "touches what an asynchronous operation uses, before it was waited for",
    "unwritten-output": "the launch ended with bytes of this output never written",
    "time-limit": "still running at the time limit; the launch was stopped",
    "trap": "a trap or a failed device assertion",
    "warp-mismatch": "lanes of a warp disagree on a warp-wide operation: another line, a lane "
    "outside of the mask, or less than a whole warp",
    "stack-overflow": "recursion, which is not supported",
    "cluster-exit": "touches the shared memory of a block of the cluster, and nothing makes that "
    "block wait before it ends",
    "invalid-mbarrier": "no mbarrier was initialised here, or it is initialised twice or with "
    "count 0, or it gets more arrivals than it expects",
    "invalid-tensor-map": "a tensor copy whose map is none, or has another number of dimensions",
    "missing-fence": "an asynchronous operation uses what ordinary instructions wrote, and no "
    "fence.proxy.async (shared memory) or wgmma.fence (registers) lies between",
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
    """A fault; the first of its kind at its lines, in the order of blocks.

    Attributes:
        kind: one of `KINDS`.
        kernel: the kernel's name.
        line, other_line: PTX lines of the access and of the one it meets; 0 where there is none.
        source, other_source: the source lines behind them, "" where the PTX names none.
        block: x, y, z of the block.
        threads: linear ids in the block of the threads concerned; for "block-race" none.
        rank: the second thread's block in the cluster, None where it is the same block.
        count: how often it was found.
        message: all of this in words.
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


def make_report(
    raw: RawReport, kernel: str, sources: dict[int, str], places: dict[int, str]
) -> Report:
    """A raw report in words; `places` names each allocation."""
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
        parts.append(f"{raw.bytes} bytes at offset {raw.offset} of {places[raw.argument]}")
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


# the order is that of Total in runtime/machine.h
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
        instructions: executions by a thread, by class ("memory", "fma.f32", "mma.bf16", ...).
        flops: floating-point operations by class; an fma is two, a matrix product 2 M N K.
        global_read_bytes, global_write_bytes: bytes that threads asked for.
        global_read_sectors, global_write_sectors: 32-byte sectors, once a warp access.
        global_read_requests, global_write_requests: warp accesses.
        shared_requests, shared_wavefronts, shared_conflicts: warp accesses, the passes they take
            over 32 banks of 4 bytes, and those passes beyond the least possible.
        barriers, warp_syncs: completed block barriers and `bar.warp.sync`s.
        atomics: atomic operations by a thread.
        local_read_bytes, local_write_bytes: local memory traffic.
        distinct_read_bytes, distinct_write_bytes: different bytes of global memory touched: the
            floor of the traffic.
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
        """Share of the bytes of the read sectors that threads asked for."""
        return self.global_read_bytes / max(32 * self.global_read_sectors, 1)

    @property
    def write_efficiency(self) -> float:
        """Share of the bytes of the written sectors that threads asked for."""
        return self.global_write_bytes / max(32 * self.global_write_sectors, 1)


@dataclass(frozen=True)
class Launch:
    """The outcome of a launch: run time, faults (None found: empty), counts where asked for."""

    seconds: float
    reports: tuple[Report, ...]
    counters: Counters | None
