"""Cases of single instructions: one kernel per case, compared with a function over arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from exact_arithmetic import round_array
from ptx_emulator import Emulator
from ptx_text import kernel, together

THREADS = 256
# type: register, suffixes of its load and store, numpy types of operands and results in memory
KINDS = {
    "s8": ("%h", "s8", "b16", "i1", "i2"),
    "u8": ("%h", "u8", "b16", "u1", "u2"),
    "s16": ("%h", "b16", "b16", "i2", "i2"),
    "u16": ("%h", "b16", "b16", "u2", "u2"),
    "s32": ("%r", "b32", "b32", "i4", "i4"),
    "u32": ("%r", "b32", "b32", "u4", "u4"),
    "s64": ("%rd", "b64", "b64", "i8", "i8"),
    "u64": ("%rd", "b64", "b64", "u8", "u8"),
    "f32": ("%f", "f32", "f32", "f4", "f4"),
    "f64": ("%d", "f64", "f64", "f8", "f8"),
    "f16": ("%h", "b16", "b16", "u2", "u2"),
    "bf16": ("%h", "b16", "b16", "u2", "u2"),
    "f16x2": ("%r", "b32", "b32", "u4", "u4"),
    "bf16x2": ("%r", "b32", "b32", "u4", "u4"),
    # u32 operands with other values: shift amounts, and selectors of bytes
    "amount": ("%r", "b32", "b32", "u4", "u4"),
    "bytes": ("%r", "b32", "b32", "u4", "u4"),
}
_COMMON = "0 -0.0 1 -1.5 3 inf -inf nan 0.1"
FLOATS = {
    "f32": [float(x) for x in f"{_COMMON} 1e30 -1e-30 1e-40 -1e-40 16777218".split()],
    "f64": [float(x) for x in f"{_COMMON} 1e300 -1e-300 1e-310 -1e-310 9007199254740992".split()],
}
_F16 = "0 8000 3C00 BE00 1 83FF 400 7BFF 7C00 FC00 7E01 2E66 3C01 1000"
_BF16 = "0 8000 3F80 BFC0 1 807F 80 7F7F 7F80 FF80 7FC1 3DCD 3F81 3B80"
# bits: zeros, subnormals, the largest values, infinities, NaN, 1, the value after 1, and ties
HALVES = {
    "f16": [int(x, 16) for x in _F16.split()],
    "bf16": [int(x, 16) for x in _BF16.split()],
}
INTS = [0, 1, -1, 2, 7, 31, 100, -128, 255, -256, 32767, -32768, 2**31 - 1, -(2**31), 12345678]
INTS += [-87654321, 2**63 - 1, -(2**63), 2**53 + 1, 0x123456789ABCDEF, -(2**40)]
AMOUNTS = [0, 1, 4, 8, 15, 16, 28, 31, 32, 33, 63, 64, 65, 255, 256, 2**32 - 1]
BYTES = [0x3210, 0x7654, 0x0246, 0x89AB, 0xFEDC, 0x7F80, 0x1111, 0xF3D5, 0xFFFF7610]


@dataclass(frozen=True)
class Case:
    """An instruction and its expected results.

    Attributes:
        code: PTX, in which {d} is the result and {a} {b} {c} are the operands.
        types: types of the result and the operands.
        want: the instruction over arrays. Integers are Python's and do not wrap, halves are
            float64, pairs of halves are two columns. The result is converted to its type.
        tolerance: relative error allowed; 0 requires the same bits.
    """

    code: str
    types: tuple[str, ...]
    want: Callable[..., np.ndarray]
    tolerance: float = 0.0

    def __str__(self) -> str:
        last = self.code.replace("\n", " ").split(" ")
        return "-".join(x for x in last if "." in x or x in ("and", "or"))


def case(code: str, types: str, want: Callable[..., np.ndarray]) -> Case:
    return Case(code, tuple(types.split()), want)


def operation(opcode: str, types: str, want: Callable[..., np.ndarray], tail: str = "") -> Case:
    """Returns the case of an instruction with its operands in order, followed by `tail`."""
    operands = ", ".join("{" + x + "}" for x in "dabc"[: len(types.split())])
    return case(f"{opcode} {operands}{tail};", types, want)


def body(c: Case) -> str:
    """Returns PTX that loads a thread's operands from b, c and d, and stores the result to a."""
    register, _, store, _, dtype = KINDS[c.types[0]]
    names = {"d": f"{register}5"}
    text = f"mov.u32 %r10, %ctaid.x;\nmad.lo.u32 %r0, %r10, {THREADS}, %r0;\n"
    for name, argument, kind in zip("abc", "bcd", c.types[1:], strict=False):
        register, load, _, operand_dtype, _ = KINDS[kind]
        names[name] = f"{register}{6 + 'abc'.index(name)}"
        text += f"ld.param.u64 %rd10, [{argument}];\nmul.wide.u32 %rd11, %r0, {operand_dtype[1]};\n"
        text += f"add.s64 %rd10, %rd10, %rd11;\nld.global.{load} {names[name]}, [%rd10];\n"
    code = c.code
    for name, value in names.items():
        code = code.replace("{" + name + "}", value)
    text += f"{code}\nmul.wide.u32 %rd11, %r0, {dtype[1]};\nadd.s64 %rd11, %rd0, %rd11;\n"
    return text + f"st.global.{store} [%rd11], {names['d']};"


