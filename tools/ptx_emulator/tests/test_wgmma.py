"""Matrix products of a warpgroup, with the operand layouts of the PTX manual."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ptx_emulator import Emulator
from ptx_text import kernel, together

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}
SWIZZLES = {16: 0, 128: 1, 64: 2, 32: 3}  # row bytes of the pattern: code in the descriptor


@dataclass(frozen=True)
class Case:
    """D = 3 + signs A B in two steps of the sum; A is in registers if `a` is None."""

    kind: str
    columns: int
    a: tuple[int, bool] | None  # row bytes of the swizzle pattern, and if it is M-major
    b: tuple[int, bool]
    signs: tuple[int, int] = (1, 1)
    sums: str = "f32"

    def __str__(self) -> str:
        return f"{self.kind}-{self.columns}-{self.a}-{self.b}-{self.signs}-{self.sums}"


K, MN = False, True
CASES = [
    Case("bf16", 64, (128, K), (128, MN)),
    Case("bf16", 16, (64, K), (32, K)),
    Case("f16", 32, (32, K), (64, MN)),
    Case("f16", 24, (16, K), (16, K), signs=(-1, 1)),
    Case("bf16", 64, (128, MN), (128, K), signs=(-1, -1)),
    Case("f16", 32, (64, MN), (32, MN)),
    Case("bf16", 16, (32, MN), (16, MN), signs=(1, -1)),
    Case("bf16", 8, (16, MN), (64, K)),
    Case("bf16", 16, None, (32, MN)),
    Case("f16", 16, None, (32, K), sums="f16"),
    Case("tf32", 16, (64, K), (32, K)),
    Case("tf32", 8, None, (128, K)),
    Case("tf32", 256, (16, K), (16, K)),
]


def depth(c: Case) -> int:
    return 8 if c.kind == "tf32" else 16


@dataclass(frozen=True)
class Packed:
    """An operand in shared memory, and the offsets of its descriptor in bytes."""

    data: np.ndarray
    leading: int
    stride: int
    step: int  # from one step of the sum to the next


def swizzled(rows: np.ndarray) -> np.ndarray:
    """Permutes the 16-byte columns of patterns (..., 8 rows, bytes)."""
    width = rows.shape[-1] // 16
    units = rows.reshape(*rows.shape[:-1], width, 16).copy()
    for row in range(8):
        # the permutation changes every 128 bytes
        turn = row * width // 8
        units[..., row, :, :] = units[..., row, np.arange(width) ^ turn, :]
    return units.reshape(rows.shape)


def pack(matrix: np.ndarray, layout: tuple[int, bool], step: int) -> Packed:
    """Packs a matrix (outer, summed over) of integers; one step sums `step` elements."""
    row_bytes, outer_major = layout
    size = matrix.itemsize
    rows = np.ascontiguousarray(matrix.T if outer_major else matrix)
    width = row_bytes // size
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % width)), constant_values=0x3C3C)
    groups, patterns = rows.shape[0] // 8, rows.shape[1] // width
    tiles = rows.reshape(groups, 8, patterns, width).transpose(2, 0, 1, 3)
    data = np.ascontiguousarray(tiles).view(np.uint8)  # (patterns, groups, 8, row_bytes)
    pattern, group = groups * 8 * row_bytes, 8 * row_bytes
    data = swizzled(data).ravel()
    if outer_major:
        along, across = (group, pattern), step // 8 * group
        leading, stride = along if row_bytes == 16 else along[::-1]
        return Packed(data, leading, stride, across)
    per_step = step * size
    on = per_step if per_step < row_bytes else pattern * (per_step // row_bytes)
    return Packed(data, pattern if row_bytes == 16 else 16, group, on)


def descriptor(packed: Packed, start: int, row_bytes: int) -> int:
    fields = start >> 4 | packed.leading >> 4 << 16 | packed.stride >> 4 << 32
    return fields | SWIZZLES[row_bytes] << 62


COPY_IN = """mov.u32 %r2, s;
ld.param.u64 %rd2, [b];
shl.b32 %r3, %r0, 4;
COPY:
cvt.u64.u32 %rd3, %r3;
add.s64 %rd3, %rd2, %rd3;
ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%rd3];
add.u32 %r8, %r2, %r3;
st.shared.v4.u32 [%r8], {%r4, %r5, %r6, %r7};
add.u32 %r3, %r3, 2048;
setp.lt.u32 %p0, %r3, BYTES;
@%p0 bra COPY;
fence.proxy.async.shared::cta;
bar.sync 0;
"""
TWO = ".param .u64 a, .param .u64 b, .param .u64 c"


def integers(c: Case) -> tuple[np.ndarray, np.ndarray]:
    """Returns A (64, K) and B (K, N) with small integers."""
    random = np.random.default_rng(c.columns + depth(c))
    return random.integers(-8, 9, (64, 2 * depth(c))), random.integers(
        -8, 9, (2 * depth(c), c.columns)
    )


def bits(c: Case, matrix: np.ndarray) -> np.ndarray:
    integer = torch.int32 if c.kind == "tf32" else torch.int16
    return torch.from_numpy(matrix).to(TYPES[c.kind]).view(integer).numpy().copy()


def image(c: Case) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Returns the bytes of shared memory, and the descriptors of A and B for each step."""
    left, right = (bits(c, x) for x in integers(c))
    packed = [] if c.a is None else [(pack(left, c.a, depth(c)), c.a[0])]
    packed.append((pack(np.ascontiguousarray(right.T), c.b, depth(c)), c.b[0]))
    memory = np.zeros(0, np.uint8)
    found = []
    for one, row_bytes in packed:
        memory = np.pad(memory, (0, -len(memory) % 1024))
        starts = [len(memory) + i * one.step for i in range(2)]
        found.append([descriptor(one, start, row_bytes) for start in starts])
        memory = np.concatenate([memory, one.data])
    memory = np.pad(memory, (0, -len(memory) % 2048))
    return memory, list(zip(*(found if c.a else [[0, 0], *found]), strict=True))


