"""Bulk copies between global and shared memory, and between the blocks of a cluster."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from ptx_emulator import Emulator
from ptx_text import SHARED, kernel, together

# 64 threads; 256 bytes of data, then an mbarrier (%r10), and at 512 a copy of the data
START = (
    SHARED
    + """add.u32 %r10, %r4, 256;
add.u32 %r11, %r4, 512;
setp.eq.u32 %p1, %r0, 0;
ld.param.u64 %rd2, [b];
@%p1 mbarrier.init.shared.b64 [%r10], 1;
fence.mbarrier_init.release.cluster;
SYNC
"""
)
BLOCK, CLUSTER = "bar.sync 0;", "barrier.cluster.arrive;\nbarrier.cluster.wait;"
LOCAL = START.replace("SYNC", BLOCK)
ON = "mbarrier::complete_tx::bytes"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r10], 256;\n"
LOAD = f"@%p1 cp.async.bulk.shared::cluster.global.{ON} [%r4], [%rd2], 256, [%r10];\n"
WAIT = "LOOP:\nmbarrier.try_wait.parity.shared.b64 %p2, [%r10], 0;\n@!%p2 bra LOOP;\n"
READ = "ld.shared.u32 %r7, [%r3];\nst.global.u32 [%rd1], %r7;\n"
IN = LOCAL + "cp.async.bulk.prefetch.L2.global [%rd2], 256;\n" + EXPECT + LOAD + WAIT + READ
FENCE, BARRIER = "fence.proxy.async.shared::cta;\n", "bar.sync 0;\n"
STORE = "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r4], 256;\n"
COMMIT, DONE = "cp.async.bulk.commit_group;\n", "cp.async.bulk.wait_group 0;\n"
OUT = SHARED + "setp.eq.u32 %p1, %r0, 0;\nst.shared.u32 [%r3], %r1;\n"
OUT += FENCE + BARRIER + STORE + COMMIT + DONE
REUSE = OUT.replace(DONE, "cp.async.bulk.wait_group.read 0;\n" + BARRIER)
REUSE += "st.shared.u32 [%r2], 9;\n" + DONE
# each block loads half of the data for both blocks
MULTICAST = (
    START.replace("SYNC", CLUSTER)
    + EXPECT
    + f"""mov.u32 %r12, %cluster_ctarank;
shl.b32 %r13, %r12, 7;
add.u32 %r14, %r4, %r13;
cvt.u64.u32 %rd3, %r13;
add.s64 %rd3, %rd2, %rd3;
mov.u16 %h1, 3;
@%p1 cp.async.bulk.shared::cluster.global.{ON}.multicast::cluster [%r14], [%rd3], 128, [%r10], %h1;
"""
    + WAIT
)
OWN = """mad.lo.u32 %r15, %r12, 256, %r1;
cvt.u64.u32 %rd4, %r15;
add.s64 %rd4, %rd0, %rd4;
ld.shared.u32 %r7, [%r3];
st.global.u32 [%rd4], %r7;
"""
SWAP = (
    START.replace("SYNC", CLUSTER)
    + EXPECT
    + f"""mov.u32 %r12, %cluster_ctarank;
