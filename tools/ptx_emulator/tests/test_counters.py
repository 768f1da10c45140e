"""Counters of kernels with known traffic, bank conflicts and flops."""

from __future__ import annotations

import numpy as np
import pytest

from ptx_emulator import Emulator
from ptx_text import kernel, together

COPY = "mul.wide.u32 %rd2, %r0, STRIDE;\nadd.s64 %rd2, %rd0, %rd2;\nld.global.f32 %f0, [%rd2];\n"
COPY += "ld.param.u64 %rd3, [b];\nadd.s64 %rd4, %rd3, %rd1;\nsub.s64 %rd4, %rd4, %rd0;\n"
COPY += "st.global.f32 [%rd4], %f0;"
# a 32 x 32 tile through shared memory with rows of PITCH bytes
TRANSPOSE = """ld.global.f32 %f0, [%rd1];
and.b32 %r2, %r0, 31;
shr.u32 %r3, %r0, 5;
mov.u32 %r4, s;
mad.lo.u32 %r5, %r3, PITCH, %r4;
shl.b32 %r6, %r2, 2;
add.u32 %r5, %r5, %r6;
st.shared.f32 [%r5], %f0;
bar.sync 0;
mad.lo.u32 %r5, %r2, PITCH, %r4;
shl.b32 %r6, %r3, 2;
add.u32 %r5, %r5, %r6;
ld.shared.f32 %f1, [%r5];
st.global.f32 [%rd1], %f1;"""
WIDE = """mul.wide.u32 %rd2, %r0, 16;
add.s64 %rd2, %rd0, %rd2;
ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%rd2];
shl.b32 %r2, %r0, 4;
mov.u32 %r3, s;
add.u32 %r2, %r2, %r3;
st.shared.v4.f32 [%r2], {%f0, %f1, %f2, %f3};
fma.rn.f32 %f4, %f0, %f1, %f2;
add.f32 %f4, %f4, %f3;
mul.rn.f32 %f4, %f4, %f4;
red.global.add.f32 [%rd0], %f4;"""
LOCAL = ".local .align 4 .b8 depot[16];\nmov.u64 %rd2, depot;\nst.local.u32 [%rd2], %r0;\n"
LOCAL += "ld.local.u32 %r5, [%rd2];\nst.global.u32 [%rd1], %r5;"
# one warp reads, the other one passes a barrier of its own
APART = "setp.lt.u32 %p0, %r0, 32;\n@%p0 bra LOW;\nld.global.u32 %r5, [%rd1];\nbra END;\n"
APART += "LOW:\nbar.sync 1, 32;\nEND:\n"
TWO = ".param .u64 a, .param .u64 b"


@pytest.fixture(scope="module")
def emulator():
    return Emulator(
        together(
            kernel(COPY.replace("STRIDE", "4"), TWO, name="coalesced"),
            kernel(COPY.replace("STRIDE", "32"), TWO, name="strided"),
            kernel(TRANSPOSE.replace("PITCH", "128"), shared=32 * 33 * 4, name="plain"),
            kernel(TRANSPOSE.replace("PITCH", "132"), shared=32 * 33 * 4, name="padded"),
            kernel(WIDE, shared=512, name="wide"),
            kernel(LOCAL, name="local"),
            kernel(APART, name="apart"),
        ),
        count=True,
    )


def count(emulator, name, arrays, threads, grid=1, seed=0):
    launch = emulator.launch(name, arrays, grid, threads, seed=seed)
    return launch.counters


def test_coalesced_copy(emulator):
    # 256 threads of 4 bytes are 8 warps of 128 bytes: 4 sectors each
    a, b = aligned(256), aligned(256)
    a[:] = np.arange(256)
    c = count(emulator, "coalesced", [a, b], 256)
    assert (b == a).all()
    assert (c.global_read_bytes, c.global_write_bytes) == (1024, 1024)
    assert (c.global_read_sectors, c.global_write_sectors) == (32, 32)
    assert (c.global_read_requests, c.global_write_requests) == (8, 8)
    assert (c.distinct_read_bytes, c.distinct_write_bytes) == (1024, 1024)
    assert (c.read_efficiency, c.write_efficiency) == (1, 1)
    assert (c.shared_requests, c.barriers, c.atomics, c.local_read_bytes) == (0, 0, 0, 0)


def test_strided_copy(emulator):
    # every thread reads 4 bytes of its own sector; the writes are coalesced
    a, b = aligned(2048), aligned(256)
    a[:] = np.arange(2048)
    c = count(emulator, "strided", [a, b], 256)
    assert (b == a[::8]).all()
    assert (c.global_read_bytes, c.global_read_sectors) == (1024, 256)
    assert (c.global_write_bytes, c.global_write_sectors) == (1024, 32)
    assert c.read_efficiency == 4 / 32
    assert c.distinct_read_bytes == 1024


@pytest.mark.parametrize(("name", "conflicts"), [("plain", 32 * 31), ("padded", 0)])
def test_transpose(emulator, name, conflicts):
    # 32 warps write a row and read a column. Without padding a column lies in one bank and takes
    # 32 passes; with rows of 33 words it lies in all banks and takes one.
    a = aligned(1024)
    a[:] = np.arange(1024)
    c = count(emulator, name, [a], 1024)
    assert (a.reshape(32, 32) == np.arange(1024).reshape(32, 32).T).all()
    assert c.shared_requests == 64
    assert c.shared_conflicts == conflicts
    assert c.shared_wavefronts == 64 + conflicts
    assert c.barriers == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_barrier_of_one_warp_does_not_split_an_access_of_another(emulator, seed):
    c = count(emulator, "apart", [aligned(64)], 64, seed=seed)
    assert (c.global_read_requests, c.global_read_sectors) == (1, 4)


@pytest.mark.parametrize("seed", range(3))
def test_wide_accesses_flops_and_atomics(emulator, seed):
    # 32 lanes of 16 bytes: 512 bytes, 16 sectors; shared memory moves them in 4 passes
    c = count(emulator, "wide", [aligned(128)], 32, seed=seed)
    assert (c.global_read_bytes, c.global_read_sectors) == (512, 16)
    assert (c.shared_requests, c.shared_wavefronts, c.shared_conflicts) == (1, 4, 0)
    assert c.flops == {"fma.f32": 64, "add.f32": 32, "mul.f32": 32}
    assert c.instructions["fma.f32"] == 32
    assert c.atomics == 32


def test_local_traffic(emulator):
    c = count(emulator, "local", [aligned(64)], 64)
    assert (c.local_read_bytes, c.local_write_bytes) == (256, 256)


def test_nothing_is_counted_unless_asked(emulator):
    assert (
        Emulator(kernel("", name="nothing")).launch("nothing", [aligned(1)], 1, 1).counters is None
    )


def aligned(elements: int) -> np.ndarray:
    """Returns zeros that begin at a sector."""
    memory = np.zeros(4 * elements + 32, np.uint8)
    start = -memory.ctypes.data % 32
    return memory[start : start + 4 * elements].view(np.float32)