def fragment(c: Case, step: int) -> np.ndarray:
    """Returns A's registers (128, 4): lane l of warp w has rows 16 w + l / 4 and 8 below."""
    left = bits(c, integers(c)[0])[:, step * depth(c) : (step + 1) * depth(c)]
    thread, register = np.arange(128)[:, None], np.arange(4)
    row = thread // 32 * 16 + thread % 32 // 4 + 8 * (register % 2)
    pack = 4 // left.itemsize
    column = thread % 4 * pack + 4 * pack * (register // 2)
    parts = [left[row, column + h] for h in range(pack)]
    return np.ascontiguousarray(np.stack(parts, -1)).view(np.int32)[..., 0]


def registers(c: Case) -> list[str]:
    return [f"%acc{i}" for i in range(c.columns // (2 if c.sums == "f32" else 4))]


def body(c: Case, memory: np.ndarray, descriptors: list[tuple[int, int]]) -> str:
    accumulators = registers(c)
    start = "0f40400000" if c.sums == "f32" else "0x42004200"
    text = f".reg .b32 %acc<{len(accumulators)}>;\n.reg .b32 %left<8>;\n"
    text += "".join(f"mov.b32 {x}, {start};\n" for x in accumulators)
    text += COPY_IN.replace("BYTES", str(len(memory)))
    if c.a is None:
        text += "ld.param.u64 %rd4, [c];\nmul.wide.u32 %rd5, %r0, 32;\nadd.s64 %rd4, %rd4, %rd5;\n"
        text += "".join(f"ld.global.b32 %left{i}, [%rd4+{4 * i}];\n" for i in range(8))
    text += "wgmma.fence.sync.aligned;\nsetp.eq.u32 %p1, 0, 0;\n"
    group = "{" + ", ".join(accumulators) + "}"
    shape = f"m64n{c.columns}k{depth(c)}.{c.sums}.{c.kind}.{c.kind}"
    for step, (left, right) in enumerate(descriptors):
        text += f"mov.b64 %rd6, {left};\nmov.b64 %rd7, {right};\n"
        names = [f"%left{4 * step + i}" for i in range(4)]
        operand = "%rd6" if c.a else "{" + ", ".join(names) + "}"
        major = [] if c.kind == "tf32" else [int(x[1]) for x in (c.a, c.b) if x is not None]
        last = ", ".join(map(str, [*c.signs, *major]))
        text += f"wgmma.mma_async.sync.aligned.{shape} {group}, {operand}, %rd7, %p1, {last};\n"
    text += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    text += f"mul.wide.u32 %rd8, %r0, {4 * len(accumulators)};\nadd.s64 %rd8, %rd0, %rd8;\n"
    return text + "".join(
        f"st.global.b32 [%rd8+{4 * i}], {x};\n" for i, x in enumerate(accumulators)
    )


SM_90 = ("sm_80", "sm_90a")


def text() -> str:
    files = [
        kernel(body(c, *image(c)), TWO, shared=len(image(c)[0]), name=f"k{i}")
        for i, c in enumerate(CASES)
    ]
    return together(*files).replace(*SM_90)


@pytest.fixture(scope="module")
def emulator():
    return Emulator(text())


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: str(CASES[i]))
def test_product(emulator, number):
    c = CASES[number]
    memory, _ = image(c)
    left = np.concatenate([fragment(c, 0), fragment(c, 1)], axis=1) if c.a is None else None
    out = np.zeros((128, len(registers(c))), np.int32)
    launch = emulator.launch(f"k{number}", [out, memory, left], 1, 128, outputs=[0], seed=number)
    assert [str(r) for r in launch.reports] == []
    got = torch.from_numpy(out).view(torch.float32 if c.sums == "f32" else torch.float16)
    a, b = integers(c)
    want = 3 + c.signs[0] * c.signs[1] * (a @ b)
    thread, i = np.arange(128)[:, None], np.arange(c.columns // 2)
    row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
    column = 8 * (i // 4) + thread % 4 * 2 + i % 2
    assert (got.double().numpy() == want[row, column]).all()


# ---- faults

FIRST = CASES[1]
BODY = body(FIRST, *image(FIRST))
LAST = "wgmma.wait_group.sync.aligned 0;\n"
OVERWRITE = "bar.sync 0;\nmov.u32 %r8, s;\nsetp.eq.u32 %p2, %r0, 0;\n"
OVERWRITE += "@%p2 st.shared.u32 [%r8], 5;\nbar.sync 0;\n"
LANES = "setp.eq.u32 %p2, %r0, 7;\n@%p2 add.s64 %rd7, %rd7, 1;\n"
FAULTS = {
    "no fence between the proxies": ("missing-fence", "fence.proxy.async.shared::cta;\n", ""),
    "no barrier": ("shared-race", "bar.sync 0;\n", ""),
    "no fence for the registers": ("missing-fence", "wgmma.fence.sync.aligned;\n", ""),
    "no wait": ("missing-async-wait", LAST, ""),
    "a wait that leaves a group": ("missing-async-wait", LAST, LAST.replace(" 0", " 1")),
    "no commit": ("missing-async-wait", "wgmma.commit_group.sync.aligned;\n", ""),
    "accumulator changed in flight": (
        "missing-async-wait",
        LAST,
        "mov.b32 %acc3, 0;\n" + LAST,
    ),
    "accumulator copied after the fence from what was changed after it": (
        "missing-fence",
        "wgmma.fence.sync.aligned;\n",
        "wgmma.fence.sync.aligned;\nmov.b32 %r9, 0;\nmov.b32 %acc3, %r9;\n",
    ),
    "accumulator changed after the fence": (
        "missing-fence",
        "wgmma.fence.sync.aligned;\n",
        "wgmma.fence.sync.aligned;\nadd.u32 %acc3, %acc3, 0;\n",
    ),
    "operand changed in flight": ("missing-async-wait", LAST, OVERWRITE + LAST),
    "lanes with other descriptors": ("warp-mismatch", "wgmma.mma_async", LANES + "wgmma.mma_async"),
}
CORRECT = {
    "operand changed after the wait": (LAST, LAST + OVERWRITE),
    "accumulator changed after the wait": (LAST, LAST + "mov.b32 %acc3, 0;\n"),
    "accumulator copied after the fence from what was set before it": (
        "wgmma.fence.sync.aligned;\n",
        "mov.b32 %r9, 0;\nwgmma.fence.sync.aligned;\nmov.b32 %acc3, %r9;\n",
    ),
    "accumulator changed before the fence": ("wgmma.fence", "mov.b32 %acc3, 0;\nwgmma.fence"),
}


@pytest.fixture(scope="module")
def faulty():
    changes = [x[1:] for x in FAULTS.values()] + list(CORRECT.values())
    assert all(old in BODY for old, _ in changes)
    bodies = [BODY.replace(old, new, 1) for old, new in changes]
    shared = len(image(FIRST)[0])
    files = [kernel(text, TWO, shared=shared, name=f"k{i}") for i, text in enumerate(bodies)]
    return Emulator(together(*files).replace(*SM_90))


def kinds(emulator: Emulator, number: int) -> set[str]:
    out = np.zeros((128, len(registers(FIRST))), np.int32)
    args = [out, image(FIRST)[0], None]
    return {r.kind for r in emulator.launch(f"k{number}", args, 1, 128, outputs=[0]).reports}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(faulty, name):
    found = kinds(faulty, list(FAULTS).index(name))
    expected = FAULTS[name][0]
    # without a barrier it may also read what is not written or fenced yet
    follows = {"uninitialised-read", "missing-fence", "missing-async-wait"}
    assert expected in found
    assert found <= {expected} | (follows if expected == "shared-race" else set())


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_kernel_is_not_reported(faulty, name):
    assert kinds(faulty, len(FAULTS) + list(CORRECT).index(name)) == set()
