"""Warp operations, compared with their definition for each lane in the PTX manual."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest

from ptx_emulator import Emulator
from ptx_text import kernel, together

ALL = 2**32 - 1
MASKS = (ALL, 0x0000FFFF, 0x0F0F1248, 1 << 31)
PARAMETERS = ".param .u64 a, .param .u64 b, .param .u32 mask, .param .u32 m, .param .u32 n"
# only the lanes of the mask run; %rd5, %r5 and %p1 are the lane's value, %r6 and %r7 the results
START = """ld.param.u32 %r2, [mask];
shr.u32 %r3, %r2, %r0;
and.b32 %r3, %r3, 1;
setp.eq.u32 %p0, %r3, 0;
@%p0 bra END;
ld.param.u64 %rd3, [b];
mul.wide.u32 %rd4, %r0, 8;
add.s64 %rd3, %rd3, %rd4;
ld.global.b64 %rd5, [%rd3];
cvt.u32.u64 %r5, %rd5;
setp.ne.u32 %p1, %r5, 0;
ld.param.u32 %r8, [m];
ld.param.u32 %r9, [n];
mov.u32 %r7, 0;
"""
FINISH = """
add.s64 %rd6, %rd0, %rd4;
st.global.v2.u32 [%rd6], {%r6, %r7};
END:
"""
SHUFFLES = ("up", "down", "bfly", "idx")
VOTES = ("all", "any", "uni", "ballot")
REDUCTIONS: dict[str, Callable[[int, int], int]] = {
    "add": lambda x, y: x + y,
    "min": min,
    "max": max,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
}
REDUCED = [
    *((name, kind) for name in ("add", "min", "max") for kind in ("u32", "s32")),
    *((name, "b32") for name in ("and", "or", "xor")),
]
MATCHES = [("any", "b32"), ("any", "b64"), ("all", "b32"), ("all", "b64")]
LANE_MASKS: dict[str, Callable[[int], int]] = {
    "eq": lambda lane: 1 << lane,
    "lt": lambda lane: (1 << lane) - 1,
    "le": lambda lane: (2 << lane) - 1,
    "gt": lambda lane: ALL - ((2 << lane) - 1),
    "ge": lambda lane: ALL - ((1 << lane) - 1),
}
FLAG = "selp.u32 %r7, 1, 0, %p2;"
# n is the control operand; the amount is m, or the lane's value if the top bit of n is set
SHUFFLE = "shr.u32 %r10, %r9, 31;\nsetp.ne.u32 %p3, %r10, 0;\nselp.u32 %r8, %r5, %r8, %p3;\n"
SHUFFLE += "and.b32 %r9, %r9, 0x7fffffff;\nshl.b32 %r11, %r5, 8;\n"


def text() -> str:
    codes = {
        name: f"{SHUFFLE}shfl.sync.{name}.b32 %r6|%p2, %r11, %r8, %r9, %r2;\n{FLAG}"
        for name in SHUFFLES
    }
    for name in VOTES:
        for sign in "", "!":
            vote = (
                f"vote.sync.{name}.{'b32 %r6' if name == 'ballot' else 'pred %p2'}, {sign}%p1, %r2;"
            )
            flag = "" if name == "ballot" else "selp.u32 %r6, 1, 0, %p2;"
            codes[f"vote_{name}{'_not' * len(sign)}"] = f"{vote}\n{flag}"
    for name, kind in REDUCED:
        codes[f"redux_{name}_{kind}"] = f"redux.sync.{name}.{kind} %r6, %r5, %r2;"
    for name, kind in MATCHES:
        value = "%rd5" if kind == "b64" else "%r5"
        target, flag = ("%r6|%p2", FLAG) if name == "all" else ("%r6", "")
        codes[f"match_{name}_{kind}"] = f"match.{name}.sync.{kind} {target}, {value}, %r2;\n{flag}"
    for name in LANE_MASKS:
        codes[f"mask_{name}"] = f"mov.u32 %r6, %lanemask_{name};\nmov.u32 %r7, %laneid;"
    codes["active"] = "activemask.b32 %r6;\nbar.warp.sync %r2;"
    return together(
        *(kernel(START + code + FINISH, PARAMETERS, name=name) for name, code in codes.items())
    )


@pytest.fixture(scope="module")
def emulator():
    return Emulator(text())


def run(emulator: Emulator, name: str, values, mask: int = ALL, m: int = 0, n: int = 0):
    """Returns both results of each lane; they are 0 for lanes outside of the mask."""
    result = np.zeros((32, 2), "u4")
    inputs = np.array([v % 2**64 for v in values], "u8")
    launch = emulator.launch(name, [result, inputs, mask, m, n], 1, 32, seed=mask % 7)
    assert launch.reports == ()
    return result.tolist()


def lanes(mask: int) -> list[int]:
    return [lane for lane in range(32) if mask >> lane & 1]


def expected(mask: int, one: Callable[[int], tuple[int, int]]) -> list[list[int]]:
    return [[x % 2**32 for x in one(i)] if mask >> i & 1 else [0, 0] for i in range(32)]


def source_lane(name: str, lane: int, amount: int, control: int) -> tuple[int, bool]:
    """Returns the lane that shfl reads from, and if it lies in the segment."""
    clamp, segment, amount = control & 31, control >> 8 & 31, amount & 31
    low = lane & segment
    limit = low | clamp & ~segment
    source = {
        "up": lane - amount,
        "down": lane + amount,
        "bfly": lane ^ amount,
        "idx": low | amount & ~segment,
    }[name]
    inside = source >= limit if name == "up" else source <= limit
    return (source if inside else lane), inside


@pytest.mark.parametrize("width", [32, 16, 8, 4, 2])
@pytest.mark.parametrize("name", SHUFFLES)
def test_shuffle(emulator, name, width):
    values = [(7 * lane + 3) % 32 for lane in range(32)]
    for clamp in (0,) if name == "up" else (31, 5):
        for amount in (0, 1, 3, width - 1, 31, 33, None):  # None: the value of each lane
            control = (32 - width) << 8 | clamp | (amount is None) << 31

            def one(lane: int, amount=amount, control=control) -> tuple[int, int]:
                by = values[lane] if amount is None else amount
                source, inside = source_lane(name, lane, by, control)
                return values[source] << 8, inside

            assert run(emulator, name, values, m=amount or 0, n=control) == expected(ALL, one)


def test_shuffle_within_half_of_the_lanes(emulator):
    mask = 0xFFFF0000
    want = expected(mask, lambda lane: ((lane ^ 8) << 8, 1))
    assert run(emulator, "bfly", range(32), mask, 8, 31) == want


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize("name", VOTES)
def test_vote(emulator, name, negated, mask):
    for values in ([0] * 32, [5] * 32, [lane % 3 for lane in range(32)]):
        yes = [lane for lane in lanes(mask) if (values[lane] != 0) != negated]
        answer = {
            "all": yes == lanes(mask),
            "any": bool(yes),
            "uni": len(yes) in (0, len(lanes(mask))),
            "ballot": sum(1 << lane for lane in yes),
        }[name]
        got = run(emulator, f"vote_{name}{'_not' * negated}", values, mask)
        assert got == expected(mask, lambda lane, x=answer: (x, 0))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("name", "kind"), REDUCED)
def test_reduction(emulator, name, kind, mask):
    sign = 2**31 if kind == "s32" else 0
    values = [(x * 2654435761 + 12345) % 2**32 for x in range(32)]
    numbers = [(values[lane] + sign) % 2**32 - sign for lane in lanes(mask)]
    answer = reduce(REDUCTIONS[name], numbers)
    got = run(emulator, f"redux_{name}_{kind}", values, mask)
    assert got == expected(mask, lambda lane: (answer, 0))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("name", "kind"), MATCHES)
def test_match(emulator, name, kind, mask):
    # values that differ in their high words only, equal values, and groups of equal values
    for values in (
        [lane % 2 << 40 for lane in range(32)],
        [9] * 32,
        [lane % 5 for lane in range(32)],
    ):
        seen = [v if kind == "b64" else v % 2**32 for v in values]

        def one(lane: int, seen=seen) -> tuple[int, int]:
            equal = sum(1 << other for other in lanes(mask) if seen[other] == seen[lane])
            if name == "any":
                return equal, 0
            return (mask, 1) if equal == mask else (0, 0)

        assert run(emulator, f"match_{name}_{kind}", values, mask) == expected(mask, one)


@pytest.mark.parametrize("name", LANE_MASKS)
def test_lane_masks(emulator, name):
    want = expected(ALL, lambda lane: (LANE_MASKS[name](lane), lane))
    assert run(emulator, f"mask_{name}", range(32)) == want


def test_activemask_names_the_lane_itself_and_no_lane_that_left(emulator):
    for lane, (active, _) in enumerate(run(emulator, "active", range(32), 0x00FF00FF)):
        taking_part = 0x00FF00FF >> lane & 1
        assert (active >> lane & 1) == taking_part
        assert active & ~0x00FF00FF == 0
