"""Loads, stores and cp.async of every width in every state space."""

from __future__ import annotations

import numpy as np
import pytest

from ptx_emulator import Emulator
from ptx_text import kernel, together

PARAMETERS = ".param .u64 a, .param .u64 b, .param .u64 c"
SPACES = ("global", "shared", "local", "generic")
THREADS = 32
# a thread's part of each array: %rd3 of b, %rd4 of a; %rd5 is an address of its own in a space
PIECES = """ld.param.u64 %rd3, [b];
mul.wide.u32 %rd2, %r0, SIZE;
add.s64 %rd3, %rd3, %rd2;
add.s64 %rd4, %rd0, %rd2;
"""
PLACES = {
    "global": "mov.u64 %rd5, %rd4;\n",
    "shared": "mov.u64 %rd5, s;\nadd.s64 %rd5, %rd5, %rd2;\n",
    "local": ".local .align 16 .b8 depot[16];\nmov.u64 %rd5, depot;\n",
    "generic": "mov.u64 %rd5, s;\nadd.s64 %rd5, %rd5, %rd2;\ncvta.shared.u64 %rd5, %rd5;\n",
}
WIDTHS = [(kind, count) for kind in ("b8", "b16", "b32", "b64") for count in (1, 2, 4)]
WIDTHS = [(kind, count) for kind, count in WIDTHS if int(kind[1:]) * count <= 128]


def moved(space: str, kind: str, count: int) -> str:
    """Returns a kernel that copies b to a, through the space."""
    size, vector = int(kind[1:]) // 8 * count, "" if count == 1 else f".v{count}"
    register = {"b8": "%h", "b16": "%h", "b32": "%r", "b64": "%rd"}[kind]
    first = [
        f"{register}{i}"
        for i in ({"%h": 1, "%r": 10, "%rd": 10}[register] + n for n in range(count))
    ]
    names = first[0] if count == 1 else "{" + ", ".join(first) + "}"
    text = PIECES.replace("SIZE", str(size)) + PLACES[space]
    where = "" if space == "generic" else f".{space}"
    text += (
        f"ld.global{vector}.{kind} {names}, [%rd3];\nst{where}{vector}.{kind} [%rd5], {names};\n"
    )
    if space != "global":
        for x in first:
            text += f"mov.{kind.replace('b8', 'b16')} {x}, 0;\n"
        text += f"ld{where}{vector}.{kind} {names}, [%rd5];\n"
        text += f"st.global{vector}.{kind} [%rd4], {names};\n"
    return kernel(text, PARAMETERS, shared=1024, name=f"move_{space}_{kind}_{count}")


# ---- modifiers without an effect, and narrow loads

MODIFIED = [
    "ld.global.nc.L1::no_allocate.L2::128B.b32 %r5, [%rd3];\nst.global.wt.b32 [%rd4], %r5;",
    "ld.volatile.global.b32 %r5, [%rd3];\nst.volatile.global.b32 [%rd4], %r5;",
    "ld.relaxed.gpu.global.b32 %r5, [%rd3];\nst.relaxed.gpu.global.b32 [%rd4], %r5;",
    "ld.acquire.sys.global.b32 %r5, [%rd3];\nst.release.cta.global.b32 [%rd4], %r5;",
    "ld.global.cg.b32 %r5, [%rd3];\nst.global.cs.b32 [%rd4], %r5;",
    "ldu.global.b32 %r5, [%rd3];\nst.global.L1::evict_last.b32 [%rd4], %r5;",
    "ld.global.v2.b32 {%r5, %r6}, [%rd3+-0];\nst.global.v2.b32 [%rd4], {%r5, %r6};",
    "createpolicy.fractional.L2::evict_first.b64 %rd6, 1.0;\n"
    "ld.global.L1::evict_first.L2::cache_hint.b32 %r5, [%rd3], %rd6;\n"
    "st.global.L1::evict_first.L2::cache_hint.b32 [%rd4], %r5, %rd6;",
    "cvta.to.global.u64 %rd6, %rd3;\nld.global.b32 %r5, [%rd6];\nst.b32 [%rd4], %r5;",
    "ld.global.b32 %r5, [%rd3];\nsub.s64 %rd6, %rd4, 4096;\nst.global.b32 [%rd6+4096], %r5;",
]
EXTENDED = {"s8": "i1", "u8": "u1", "s16": "i2", "u16": "u2", "s32": "i4", "u32": "u4"}
TAGS = """mov.u64 %rd6, s;
cvta.shared.u64 %rd7, %rd6;
cvta.to.shared.u64 %rd8, %rd7;
.local .align 8 .b8 depot[8];
mov.u64 %rd9, depot;
cvta.local.u64 %rd10, %rd9;
mov.u32 %r6, 0;
"""
# one bit of the result per (address, space): the address is in the space
PROBES = [(f"%rd{n}", space) for n in (7, 10, 0) for space in ("shared", "local", "global")]