mad.lo.u32 %r16, %r12, 1000, %r0;
st.shared.u32 [%r2], %r16;
{FENCE}{BARRIER}xor.b32 %r13, %r12, 1;
add.u32 %r14, %r4, 512;
mapa.shared::cluster.u32 %r14, %r14, %r13;
getctarank.shared::cluster.u32 %r15, %r14;
setp.ne.u32 %p5, %r15, %r13;
@%p5 trap;
mapa.shared::cluster.u32 %r15, %r10, %r13;
@%p1 cp.async.bulk.shared::cluster.shared::cta.{ON} [%r14], [%r4], 256, [%r15];
"""
    + WAIT
    + OWN.replace("[%r3]", "[%r3+512]")
)
LEAVE = CLUSTER + "\n"
REMOTE = SHARED + "mov.u32 %r12, %cluster_ctarank;\nxor.b32 %r12, %r12, 1;\n"
REMOTE += "mapa.shared::cluster.u32 %r13, %r2, %r12;\nst.shared::cluster.u32 [%r13], %r0;\n"


@dataclass(frozen=True)
class Case:
    """A kernel; its report and those that may follow, or the values that it writes to `a`."""

    name: str
    body: str
    kinds: tuple[str, ...] = ()
    want: np.ndarray | None = None
    cluster: int = 1


def case(name: str, body: str, *kinds: str, **more) -> Case:
    return Case(name, body, kinds, **more)


T = np.arange(64)
B = 3 * np.arange(68) + 1
LOADED = B[:64][::-1]
HALVES = np.concatenate([LOADED, LOADED])
EXCHANGED = np.concatenate([1000 + T[::-1], T[::-1]])
CASES = [
    case("in", IN, want=LOADED),
    case(
        "not waited for",
        IN.replace(WAIT, ""),
        "missing-async-wait",
        "shared-race",
        "uninitialised-read",
    ),
    case("bytes miscounted", IN.replace("[%r10], 256", "[%r10], 272"), "deadlock"),
    case(
        "no sync after init",
        IN.replace(BLOCK, ""),
        "shared-race",
        "invalid-mbarrier",
        "uninitialised-read",
    ),
    case(
        "target still in use",
        IN.replace(EXPECT, "st.shared.u32 [%r2], 5;\n" + EXPECT),
        "shared-race",
    ),
    case(
        "target free",
        IN.replace(EXPECT, "st.shared.u32 [%r2], 5;\n" + BARRIER + EXPECT),
        want=LOADED,
    ),
    case("past the end", IN.replace("[%rd2], 256", "[%rd2+32], 256"), "out-of-bounds", "deadlock"),
    case("misaligned", IN.replace("[%rd2], 256", "[%rd2+4], 256"), "misaligned"),
    case("out", OUT, want=4 * T[::-1]),
    case("out without a fence", OUT.replace(FENCE, ""), "missing-fence"),
    case(
        "out without a barrier",
        OUT.replace(BARRIER, ""),
        "shared-race",
        "uninitialised-read",
        "missing-fence",
    ),
    case("out without a wait", OUT.replace(DONE, ""), "missing-async-wait"),
    case("source used again", REUSE, want=4 * T[::-1]),
    case(
        "source used too early",
        REUSE.replace("cp.async.bulk.wait_group.read 0;\n", ""),
        "missing-async-wait",
        "shared-race",
    ),
    case("multicast", MULTICAST + OWN + LEAVE, want=HALVES, cluster=2),
    case("between blocks", SWAP + LEAVE, want=EXCHANGED, cluster=2),
    case("leaving while others write here", REMOTE, "cluster-exit", cluster=2),
    case("leaving once they have written", REMOTE + LEAVE, want=np.zeros(128), cluster=2),
    case(
        "between blocks without a fence",
        SWAP.replace(FENCE, "") + LEAVE,
        "missing-fence",
        cluster=2,
    ),
]


def text() -> str:
    two = ".param .u64 a, .param .u64 b"
    files = (kernel(c.body, two, shared=1024, name=f"k{i}") for i, c in enumerate(CASES))
    return together(*files).replace("sm_80", "sm_90")


@pytest.fixture(scope="module")
def emulator():
    return Emulator(text(), count=True)


def aligned(values: np.ndarray) -> np.ndarray:
    memory = np.zeros(4 * len(values) + 16, np.uint8)
    start = -memory.ctypes.data % 16
    found = memory[start : start + 4 * len(values)].view(np.uint32)
    found[:] = values
    return found


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_copy(emulator, c):
    for seed in range(3):
        a, b = aligned(np.zeros(64 * c.cluster)), aligned(B)
        launch = emulator.launch(
            *(f"k{CASES.index(c)}", [a, b], c.cluster, 64), seed=seed, cluster=c.cluster
        )
        found = {r.kind for r in launch.reports}
        assert found <= set(c.kinds), [str(r) for r in launch.reports]
        assert c.kinds[0] in found if c.kinds else (a == c.want).all()


def test_bulk_traffic_is_counted(emulator):
    counters = emulator.launch("k0", [aligned(np.zeros(64)), aligned(B)], 1, 64).counters
    assert counters.global_read_bytes == counters.distinct_read_bytes == 256
    assert counters.global_read_requests == 1