def text(cases: list[Case]) -> str:
    """Returns a PTX file with the kernels `case0`, `case1` and so on."""
    four = ", ".join(f".param .u64 {x}" for x in "abcd")
    return together(
        *(kernel(body(c), four, name=f"case{i}") for i, c in enumerate(cases)), target="sm_90"
    )


def values(kind: str) -> np.ndarray:
    """Returns the values of an operand of a type, as in memory."""
    dtype = KINDS[kind][3]
    if kind in FLOATS:
        return np.array(FLOATS[kind], dtype)
    if kind in HALVES:
        return np.array(HALVES[kind], dtype)
    if kind.endswith("x2"):
        low = np.array(HALVES[kind[:-2]], "u2")
        return np.stack([low, np.roll(low, 5)], axis=1).view("u4").ravel()
    if kind == "amount":
        return np.array(AMOUNTS, dtype)
    if kind == "bytes":
        return np.array(BYTES, dtype)
    size = 8 * int(dtype[1])
    return np.array(sorted({x % 2**size for x in INTS}), f"u{dtype[1]}").view(dtype)


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Converts bits of halves to float64."""
    with np.errstate(invalid="ignore"):  # numpy warns of signalling NaNs
        if kind == "f16":
            return bits.view("f2").astype("f8")
        return (bits.astype("u4") << 16).view("f4").astype("f8")


def seen(raw: np.ndarray, kind: str) -> np.ndarray:
    """Converts memory of operands or results to values."""
    if kind in HALVES:
        return decode(raw.view("u2"), kind)
    if kind.endswith("x2"):
        return decode(raw.view("u2"), kind[:-2]).reshape(-1, 2)
    return raw if kind in FLOATS else raw.astype(object)


def wrapped(x: np.ndarray, kind: str) -> np.ndarray:
    """Wraps integers to the range of a type."""
    size = 32 if kind in ("amount", "bytes") else int(kind[1:])
    result = [int(v) % 2**size for v in np.ravel(x).tolist()]
    if kind[0] == "s":
        result = [v - 2**size if v >> (size - 1) else v for v in result]
    return np.array(result, object)


def same(got: np.ndarray, want: np.ndarray, tolerance: float = 0.0) -> np.ndarray:
    """Compares floats: the same bits, or within the tolerance; NaN equals NaN."""
    near = np.abs(got - want) <= tolerance * np.abs(want) if tolerance else got == want
    near |= got == want
    return (near & (np.signbit(got) == np.signbit(want))) | (np.isnan(got) & np.isnan(want))


def check(emulator: Emulator, name: str, c: Case) -> None:
    """Runs a case on all combinations of values of its operands."""
    grids = np.meshgrid(*(values(kind) for kind in c.types[1:]), indexing="ij")
    operands = [np.ascontiguousarray(x.ravel()) for x in grids]
    size = operands[0].size
    operands = [np.pad(x, (0, -size % THREADS), mode="wrap") for x in operands]
    kind = c.types[0]
    result = np.zeros(operands[0].size, KINDS[kind][4])
    pointers = [result, *operands, *[None] * (3 - len(operands))]
    launch = emulator.launch(name, pointers, result.size // THREADS, THREADS, outputs=[0])
    assert launch.reports == ()
    inputs = [seen(x[:size], k) for x, k in zip(operands, c.types[1:], strict=True)]
    got = seen(result[:size], kind)
    with np.errstate(all="ignore"):
        want = np.asarray(c.want(*inputs))
        if got.dtype == object:
            right = got == wrapped(want, kind)
        else:
            want = round_array(want, kind.removesuffix("x2"))
            right = same(got.astype("f8"), want, c.tolerance)
    right = right if right.ndim == 1 else right.all(1)
    wrong = [(*(x[i] for x in inputs), got[i], want[i]) for i in np.flatnonzero(~right)]
    assert not wrong, wrong[:5]