def probe() -> str:
    code = TAGS
    for i, (address, space) in enumerate(PROBES):
        code += f"isspacep.{space} %p0, {address};\n@%p0 or.b32 %r6, %r6, {1 << i};\n"
    code += "setp.eq.u64 %p1, %rd8, %rd6;\n@%p1 or.b32 %r6, %r6, 512;\n"
    return kernel(code + "st.global.u32 [%rd1], %r6;", shared=16, name="probe")


# ---- cp.async: bytes to write, instruction, bytes to read (the others are zeros)

COPIES = {
    "copy4": (4, "cp.async.ca.shared.global [%r5], [%rd3], 4;", 4),
    "copy8": (8, "cp.async.ca.shared.global.L2::128B [%r5], [%rd3], 8;", 8),
    "copy16": (16, "cp.async.cg.shared.global [%r5], [%rd3], 16;", 16),
    "copy16_generic": (16, "cp.async.cg.shared.global [%rd5], [%rd3], 16, 16;", 16),
    "copy16_of_12": (16, "cp.async.cg.shared.global [%r5], [%rd3], 16, 12;", 12),
    "copy16_of_5": (16, "mov.u32 %r6, 5;\ncp.async.cg.shared.global [%r5], [%rd3], 16, %r6;", 5),
    "copy8_of_0": (8, "cp.async.ca.shared.global [%r5], [%rd3], 8, 0;", 0),
    "copy4_ignored": (
        4,
        "setp.lt.u32 %p0, %r0, 99;\ncp.async.ca.shared.global [%r5], [%rd3], 4, %p0;",
        0,
    ),
    "copy4_kept": (
        4,
        "setp.gt.u32 %p0, %r0, 99;\ncp.async.ca.shared.global [%r5], [%rd3], 4, %p0;",
        4,
    ),
}
WAITS = ("cp.async.commit_group;\ncp.async.wait_group 0;", "cp.async.wait_all;")


def copied(name: str, wait: int) -> str:
    size, code, _ = COPIES[name]
    text = PIECES.replace("SIZE", str(size)) + PLACES["shared"]
    text += f"cvt.u32.u64 %r5, %rd5;\n{code}\n{WAITS[wait]}\n"
    for at in range(0, size, 4):
        text += f"ld.shared.b32 %r7, [%r5+{at}];\nst.global.b32 [%rd4+{at}], %r7;\n"
    return kernel(text, PARAMETERS, shared=1024, name=f"{name}_{wait}")


# ---- variables of the module

VARIABLES = """.global .align 4 .f32 single = 0f3FC00000;
.const .align 8 .f64 double[2] = {0d4000000000000000, 0dC008000000000000};
.global .align 2 .u16 numbers[3] = {7, 0x10, 010};"""
READ = """ld.global.f32 %f1, [single];
ld.const.f64 %d1, [double+8];
cvt.rn.f32.f64 %f2, %d1;
ld.global.u16 %r5, [numbers+4];
cvt.rn.f32.u32 %f3, %r5;
add.f32 %f1, %f1, %f2;
add.f32 %f1, %f1, %f3;
st.global.f32 [%rd1], %f1;"""


