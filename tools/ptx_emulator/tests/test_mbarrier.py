"""mbarriers: phases, the order that they give, faults; and further instructions of sm_90."""

from __future__ import annotations

import numpy as np
import pytest

from ptx_emulator import Emulator
from ptx_text import SHARED, kernel, together
from test_checks import Fault, faults

# the mbarrier follows 256 bytes of data; %r10 is its address, thread 0 initialises it
BARRIER = SHARED + "add.u32 %r10, %r4, 256;\nsetp.eq.u32 %p1, %r0, 0;\n"
INIT = BARRIER + "@%p1 mbarrier.init.shared.b64 [%r10], COUNT;\nbar.sync 0;\n"
WAIT = "LOOP:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], PARITY;\n@!%p2 bra LOOP;\n"
ARRIVE = "mbarrier.arrive.shared::cta.b64 %rd5, [%r10];\n"
READ = "ld.shared.u32 %r7, [%r3];\nst.global.u32 [%rd1], %r7;"
START = INIT.replace("COUNT", "64") + "st.shared.u32 [%r2], %r0;\n"
ALL = START + ARRIVE + WAIT.replace("PARITY", "0") + READ
EARLY = INIT.replace("COUNT", "64") + ARRIVE + "st.shared.u32 [%r2], %r0;\n"
EARLY += WAIT.replace("PARITY", "0") + READ
# warp 0 waits for the writes of warp 1
ONE_WAY = INIT.replace("COUNT", "32") + "setp.ge.u32 %p3, %r0, 32;\n@%p3 bra WRITE;\n"
ONE_WAY += WAIT.replace("PARITY", "0") + READ + "\nbra END;\nWRITE:\nst.shared.u32 [%r2], %r0;\n"
ONE_WAY += "@@\nEND:\n"
TWO = """TWO:
mbarrier.test_wait.parity.shared.b64 %p2, [%r10], 1;
@!%p2 bra TWO;
"""
# a warp writes the same elements twice: the second phase tells that they were read
RING = (
    INIT.replace("COUNT", "64")
    + """setp.ge.u32 %p3, %r0, 32;
and.b32 %r5, %r1, 127;
add.u32 %r5, %r5, %r4;
@%p3 st.shared.u32 [%r5], %r0;
mbarrier.arrive.shared::cta.b64 %rd5, [%r10];
ONE:
mbarrier.try_wait.shared::cta.b64 %p2, [%r10], %rd5;
@!%p2 bra ONE;
@!%p3 ld.shared.u32 %r7, [%r5];
mbarrier.arrive.release.cta.shared::cta.b64 %rd5, [%r10];
@@
@%p3 st.shared.u32 [%r5], %r1;
@!%p3 st.global.u32 [%rd1], %r7;
"""
)
COPY_START = (
    INIT.replace("COUNT", "64")
    + """shl.b32 %r5, %r0, 2;
add.u32 %r5, %r5, %r4;
cp.async.ca.shared.global [%r5], [%rd1], 4;
"""
)
COPY = COPY_START + "@@\n" + WAIT.replace("PARITY", "0") + READ.replace("%r3", "%r5")
TRACKED = "cp.async.mbarrier.arrive.noinc.shared.b64 [%r10];"
# a copy of thread 0 that begins after the mbarrier tracks its copies
LATER = COPY_START + TRACKED + "\n@%p1 cp.async.ca.shared.global [%r10+8], [%rd1], 4;\n"
LATER += WAIT.replace("PARITY", "0") + "@@\n@%p1 ld.shared.u32 %r7, [%r10+8];"

TABLE = [
    faults(
        "no sync after init",
        "shared-race",
        BARRIER + "@%p1 mbarrier.init.shared.b64 [%r10], 64;\n@@\n@!%p1 " + ARRIVE,
        "bar.warp.sync -1;",
        "bar.sync 0;",
    ),
    faults(
        "no init",
        "invalid-mbarrier",
        BARRIER + "@@\nbar.sync 0;\n" + ARRIVE,
        "",
        "@%p1 mbarrier.init.shared.b64 [%r10], 64;",
    ),
    faults(
        "init twice",
        "invalid-mbarrier",
        INIT.replace("COUNT", "64") + "@@\n@%p1 mbarrier.init.shared.b64 [%r10], 64;",
        "",
        "@%p1 mbarrier.inval.shared.b64 [%r10];",
    ),
    faults(
        "used after inval",
        "invalid-mbarrier",
        INIT.replace("COUNT", "64") + "@@\nbar.sync 0;\n" + ARRIVE,
        "@%p1 mbarrier.inval.shared.b64 [%r10];",
        "",
    ),
    faults(
        "more arrivals than expected",
        "invalid-mbarrier",
        INIT.replace("COUNT", "64") + "@%p1 mbarrier.arrive.shared.b64 %rd5, [%r10], @@;",
        "65",
        "64",
    ),
    faults(
        "an arrival completes the phase in spite of noComplete",
        "invalid-mbarrier",
        INIT.replace("COUNT", "2") + "@%p1 mbarrier.arrive.noComplete.shared.b64 %rd5, [%r10], @@;",
        "2",
        "1",
    ),
    faults(
        "reads before the phase is over",
        "shared-race",
        START + ARRIVE + "@@\n" + READ,
        "",
        WAIT.replace("PARITY", "0"),
    ),
    Fault(
        "waits for the phase before",
        {"shared-race", "deadlock"},  # a later wait is for the next phase
        ALL.replace("[%r10], 0", "[%r10], 1"),
        ALL,
    ),
    faults(
        "relaxed arrival",
        "shared-race",
        ALL.replace("arrive.shared", "arrive.@@.cta.shared"),
        "relaxed",
        "release",
    ),
    faults(
        "relaxed wait",
        "shared-race",
        ALL.replace("parity.shared", "parity.@@.cta.shared"),
        "relaxed",
        "acquire",
    ),
    Fault("arrives before it writes", {"shared-race"}, EARLY, ALL),
    faults(
        "an arrival is missing",
        "deadlock",
        ONE_WAY,
        "setp.eq.u32 %p3, %r0, 40;\n@%p3 bra END;\n" + ARRIVE,
        ARRIVE,
    ),
    faults(
        "bytes announced and never sent",
        "deadlock",
        INIT.replace("COUNT", "1")
        + "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r10], 16;\n@@\n"
        + WAIT.replace("PARITY", "0"),
        "",
        "@%p1 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r10], 16;",
    ),
    faults("writes again before it was read", "shared-race", RING, "", TWO),
    faults("copies are not tracked", "missing-async-wait", COPY, ARRIVE, TRACKED),
    faults("a later copy is not tracked", "missing-async-wait", LATER, "", "cp.async.wait_all;"),
    faults(
        "copies tracked beyond the count",
        "deadlock",
        COPY,
        TRACKED.replace(".noinc", ""),
        TRACKED.replace(".noinc", "") + "\n" + ARRIVE,
    ),
]


