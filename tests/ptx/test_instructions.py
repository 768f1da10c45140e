"""Single instructions against numpy; conversions over all 65,536 halves; matrix fragments."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from ptx_text import kernel, together

from featkd.ptx import Emulator

F32, F64, S32, U32, U64, S16, U16 = "f4", "f8", "i4", "u4", "u8", "i2", "u2"
NAN, INF, TINY = np.nan, np.inf, 1e-40
FLOATS = [0.0, -0.0, 1.0, -1.5, 3.0, 1e30, -1e-30, TINY, -TINY, INF, -INF, NAN, 0.1, 16777217.0]
INTS = [0, 1, -1, 2, 7, 31, 32, 33, 255, -256, 2**31 - 1, -(2**31), 12345678, -87654321]


@dataclass(frozen=True)
class Case:
    """`code` with {d} the result and {a} {b} {c} registers; `want` the same over numpy arrays."""

    code: str
    types: tuple[str, ...]  # of the result and the operands
    want: Callable[..., np.ndarray]


def case(code: str, types: str, want: Callable[..., np.ndarray]) -> Case:
    return Case(code, tuple(types.split()), want)


def exact(f):
    """f over float64, rounded to float32 once."""
    return lambda *x: f(*(v.astype(F64) for v in x)).astype(F32)


def toward(direction: float):
    """Round a float64 array to float32 down, up or (nan) to zero."""

    def rounded(x: np.ndarray) -> np.ndarray:
        near = x.astype(F32)
        aim = np.full_like(near, direction) if direction == direction else np.zeros_like(near)
        past = (
            np.abs(near) > np.abs(x)
            if direction != direction
            else (near > x if direction < 0 else near < x)
        )
        return np.where(past, np.nextafter(near, aim), near)

    return rounded


def flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(np.float32(0), x), x)


def clamp(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, np.minimum(x, 1), 0).astype(F32)


def numeric_min(a, b):
    low = np.where(
        np.signbit(a) & (a == b), a, np.where(np.signbit(b) & (a == b), b, np.fmin(a, b))
    )
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, low))


def nan_max(a, b):
    return np.where(a == b, np.where(np.signbit(a), b, a), np.maximum(a, b))


def fused_less_one(a, b):
    """a b - 1 rounded once: what float64 drops pushes the sum off a tie."""
    whole = product(a, b)
    total = whole - 1
    lost = (whole - total) - 1
    pushed = np.nextafter(total, np.where(lost > 0, INF, -INF))
    return np.where((lost == 0) | ~np.isfinite(lost), total, pushed).astype(F32)


def to_s32(x: np.ndarray) -> np.ndarray:
    clipped = np.clip(
        np.nan_to_num(x.astype(F64), nan=0, posinf=1e30, neginf=-1e30), -(2**31), 2**31 - 1
    )
    return clipped.astype(np.int64)


def shift(f, width: int, sign: bool = False):
    def shifted(a, n):
        full = f(a, np.minimum(n, width - 1).astype(a.dtype))
        return full if sign else np.where(n >= width, 0, full).astype(a.dtype)

    return shifted


def down(x):
    return toward(-INF)(x)


def product(a, b):
    return a.astype(F64) * b.astype(F64)


CASES = [
    case("add.rn.f32 {d}, {a}, {b};", "f4 f4 f4", np.add),
    case("add.ftz.f32 {d}, {a}, {b};", "f4 f4 f4", lambda a, b: flush(flush(a) + flush(b))),
    case("add.sat.f32 {d}, {a}, {b};", "f4 f4 f4", lambda a, b: clamp(a + b)),
    case("sub.f32 {d}, {a}, {b};", "f4 f4 f4", np.subtract),
    case("mul.rz.f32 {d}, {a}, {b};", "f4 f4 f4", lambda a, b: toward(NAN)(product(a, b))),
    case("mul.rm.f32 {d}, {a}, {b};", "f4 f4 f4", lambda a, b: down(product(a, b))),
    case("mul.rp.f32 {d}, {a}, {b};", "f4 f4 f4", lambda a, b: toward(INF)(product(a, b))),
    case("mul.f64 {d}, {a}, {b};", "f8 f8 f8", np.multiply),
    case("div.rn.f32 {d}, {a}, {b};", "f4 f4 f4", np.divide),
    case("fma.rn.f32 {d}, {a}, {b}, 0fBF800000;", "f4 f4 f4", fused_less_one),
    case("sqrt.rn.f32 {d}, {a};", "f4 f4", exact(np.sqrt)),
    case("rcp.rn.f32 {d}, {a};", "f4 f4", lambda a: np.float32(1) / a),
    case("abs.f32 {d}, {a};", "f4 f4", np.abs),
    case("neg.f32 {d}, {a};", "f4 f4", np.negative),
    case("min.f32 {d}, {a}, {b};", "f4 f4 f4", numeric_min),
    case("max.NaN.f32 {d}, {a}, {b};", "f4 f4 f4", nan_max),
    case("copysign.f32 {d}, {a}, {b};", "f4 f4 f4", lambda a, b: np.copysign(b, a)),
    case("add.s32 {d}, {a}, {b};", "i4 i4 i4", np.add),
    case(
        "add.sat.s32 {d}, {a}, {b};",
        "i4 i4 i4",
        lambda a, b: np.clip(a.astype("i8") + b, -(2**31), 2**31 - 1),
    ),
    case(
        "sub.sat.s32 {d}, {a}, {b};",
        "i4 i4 i4",
        lambda a, b: np.clip(a.astype("i8") - b, -(2**31), 2**31 - 1),
    ),
    case("mul.lo.s32 {d}, {a}, {b};", "i4 i4 i4", np.multiply),
    case("mul.hi.s32 {d}, {a}, {b};", "i4 i4 i4", lambda a, b: a.astype("i8") * b >> 32),
    case("mul.hi.u32 {d}, {a}, {b};", "u4 u4 u4", lambda a, b: a.astype("u8") * b >> np.uint64(32)),
    case("mul.wide.s32 {d}, {a}, {b};", "i8 i4 i4", lambda a, b: a.astype("i8") * b),
    case("mul.wide.u32 {d}, {a}, {b};", "u8 u4 u4", lambda a, b: a.astype("u8") * b),
    case("mad.lo.s32 {d}, {a}, {b}, {a};", "i4 i4 i4", lambda a, b: a * b + a),
    case(
        "div.u32 {d}, {a}, {b};",
        "u4 u4 u4",
        lambda a, b: np.where(b == 0, 2**32 - 1, a // np.maximum(b, 1)),
    ),
    case(
        "rem.s32 {d}, {a}, {b};",
        "i4 i4 i4",
        lambda a, b: np.where(b == 0, a, np.fmod(a.astype("i8"), np.where(b == 0, 1, b))),
    ),
    case("abs.s32 {d}, {a};", "i4 i4", np.abs),
    case("min.s32 {d}, {a}, {b};", "i4 i4 i4", np.minimum),
    case("max.u32 {d}, {a}, {b};", "u4 u4 u4", np.maximum),
    case("shl.b32 {d}, {a}, {b};", "u4 u4 u4", shift(np.left_shift, 32)),
    case("shr.u32 {d}, {a}, {b};", "u4 u4 u4", shift(np.right_shift, 32)),
    case("shr.s32 {d}, {a}, {b};", "i4 i4 u4", shift(np.right_shift, 32, sign=True)),
    case("shf.l.wrap.b32 {d}, {a}, {b}, 8;", "u4 u4 u4", lambda a, b: b << 8 | a >> 24),
    case("shf.r.wrap.b32 {d}, {a}, {b}, 40;", "u4 u4 u4", lambda a, b: a >> 8 | b << 24),
    case("lop3.b32 {d}, {a}, {b}, {a}, 0x96;", "u4 u4 u4", lambda a, b: a ^ b ^ a),
    case("lop3.b32 {d}, {a}, {b}, {a}, 0x3c;", "u4 u4 u4", lambda a, b: a ^ b),
    case(
        "prmt.b32 {d}, {a}, {b}, 0x7610;", "u4 u4 u4", lambda a, b: (a & 0xFFFF) | (b & 0xFFFF0000)
    ),
    case("bfe.u32 {d}, {a}, 4, 8;", "u4 u4", lambda a: a >> 4 & 255),
    case("bfe.s32 {d}, {a}, 28, 8;", "i4 i4", lambda a: a >> 28),
    case(
        "bfi.b32 {d}, {a}, {b}, 4, 8;",
        "u4 u4 u4",
        lambda a, b: (b & ~np.uint32(0xFF0)) | (a & 0xFF) << 4,
    ),
    case(
        "brev.b32 {d}, {a};",
        "u4 u4",
        lambda a: np.array([int(f"{x:032b}"[::-1], 2) for x in a.tolist()]),
    ),
    case(
        "popc.b32 {d}, {a};", "u4 u4", lambda a: np.array([f"{x:b}".count("1") for x in a.tolist()])
    ),
    case(
        "clz.b32 {d}, {a};", "u4 u4", lambda a: np.array([32 - x.bit_length() for x in a.tolist()])
    ),
    case(
        "bfind.u32 {d}, {a};",
        "u4 u4",
        lambda a: np.array([(x.bit_length() - 1) % 2**32 for x in a.tolist()]),
    ),
    case(
        "add.cc.u32 %r9, {a}, {b};\naddc.u32 {d}, 0, 0;",
        "u4 u4 u4",
        lambda a, b: a.astype("u8") + b >> np.uint64(32),
    ),
    case("sub.cc.u32 %r9, {a}, {b};\nsubc.u32 {d}, 7, 0;", "u4 u4 u4", lambda a, b: 7 - (a < b)),
    case("setp.lt.f32 %p0, {a}, {b};\nselp.u32 {d}, 1, 0, %p0;", "u4 f4 f4", np.less),
    case(
        "setp.ne.f32 %p0, {a}, {b};\nselp.u32 {d}, 1, 0, %p0;",
        "u4 f4 f4",
        lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b),
    ),
    case(
        "setp.geu.f32 %p0, {a}, {b};\nselp.u32 {d}, 1, 0, %p0;", "u4 f4 f4", lambda a, b: ~(a < b)
    ),
    case(
        "setp.nan.f32 %p0, {a}, {b};\nselp.u32 {d}, 1, 0, %p0;",
        "u4 f4 f4",
        lambda a, b: np.isnan(a) | np.isnan(b),
    ),
    case("setp.hi.u32 %p0|%p1, {a}, {b};\nselp.u32 {d}, 1, 0, %p1;", "u4 u4 u4", np.less_equal),
    case("cvt.rn.f32.s32 {d}, {a};", "f4 i4", lambda a: a.astype(F32)),
    case("cvt.rz.f32.u32 {d}, {a};", "f4 u4", lambda a: toward(NAN)(a.astype(F64))),
    case("cvt.rzi.s32.f32 {d}, {a};", "i4 f4", lambda a: to_s32(np.trunc(a))),
    case("cvt.rni.s32.f32 {d}, {a};", "i4 f4", lambda a: to_s32(np.rint(a))),
    case("cvt.rmi.s32.f32 {d}, {a};", "i4 f4", lambda a: to_s32(np.floor(a))),
    case("cvt.rpi.f32.f32 {d}, {a};", "f4 f4", np.ceil),
    case("cvt.rn.f32.f64 {d}, {a};", "f4 f8", lambda a: a.astype(F32)),
    case("cvt.rm.f32.f64 {d}, {a};", "f4 f8", down),
    case("cvt.rp.f32.f64 {d}, {a};", "f4 f8", toward(INF)),
    case("cvt.rz.f32.f64 {d}, {a};", "f4 f8", toward(NAN)),
    case("cvt.s16.s32 %h1, {a};\ncvt.s32.s16 {d}, %h1;", "i4 i4", lambda a: a.astype("i2")),
    case(
        "cvt.sat.s16.s32 %h1, {a};\ncvt.s32.s16 {d}, %h1;",
        "i4 i4",
        lambda a: np.clip(a, -(2**15), 2**15 - 1),
    ),
    case(
        "cvt.rna.tf32.f32 {d}, {a};",
        "u4 f4",
        lambda a: np.where(np.isnan(a), 0x7FFFFFFF, a.view(U32) + 0x1000 & 0xFFFFE000),
    ),
]
REGISTERS = {"f4": "%f", "f8": "%d", "i4": "%r", "u4": "%r", "i8": "%rd", "u8": "%rd"}
NUMBERS = {"f4": "f32", "f8": "f64", "i4": "b32", "u4": "b32", "i8": "b64", "u8": "b64"}


def body(c: Case) -> str:
    """Loads operands of thread t from b and c, runs the code, stores to a."""
    names = {"d": f"{REGISTERS[c.types[0]]}5"}
    text = ""
    for i, kind in enumerate(c.types[1:]):
        names["abc"[i]] = register = f"{REGISTERS[kind]}{6 + i}"
        text += f"ld.param.u64 %rd10, [{'bc'[i]}];\nmul.wide.u32 %rd11, %r0, {kind[1]};\n"
        text += f"add.s64 %rd10, %rd10, %rd11;\nld.global.{NUMBERS[kind]} {register}, [%rd10];\n"
    text += c.code.format(**names)
    text += f"\nmul.wide.u32 %rd11, %r0, {c.types[0][1]};\nadd.s64 %rd11, %rd0, %rd11;\n"
    return text + f"st.global.{NUMBERS[c.types[0]]} [%rd11], {names['d']};"


THREE = ".param .u64 a, .param .u64 b, .param .u64 c"


@pytest.fixture(scope="module")
def emulator():
    files = (kernel(body(c), THREE, name=f"case{i}") for i, c in enumerate(CASES))
    return Emulator(together(*files))


def values(kind: str) -> np.ndarray:
    if kind[0] == "f":
        return np.array(FLOATS, kind)
    return np.array(INTS, "i8").astype(kind)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: CASES[i].code.split(" ")[0])
def test_instruction(emulator, number):
    c = CASES[number]
    grids = np.meshgrid(*(values(kind) for kind in c.types[1:]), indexing="ij")
    operands = [np.ascontiguousarray(x.ravel()) for x in grids]
    result = np.zeros(operands[0].size, c.types[0])
    pointers = [result, *operands, *[None] * (2 - len(operands))]
    launch = emulator.launch(f"case{number}", pointers, 1, result.size, outputs=[0])
    assert launch.reports == ()
    with np.errstate(all="ignore"):
        want = np.asarray(c.want(*operands)).astype(c.types[0])
    if c.types[0][0] == "f":
        nan = np.isnan(want)
        assert (np.isnan(result) == nan).all()
        kind = f"u{c.types[0][1]}"
        same = (result.view(kind) == want.view(kind)) | nan
    else:
        same = result == want
    wrong = [(*(x[i] for x in operands), result[i], want[i]) for i in np.flatnonzero(~same)]
    assert not wrong, wrong[:5]


# ---- conversions of halves: every one of the 65,536, and the values between neighbours

CONVERT = """ld.param.u64 %rd2, [b];
mov.u32 %r2, %ctaid.x;
mad.lo.u32 %r0, %r2, 1024, %r0;
mul.wide.u32 %rd3, %r0, FROM;
mul.wide.u32 %rd4, %r0, TO;
add.s64 %rd2, %rd2, %rd3;
add.s64 %rd4, %rd0, %rd4;
"""
WIDEN = "ld.global.b16 %h0, [%rd2];\ncvt.f32.HALF %f0, %h0;\nst.global.f32 [%rd4], %f0;"
NARROW = "ld.global.f32 %f0, [%rd2];\ncvt.MODE.HALF.f32 %h0, %f0;\nst.global.b16 [%rd4], %h0;"
TWO = ".param .u64 a, .param .u64 b"
HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}
MODES = ("rn", "rz")


@pytest.fixture(scope="module")
def converter():
    files = []
    for half in HALVES:
        start = CONVERT.replace("FROM", "2").replace("TO", "4")
        files.append(kernel(start + WIDEN.replace("HALF", half), TWO, name=f"widen_{half}"))
        start = CONVERT.replace("FROM", "4").replace("TO", "2")
        for mode in MODES:
            code = NARROW.replace("HALF", half).replace("MODE", mode)
            files.append(kernel(start + code, TWO, name=f"{mode}_{half}"))
    return Emulator(together(*files))


@pytest.mark.parametrize("half", HALVES)
def test_widening_every_half(converter, half):
    bits = np.arange(65536, dtype=np.uint32).astype(U16)
    result = np.zeros(65536, F32)
    assert converter.launch(f"widen_{half}", [result, bits], 64, 1024, outputs=[0]).reports == ()
    want = torch.from_numpy(bits.view("i2")).view(HALVES[half]).float().numpy()
    nan = np.isnan(want)
    assert (np.isnan(result) == nan).all()
    assert (result.view(U32)[~nan] == want.view(U32)[~nan]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("half", HALVES)
def test_narrowing_to_every_half_and_between_all_neighbours(converter, half, mode):
    bits = np.arange(65536, dtype=np.uint32).astype(U16)
    exact = torch.from_numpy(bits.view("i2")).view(HALVES[half]).float().numpy()
    with np.errstate(all="ignore"):
        magnitude = exact[:32768].astype(F64)
        middle = ((magnitude[:-1] + magnitude[1:]) / 2).astype(F32)
        sides = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(INF))]
        inputs = np.concatenate([exact, *sides, *(-x for x in sides)])
    inputs = np.concatenate([inputs, np.zeros(-len(inputs) % 1024, F32)])
    result = np.zeros(len(inputs), U16)
    args = [result, inputs]
    launch = converter.launch(f"{mode}_{half}", args, len(inputs) // 1024, 1024, outputs=[0])
    assert launch.reports == ()
    want = torch.from_numpy(inputs).to(HALVES[half])
    if mode == "rz":
        past = want.float().abs() > torch.from_numpy(inputs).abs()
        want = torch.where(past, (want.view(torch.int16) - 1).view(HALVES[half]), want)
    nan = np.isnan(inputs)
    assert (result[nan] == 0x7FFF).all()
    assert (result[~nan] == want.view(torch.int16).numpy().view(U16)[~nan]).all()


# ---- matrix products: fragments laid out here as the PTX manual draws them

SHAPES = [
    ("m16n8k16.row.col.f32.bf16.bf16.f32", 16, 16, torch.bfloat16, torch.float32),
    ("m16n8k8.row.col.f32.bf16.bf16.f32", 16, 8, torch.bfloat16, torch.float32),
    ("m16n8k16.row.col.f32.f16.f16.f32", 16, 16, torch.float16, torch.float32),
    ("m16n8k16.row.col.f16.f16.f16.f16", 16, 16, torch.float16, torch.float16),
    ("m16n8k8.row.col.f32.tf32.tf32.f32", 16, 8, torch.float32, torch.float32),
    ("m16n8k4.row.col.f32.tf32.tf32.f32", 16, 4, torch.float32, torch.float32),
    ("m8n8k4.row.col.f64.f64.f64.f64", 8, 4, torch.float64, torch.float64),
    ("m16n8k32.row.col.s32.s8.s8.s32", 16, 32, torch.int8, torch.int32),
]


def fragments(rows: int, depth: int, pack: int) -> tuple[np.ndarray, ...]:
    """Row and column of each element: (lanes, registers, elements) of A and B, (lanes, 4) of C."""
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
    return (
        a_row,
        a_column,
        b_row,
        b_column,
        group[:, None] + 8 * (c // 2),
        quad[:, None] * 2 + c % 2,
    )


def registers(matrix: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix[row, column]).reshape(32, -1)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def test_matrix_product(shape):
    name, rows, depth, dtype, sum_type = shape
    generator = torch.Generator().manual_seed(depth)
    a, b, c = (
        torch.randint(-8, 9, s, generator=generator) for s in [(rows, depth), (depth, 8), (rows, 8)]
    )
    pack = 4 // dtype.itemsize if dtype.itemsize < 4 else 1
    a_row, a_column, b_row, b_column, c_row, c_column = fragments(rows, depth, pack)
    bits = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}

    def raw(x: torch.Tensor, kind: torch.dtype) -> np.ndarray:
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[kind.itemsize]
        return x.to(kind).view(integer).numpy()

    sums = raw(c, sum_type)
    parts = [registers(raw(a, dtype), a_row, a_column), registers(raw(b, dtype), b_row, b_column)]
    parts.append(registers(sums, c_row, c_column))
    word = 8 if dtype == torch.float64 else 4
    packed = np.concatenate([np.ascontiguousarray(p).view(bits[word]) for p in parts], axis=1)
    counts = [p.shape[1] * p.itemsize // word for p in parts]
    register = "%rd" if word == 8 else "%r"
    first = 8
    text = f"mul.wide.u32 %rd2, %r0, {packed.shape[1] * word};\nadd.s64 %rd2, %rd0, %rd2;\n"
    names, at = [], 0
    for count in counts:
        group = [f"{register}{first + at + i}" for i in range(count)]
        for i, x in enumerate(group):
            text += f"ld.global.b{8 * word} {x}, [%rd2+{word * (at + i)}];\n"
        names.append("{" + ", ".join(group) + "}")
        at += count
    target = names[2]
    text += f"mma.sync.aligned.{name} {target}, {names[0]}, {names[1]}, {names[2]};\n"
    for i, x in enumerate(target[1:-1].split(", ")):
        text += f"st.global.b{8 * word} [%rd2+{word * (at - counts[2] + i)}], {x};\n"
    launch = Emulator(kernel(text)).launch("k", [packed], 1, 32)
    assert launch.reports == ()
    got = np.ascontiguousarray(packed[:, -counts[2] :]).view(sums.dtype)
    want = raw(a.double() @ b.double() + c, sum_type)
    assert (got == want[c_row, c_column]).all()