def text() -> str:
    files = [moved(space, kind, count) for space in SPACES for kind, count in WIDTHS]
    for i, code in enumerate(MODIFIED):
        files.append(kernel(PIECES.replace("SIZE", "8") + code, PARAMETERS, name=f"modified{i}"))
    for kind, dtype in EXTENDED.items():
        for register in ("%h", "%r", "%rd")[int(dtype[1]) // 4 :]:
            code = PIECES.replace("SIZE", dtype[1]) + f"ld.global.{kind} {register}7, [%rd3];\n"
            bits = {"%h": 16, "%r": 32, "%rd": 64}[register]
            code += f"mul.wide.u32 %rd2, %r0, {bits // 8};\nadd.s64 %rd4, %rd0, %rd2;\n"
            code += f"st.global.b{bits} [%rd4], {register}7;"
            files.append(kernel(code, PARAMETERS, name=f"extend_{kind}_{bits}"))
    files += [copied(name, wait) for name in COPIES for wait in (0, 1)]
    files.append(kernel(READ, declarations=VARIABLES, name="variables"))
    return together(*files, probe())


@pytest.fixture(scope="module")
def emulator():
    return Emulator(text())


def noise(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, THREADS * size, "u1")


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("kind", "count"), WIDTHS)
def test_every_width_through_every_space(emulator, space, kind, count):
    data = noise(int(kind[1:]) // 8 * count)
    result = np.zeros_like(data)
    name = f"move_{space}_{kind}_{count}"
    assert emulator.launch(name, [result, data, None], 1, THREADS, outputs=[0]).reports == ()
    assert (result == data).all()


@pytest.mark.parametrize("number", range(len(MODIFIED)), ids=lambda i: MODIFIED[i].split(" ")[0])
def test_modifiers_of_memory_change_nothing(emulator, number):
    data, result = noise(8).view("u4"), np.zeros(2 * THREADS, "u4")
    assert emulator.launch(f"modified{number}", [result, data, None], 1, THREADS).reports == ()
    assert (result[::2] == data[::2]).all()


@pytest.mark.parametrize("kind", EXTENDED)
def test_narrow_loads_fill_the_register(emulator, kind):
    data = noise(int(EXTENDED[kind][1])).view(EXTENDED[kind])
    for bits in (16, 32, 64):
        if bits >= 8 * data.itemsize:
            result = np.zeros(THREADS, f"{EXTENDED[kind][0]}{bits // 8}")
            launch = emulator.launch(
                f"extend_{kind}_{bits}", [result, data, None], 1, THREADS, outputs=[0]
            )
            assert launch.reports == ()
            assert (result == data).all()


@pytest.mark.parametrize("wait", [0, 1])
@pytest.mark.parametrize("name", COPIES)
def test_asynchronous_copy(emulator, name, wait):
    size, _, filled = COPIES[name]
    data, result = noise(size), np.zeros(THREADS * size, "u1")
    launch = emulator.launch(f"{name}_{wait}", [result, data, None], 1, THREADS, outputs=[0])
    assert launch.reports == ()
    want = data.reshape(THREADS, size).copy()
    want[:, filled:] = 0
    assert (result.reshape(THREADS, size) == want).all()


def test_generic_addresses_know_their_space(emulator):
    result = np.zeros(THREADS, "u4")
    assert emulator.launch("probe", [result], 1, THREADS, outputs=[0]).reports == ()
    # addresses in shared, local and global memory, and a shared address converted and back
    assert (result == 0b1_100_010_001).all()


def test_initialised_variables(emulator):
    result = np.zeros(THREADS, "f4")
    assert emulator.launch("variables", [result], 1, THREADS, outputs=[0]).reports == ()
    assert (result == 1.5 - 3 + 8).all()
