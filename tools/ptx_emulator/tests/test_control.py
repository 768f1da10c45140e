"""Jumps, calls, exits, traps, special registers, and instructions without an effect."""

from __future__ import annotations

import numpy as np
import pytest

from ptx_emulator import Emulator
from ptx_text import SHARED, kernel, together

STORE = "\nst.global.u32 [%rd1], %r5;"
# number of Collatz steps from thread + 1 to 1
LOOP = """add.u32 %r6, %r0, 1;
mov.u32 %r5, 0;
LOOP:
setp.eq.u32 %p0, %r6, 1;
@%p0 bra.uni DONE;
and.b32 %r7, %r6, 1;
setp.eq.u32 %p1, %r7, 1;
@%p1 mad.lo.u32 %r6, %r6, 3, 1;
@!%p1 shr.u32 %r6, %r6, 1;
add.u32 %r5, %r5, 1;
bra LOOP;
DONE:"""
INDEXED = """and.b32 %r6, %r0, 3;
TABLE: .branchtargets L0, L1, L2, L1;
brx.idx %r6, TABLE;
L0:
mov.u32 %r5, 10;
bra END;
L1:
mov.u32 %r5, 20;
bra END;
L2:
mov.u32 %r5, 30;
END:"""
# a function of two arguments with a frame and a loop, and one without results
FUNCTIONS = """.func (.param .b32 result) power(.param .b32 base, .param .b32 exponent)
{
.reg .pred %p<2>;
.reg .b32 %r<5>;
.reg .b64 %rd<2>;
.local .align 4 .b8 depot[8];
ld.param.u32 %r1, [base];
ld.param.u32 %r2, [exponent];
mov.u64 %rd1, depot;
mov.u32 %r3, 1;
st.local.u32 [%rd1+4], %r3;
AGAIN:
setp.eq.u32 %p1, %r2, 0;
@%p1 bra OUT;
ld.local.u32 %r3, [%rd1+4];
mul.lo.u32 %r3, %r3, %r1;
st.local.u32 [%rd1+4], %r3;
sub.u32 %r2, %r2, 1;
bra AGAIN;
OUT:
ld.local.u32 %r4, [%rd1+4];
st.param.b32 [result], %r4;
ret;
}
.func mark(.param .b64 where)
{
.reg .b32 %r<2>;
.reg .b64 %rd<2>;
ld.param.u64 %rd1, [where];
mov.u32 %r1, 7;
st.global.u32 [%rd1+256], %r1;
ret.uni;
}
"""
CALL = """and.b32 %r6, %r0, 7;
{
.param .b32 p0;
.param .b32 p1;
.param .b32 r0;
st.param.b32 [p0], 3;
st.param.b32 [p1], %r6;
call.uni (r0), power, (p0, p1);
ld.param.b32 %r5, [r0];
}
{
.param .b64 q0;
st.param.b64 [q0], %rd1;
call mark, (q0);
}"""
LEAVE = (
    "setp.lt.u32 %p0, %r0, 20;\n@%p0 exit;\nsetp.lt.u32 %p0, %r0, 40;\n@%p0 ret;\nmov.u32 %r5, 1;"
)
# timing hints and fences
NOTHING = (
    SHARED
    + """mov.u32 %r5, 9;
st.shared.u32 [%r2], %r5;
membar.cta;
membar.gl;
membar.sys;
fence.acq_rel.gpu;
fence.sc.cta;
prefetch.global.L2 [%rd1];
prefetch.local.L1 [%rd2];
prefetchu.L1 [%rd1];
nanosleep.u32 100;
ld.shared.u32 %r5, [%r2];"""
)
TRAP = "mov.u32 %r5, 1;\nsetp.eq.u32 %p0, %r0, 5;\n@%p0 trap;"
SPECIAL = ["%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y"]
SPECIAL += ["%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%nwarpid"]
SPECIAL += ["WARP_SZ", "%dynamic_smem_size"]


def specials() -> str:
    """Returns a kernel in which each thread writes all special registers to a row of its own."""
    text = ""
    for at, ids in ((2, "%ctaid"), (3, "%tid")):
        sizes = {"%ctaid": "%nctaid", "%tid": "%ntid"}[ids]
        text += f"mov.u32 %r{at}, {ids}.z;\n"
        for axis in "yx":
            text += f"mov.u32 %r10, {sizes}.{axis};\nmov.u32 %r11, {ids}.{axis};\n"
            text += f"mad.lo.u32 %r{at}, %r{at}, %r10, %r11;\n"
    for axis in "xyz":
        text += f"mov.u32 %r10, %ntid.{axis};\nmul.lo.u32 %r2, %r2, %r10;\n"
    text += f"add.u32 %r2, %r2, %r3;\nmul.wide.u32 %rd2, %r2, {4 * len(SPECIAL)};\n"
    text += "add.s64 %rd2, %rd0, %rd2;\n"
    for i, name in enumerate(SPECIAL):
        text += f"mov.u32 %r5, {name};\nst.global.u32 [%rd2+{4 * i}], %r5;\n"
    return kernel(text, name="special")


def text() -> str:
    return together(
        kernel(LOOP + STORE, name="loop"),
        kernel(INDEXED + STORE, name="indexed"),
        kernel(CALL + STORE, name="calls", declarations=FUNCTIONS),
        kernel(LEAVE + STORE, name="leaves"),
        kernel(NOTHING + STORE, name="nothing", shared=256),
        kernel(TRAP + STORE, name="traps"),
        specials(),
    )


@pytest.fixture(scope="module")
def emulator():
    return Emulator(text())


def run(emulator: Emulator, name: str, size: int = 64) -> list[int]:
    result = np.zeros(size, "u4")
    assert emulator.launch(name, [result], 1, 64, seed=2).reports == ()
    return result.tolist()


def test_a_loop_that_depends_on_the_thread(emulator):
    def walk(n: int) -> int:
        return 0 if n == 1 else 1 + walk(3 * n + 1 if n % 2 else n // 2)

    assert run(emulator, "loop") == [walk(t + 1) for t in range(64)]


def test_an_indexed_branch(emulator):
    assert run(emulator, "indexed") == [10, 20, 30, 20] * 16


def test_calls(emulator):
    assert run(emulator, "calls", 128) == [3 ** (t % 8) for t in range(64)] + [7] * 64


def test_threads_that_leave(emulator):
    assert run(emulator, "leaves") == [0] * 40 + [1] * 24


def test_hints_and_fences_change_nothing(emulator):
    assert run(emulator, "nothing") == [9] * 64


def test_a_trap_stops_its_block_and_is_reported(emulator):
    result = np.zeros(64, "u4")
    (report,) = emulator.launch("traps", [result], 1, 64).reports
    assert (report.kind, report.threads) == ("trap", (5,))


def test_special_registers(emulator):
    grid, block = (3, 2, 2), (5, 4, 3)
    result = np.zeros((12, 60, len(SPECIAL)), "u4")
    assert emulator.launch("special", [result], grid, block, shared_bytes=48).reports == ()
    for linear in range(12):
        at = (linear % 3, linear // 3 % 2, linear // 6)
        for t in range(60):
            thread = (t % 5, t // 5 % 4, t // 20)
            want = [*thread, *block, *at, *grid, t % 32, t // 32, 2, 32, 48]
            assert result[linear, t].tolist() == want
