"""mma, ldmatrix and stmatrix, with the fragments of the PTX manual."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ptx_emulator import Emulator
from ptx_text import kernel, together

# name, rows and depth of A, its type, the type of the sum, and the type of B if it differs
SHAPES = [
    ("m16n8k16.row.col.f32.bf16.bf16.f32", 16, 16, torch.bfloat16, torch.float32, None),
    ("m16n8k8.row.col.f32.bf16.bf16.f32", 16, 8, torch.bfloat16, torch.float32, None),
    ("m16n8k16.row.col.f32.f16.f16.f32", 16, 16, torch.float16, torch.float32, None),
    ("m16n8k8.row.col.f32.f16.f16.f32", 16, 8, torch.float16, torch.float32, None),
    ("m16n8k16.row.col.f16.f16.f16.f16", 16, 16, torch.float16, torch.float16, None),
    ("m16n8k8.row.col.f16.f16.f16.f16", 16, 8, torch.float16, torch.float16, None),
    ("m16n8k8.row.col.f32.tf32.tf32.f32", 16, 8, torch.float32, torch.float32, None),
    ("m16n8k4.row.col.f32.tf32.tf32.f32", 16, 4, torch.float32, torch.float32, None),
    ("m8n8k4.row.col.f64.f64.f64.f64", 8, 4, torch.float64, torch.float64, None),
    ("m16n8k32.row.col.s32.s8.s8.s32", 16, 32, torch.int8, torch.int32, None),
    ("m16n8k16.row.col.s32.s8.s8.s32", 16, 16, torch.int8, torch.int32, None),
    ("m16n8k32.row.col.s32.u8.u8.s32", 16, 32, torch.uint8, torch.int32, None),
    ("m16n8k16.row.col.s32.u8.s8.s32", 16, 16, torch.uint8, torch.int32, torch.int8),
    ("m16n8k32.row.col.s32.s8.u8.s32", 16, 32, torch.int8, torch.int32, torch.uint8),
]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fragments(rows: int, depth: int, pack: int) -> tuple[np.ndarray, ...]:
    """Returns rows and columns: (lanes, registers, elements) of A and B, (lanes, 4) of C."""
    lane = np.arange(32)
    group, quad = lane // 4, lane % 4
    h = np.arange(pack)
    steps, halves = depth // (4 * pack), rows // 8
    register = np.arange(steps * halves)
    a_row = (group[:, None] + 8 * (register % halves))[:, :, None] + 0 * h
    column = quad[:, None, None] * pack + h
    a_column = column + (4 * pack * (register // halves))[:, None]
    b_row = column + (4 * pack * np.arange(steps))[:, None]
    b_column = group[:, None, None] + 0 * b_row
    c = np.arange(2 * halves)
    c_row, c_column = group[:, None] + 8 * (c // 2), quad[:, None] * 2 + c % 2
    return a_row, a_column, b_row, b_column, c_row, c_column


def registers(matrix: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix[row, column]).reshape(32, -1)


def raw(x: torch.Tensor, kind: torch.dtype) -> np.ndarray:
    return x.to(kind).view(INTEGERS[kind.itemsize]).numpy()


def sizes(shape: tuple) -> tuple[int, int, list[int]]:
    """Returns elements per register, bytes per register, and registers of A, B and C."""
    _, rows, depth, dtype, sum_type, _ = shape
    pack, word = max(1, 4 // dtype.itemsize), max(4, dtype.itemsize)
    counts = [rows * depth // 32 // pack, depth * 8 // 32 // pack]
    return pack, word, [*counts, rows * 8 // 32 * sum_type.itemsize // word]


def product(shape: tuple, name: str) -> str:
    """Returns a kernel that replaces C by A B + C; the registers of a lane are a row of memory."""
    _, word, counts = sizes(shape)
    register, total = "%rd" if word == 8 else "%r", sum(counts)
    text = f"mul.wide.u32 %rd2, %r0, {total * word};\nadd.s64 %rd2, %rd0, %rd2;\n"
    names = [f"{register}{8 + i}" for i in range(total)]
    for i, x in enumerate(names):
        text += f"ld.global.b{8 * word} {x}, [%rd2+{word * i}];\n"
    ends = np.cumsum([0, *counts]).tolist()
    a, b, c = ("{" + ", ".join(names[i:j]) + "}" for i, j in itertools.pairwise(ends))
    text += f"mma.sync.aligned.{shape[0]} {c}, {a}, {b}, {c};\n"
    for i in range(ends[2], total):
        text += f"st.global.b{8 * word} [%rd2+{word * i}], {names[i]};\n"
    return kernel(text, name=name)


# a warp copies matrices of 64 halves to shared memory and loads fragments, or the reverse
TRANSFER = """mov.u32 %r2, s;
mul.lo.u32 %r4, %r0, WIDTH;
add.u32 %r3, %r2, %r4;
mul.wide.u32 %rd2, %r0, WIDTH;
add.s64 %rd2, %rd0, %rd2;
and.b32 %r5, %r0, LAST;
shl.b32 %r5, %r5, 4;
add.u32 %r5, %r2, %r5;
"""
LOAD = "bar.warp.sync -1;\nldmatrix.sync.aligned.m8n8.xCOUNTTRANS.shared.b16 FRAGMENT, [%r5];\n"
STORE = "stmatrix.sync.aligned.m8n8.xCOUNTTRANS.shared.b16 [%r5], FRAGMENT;\nbar.warp.sync -1;\n"


def transfer(count: int, trans: bool, load: bool) -> str:
    fragment = [f"%r{8 + i}" for i in range(count)]
    to_shared, from_shared = "", ""
    for i in range(count):
        to_shared += f"ld.global.b32 {fragment[i]}, [%rd2+{4 * i}];\n"
        from_shared += f"st.global.b32 [%rd2+{4 * i}], {fragment[i]};\n"
        if load:
            to_shared += f"st.shared.b32 [%r3+{4 * i}], {fragment[i]};\n"
        else:
            from_shared = from_shared.replace(
                f"st.global.b32 [%rd2+{4 * i}]",
                f"ld.shared.b32 {fragment[i]}, [%r3+{4 * i}];\nst.global.b32 [%rd2+{4 * i}]",
            )
    text = TRANSFER + to_shared + (LOAD if load else STORE) + from_shared
    text = text.replace("FRAGMENT", "{" + ", ".join(fragment) + "}").replace(
        "LAST", str(8 * count - 1)
    )
    text = text.replace("COUNT", str(count)).replace("TRANS", ".trans" * trans)
    name = f"{'load' if load else 'store'}{count}{'t' * trans}"
    return kernel(text.replace("WIDTH", str(4 * count)), shared=512, name=name)


TRANSFERS = [
    (n, trans, load) for n in (1, 2, 4) for trans in (False, True) for load in (True, False)
]


def text() -> str:
    products = (product(shape, f"product{i}") for i, shape in enumerate(SHAPES))
    return together(*products, *(transfer(*t) for t in TRANSFERS), target="sm_90")


@pytest.fixture(scope="module")
def emulator():
    return Emulator(text())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def test_matrix_product(emulator, shape):
    _, rows, depth, a_type, sum_type, other = shape
    b_type = other or a_type
    pack, word, counts = sizes(shape)
    generator = torch.Generator().manual_seed(depth)

    def random(*size: int, dtype: torch.dtype) -> torch.Tensor:
        low, high = (128, 256) if dtype == torch.uint8 else (-8, 9)
        return torch.randint(low, high, size, generator=generator)

    a, b = random(rows, depth, dtype=a_type), random(depth, 8, dtype=b_type)
    c = random(rows, 8, dtype=sum_type)
    a_row, a_column, b_row, b_column, c_row, c_column = fragments(rows, depth, pack)
    parts = [
        registers(raw(a, a_type), a_row, a_column),
        registers(raw(b, b_type), b_row, b_column),
        registers(raw(c, sum_type), c_row, c_column),
    ]
    packed = np.concatenate([x.view(f"i{word}") for x in parts], axis=1)
    name = f"product{SHAPES.index(shape)}"
    assert emulator.launch(name, [packed], 1, 32).reports == ()
    want = raw(a.double() @ b.double() + c, sum_type)
    got = np.ascontiguousarray(packed[:, -counts[2] :]).view(want.dtype)
    assert (got == want[c_row, c_column]).all()


@pytest.mark.parametrize(("count", "trans", "load"), TRANSFERS)
def test_matrix_transfer(emulator, count, trans, load):
    matrices = (
        np.random.default_rng(count).permutation(count * 64).reshape(count, 8, 8).astype("u2")
    )
    lane = np.arange(32)
    # lane l has elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, one register per matrix
    turned = matrices.transpose(0, 2, 1) if trans else matrices
    fragment = np.stack([turned[:, lane // 4, lane % 4 * 2 + i].T for i in (0, 1)], axis=2)
    memory, result = (matrices, fragment) if load else (fragment, matrices)
    data = np.ascontiguousarray(memory).reshape(32, -1).copy()
    name = f"{'load' if load else 'store'}{count}{'t' * trans}"
    assert emulator.launch(name, [data], 1, 32).reports == ()
    assert (data == result.reshape(32, -1)).all()