# ---- states and counts

STATES = (
    INIT.replace("COUNT", "5")
    + """@!%p1 bra END;
mbarrier.arrive.shared.b64 %rd5, [%r10], 2;
mbarrier.pending_count.b64 %r11, %rd5;
mbarrier.arrive_drop.shared.b64 %rd6, [%r10];
mbarrier.pending_count.b64 %r12, %rd6;
mbarrier.arrive.expect_tx.shared.b64 %rd7, [%r10], 24;
mbarrier.arrive.shared.b64 %rd7, [%r10];
mbarrier.test_wait.shared.b64 %p2, [%r10], %rd5;
selp.u32 %r13, 1, 0, %p2;
mbarrier.complete_tx.relaxed.cta.shared.b64 [%r10], 20;
mbarrier.expect_tx.relaxed.cta.shared.b64 [%r10], 4;
mbarrier.complete_tx.relaxed.cta.shared.b64 [%r10], 8;
mbarrier.test_wait.shared.b64 %p2, [%r10], %rd5;
selp.u32 %r14, 1, 0, %p2;
mbarrier.test_wait.parity.shared.b64 %p2, [%r10], 1;
selp.u32 %r15, 1, 0, %p2;
mbarrier.arrive.shared.b64 %rd8, [%r10];
mbarrier.pending_count.b64 %r16, %rd8;
st.global.v4.u32 [%rd0], {%r11, %r12, %r13, %r14};
st.global.v2.u32 [%rd0+16], {%r15, %r16};
END:
"""
)

# ---- elect, and instructions without an effect

SMALL = """mov.u32 %r6, 0;
setp.lt.u32 %p3, %r0, 4;
@!%p3 elect.sync %r6|%p2, 0xfffffff0;
selp.u32 %r7, 1, 0, %p2;
add.u32 %r7, %r7, %r6;
griddepcontrol.wait;
setmaxnreg.inc.sync.aligned.u32 64;
fence.proxy.async.shared::cta;
fence.mbarrier_init.release.cluster;
fence.acq_rel.cluster;
fence.sc.gpu;
nanosleep.u32 100;
{
bra.uni L;
L:
}
{
bra.uni L;
L:
}
barrier.sync.aligned 0;
bar.sync 0;
griddepcontrol.launch_dependents;
st.global.u32 [%rd1], %r7;"""


def text() -> str:
    files = [
        kernel(body, shared=512, name=f"k{i}_{side}")
        for i, f in enumerate(TABLE)
        for side, body in (("faulty", f.faulty), ("clean", f.clean))
    ]
    files.append(kernel(STATES, shared=512, name="states"))
    files.append(kernel(SMALL, name="small"))
    return together(*files).replace("sm_80", "sm_90a").replace("8.0", "8.6", 1)


@pytest.fixture(scope="module")
def emulator():
    return Emulator(text())


@pytest.mark.parametrize("fault", TABLE, ids=lambda f: f.name)
def test_a_fault_is_reported_and_its_correction_is_not(emulator, fault):
    for seed in (0, 1, 2):
        runs = {
            side: emulator.launch(
                f"k{TABLE.index(fault)}_{side}", [np.arange(64, dtype=np.uint32)], 1, 64, seed=seed
            ).reports
            for side in ("faulty", "clean")
        }
        follows = {"uninitialised-read"} if "shared-race" in fault.kinds else set()
        found = {r.kind for r in runs["faulty"]}
        assert fault.kinds <= found <= fault.kinds | follows, [str(r) for r in runs["faulty"]]
        assert [str(r) for r in runs["clean"]] == []


def test_states_counts_and_bytes(emulator):
    out = np.zeros(6, np.uint32)
    assert [str(r) for r in emulator.launch("states", [out], 1, 64).reports] == []
    # 5 arrivals expected. After 2, one that drops out, and 2 more, 24 bytes are pending: not over.
    # After 20 + 8 of 24 + 4 bytes it is over; the next phase (parity 1) expects 4 arrivals.
    assert out.tolist() == [5, 3, 0, 1, 0, 4]


def test_elect_scoped_labels_and_what_has_no_effect(emulator):
    out = np.zeros(32, np.uint32)
    assert [str(r) for r in emulator.launch("small", [out], 1, 32).reports] == []
    assert out[4:].tolist() == [5] + [4] * 27
