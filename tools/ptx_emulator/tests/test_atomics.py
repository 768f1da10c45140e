"""atom and red: every operation and type in every state space, and contended atomics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from exact_arithmetic import arithmetic, round_array
from instruction_cases import KINDS, same, seen, values
from ptx_emulator import Emulator
from ptx_text import kernel, together

PARAMETERS = ".param .u64 a, .param .u64 b, .param .u64 c"
SPACES = ("global", "shared", "generic")
WHOLE: dict[str, Callable] = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "inc": lambda old, x: 0 if old >= x else old + 1,
    "dec": lambda old, x: x if old == 0 or old > x else old - 1,
    "cas": lambda old, x: ~old if old == x else old,
}
FORMS = [
    *(("add", kind) for kind in ("u32", "s32", "u64", "f32", "f64")),
    *(("add.noftz", kind) for kind in ("f16", "bf16", "f16x2", "bf16x2")),
    *((name, kind) for name in ("min", "max") for kind in ("u32", "s32", "u64", "s64")),
    *((name, kind) for name in ("and", "or", "xor", "exch") for kind in ("b32", "b64")),
    ("inc", "u32"),
    ("dec", "u32"),
    *(("cas", kind) for kind in ("b16", "b32", "b64")),
]
CASES = [
    (space, name, kind, returns)
    for space in SPACES
    for name, kind in FORMS
    for returns in (True, False)
    if returns or name not in ("exch", "cas")
]
PLACES = {
    "global": "mov.u64 %rd5, %rd4;\n",
    "shared": "mov.u64 %rd5, s;\nadd.s64 %rd5, %rd5, %rd2;\n",
    "generic": "mov.u64 %rd5, s;\nadd.s64 %rd5, %rd5, %rd2;\ncvta.shared.u64 %rd5, %rd5;\n",
}


def typed(kind: str) -> str:
    return "u" + kind[1:] if kind[0] == "b" and kind[1:].isdigit() else kind


def title(space: str, name: str, kind: str, returns: bool) -> str:
    return "_".join(["atom" if returns else "red", space, *name.split("."), kind])


def changed(space: str, name: str, kind: str, returns: bool) -> str:
    """Returns a kernel that changes the values in `a` by operands in `b`; old values go to `c`."""
    register, _, _, size, _ = KINDS[typed(kind)]
    bits, old, operand, got = f"b{8 * int(size[1])}", *(f"{register}{i}" for i in (6, 7, 8))
    where = "" if space == "generic" else f".{space}"
    text = (
        f"ld.param.u64 %rd3, [b];\nld.param.u64 %rd10, [c];\nmul.wide.u32 %rd2, %r0, {size[1]};\n"
    )
    text += "add.s64 %rd3, %rd3, %rd2;\nadd.s64 %rd4, %rd0, %rd2;\nadd.s64 %rd10, %rd10, %rd2;\n"
    text += f"{PLACES[space]}ld.global.{bits} {old}, [%rd4];\nld.global.{bits} {operand}, [%rd3];\n"
    if space != "global":
        text += f"st{where}.{bits} [%rd5], {old};\n"
    if name == "cas":
        text += f"not.{bits} {old}, {operand};\n"
        operand = f"{operand}, {old}"
    if returns:
        text += f"atom{where}.{name}.{kind} {got}, [%rd5], {operand};\n"
        text += f"st.global.{bits} [%rd10], {got};\n"
    else:
        text += f"red{where}.{name}.{kind} [%rd5], {operand};\n"
    if space != "global":
        text += f"ld{where}.{bits} {got}, [%rd5];\nst.global.{bits} [%rd4], {got};\n"
    return kernel(text, PARAMETERS, shared=4096, name=title(space, name, kind, returns))


# all threads of all blocks: a counter, a maximum, a wrapping counter, and a compare-and-swap loop
CONTENDED = """atom.global.add.u32 %r5, [%rd0], 1;
mov.u32 %r6, 0;
red.relaxed.gpu.global.max.u32 [%rd0+4], %r5;
atom.global.inc.u32 %r7, [%rd0+8], 9;
LOOP:
ld.volatile.global.u32 %r8, [%rd0+12];
mul.lo.u32 %r9, %r8, 3;
add.u32 %r9, %r9, 1;
atom.acq_rel.gpu.global.cas.b32 %r10, [%rd0+12], %r8, %r9;
setp.ne.u32 %p0, %r10, %r8;
@%p0 bra LOOP;
ld.param.u64 %rd2, [b];
mul.wide.u32 %rd3, %r5, 4;
add.s64 %rd2, %rd2, %rd3;
st.global.u32 [%rd2], %r7;"""


def text() -> str:
    return together(
        *(changed(*c) for c in CASES),
        kernel(CONTENDED, ".param .u64 a, .param .u64 b", name="contended"),
        target="sm_90",
    )


@pytest.fixture(scope="module")
def emulator():
    return Emulator(text())


def pairs(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns old values and operands, without subnormal floats, which the hardware may flush."""
    one = values(typed(kind))
    if kind in ("f32", "f64"):
        one = one[~((np.abs(one) < 1e-37) & (one != 0))]
    grids = np.meshgrid(one, one, indexing="ij")
    old, operand = (np.ascontiguousarray(x.ravel()) for x in grids)
    return old, operand


@pytest.mark.parametrize(("space", "name", "kind", "returns"), CASES)
def test_atomic(emulator, space, name, kind, returns):
    old, operand = pairs(kind)
    memory, got = old.copy(), np.zeros_like(old)
    launch = emulator.launch(
        title(space, name, kind, returns), [memory, operand, got], 1, len(old), seed=3
    )
    assert launch.reports == ()
    plain, x = seen(old, typed(kind)), seen(operand, typed(kind))
    if "f" in kind:
        one = kind.removesuffix("x2")
        with np.errstate(all="ignore"):
            want = round_array(arithmetic("add", one)(plain, x), one)
        assert same(seen(memory, kind).astype("f8"), want).all()
    else:
        bits = 2 ** int(kind[1:])
        want = np.array([WHOLE[name](p, q) % bits for p, q in zip(plain, x, strict=True)], object)
        assert (seen(memory, typed(kind)) % bits == want).all()
    assert got.tobytes() == (old.tobytes() if returns else bytes(got.nbytes))


def test_contended_atomics(emulator):
    a, b = np.zeros(4, "u4"), np.zeros(192, "u4")
    launch = emulator.launch("contended", [a, b], 3, 64, seed=8, outputs=[1])
    assert {r.kind for r in launch.reports} <= {"global-race", "block-race"}  # of the plain reads
    state = 0
    for _ in range(192):
        state = (3 * state + 1) % 2**32
    assert a.tolist() == [192, 191, 192 % 10, state]
    assert (b == np.arange(192) % 10).all()
