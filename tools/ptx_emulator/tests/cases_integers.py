"""Cases of integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from instruction_cases import Case, case, operation

INTS = ("u16", "s16", "u32", "s32", "u64", "s64")


def each(f: Callable) -> Callable[..., np.ndarray]:
    """Returns f of Python integers as a function over arrays."""
    return np.frompyfunc(f, f.__code__.co_argcount, 1)


def size(kind: str) -> int:
    return int(kind[1:])


def low_bits(x: int, bits: int, sign: bool = False) -> int:
    x %= 2**bits
    return x - 2**bits if sign and x >> (bits - 1) else x


def quotient(a: int, b: int) -> int:
    """Divides towards zero; a division by zero returns all ones, as on the hardware."""
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def clip(x: int, kind: str) -> int:
    half = 2 ** (size(kind) - 1)
    return min(max(x, -half), half - 1) if kind[0] == "s" else min(max(x, 0), 2 * half - 1)


def plain(kind: str) -> list[Case]:
    two, three, bits = " ".join([kind] * 3), " ".join([kind] * 4), size(kind)
    found = [
        operation(f"add.{kind}", two, lambda a, b: a + b),
        operation(f"sub.{kind}", two, lambda a, b: a - b),
        operation(f"mul.lo.{kind}", two, lambda a, b: a * b),
        operation(f"mul.hi.{kind}", two, lambda a, b: a * b >> bits),
        operation(f"mad.lo.{kind}", three, lambda a, b, c: a * b + c),
        operation(f"mad.hi.{kind}", three, lambda a, b, c: (a * b >> bits) + c),
        operation(f"div.{kind}", two, each(quotient)),
        operation(f"rem.{kind}", two, each(lambda a, b: a - b * quotient(a, b) if b else a)),
        operation(f"sad.{kind}", three, lambda a, b, c: abs(a - b) + c),
        operation(f"min.{kind}", two, np.minimum),
        operation(f"max.{kind}", two, np.maximum),
    ]
    if bits < 64:
        wide = f"{kind[0]}{2 * bits}"
        types = f"{wide} {kind} {kind}"
        found.append(operation(f"mul.wide.{kind}", types, lambda a, b: a * b))
        found.append(operation(f"mad.wide.{kind}", f"{types} {wide}", lambda a, b, c: a * b + c))
    if kind[0] == "s":
        found.append(operation(f"abs.{kind}", f"{kind} {kind}", np.abs))
        found.append(operation(f"neg.{kind}", f"{kind} {kind}", np.negative))
    return found


def saturated() -> list[Case]:
    three = "s32 s32 s32"
    return [
        operation("add.sat.s32", three, each(lambda a, b: clip(a + b, "s32"))),
        operation("sub.sat.s32", three, each(lambda a, b: clip(a - b, "s32"))),
        operation(
            "mad.hi.sat.s32", f"{three} s32", each(lambda a, b, c: clip((a * b >> 32) + c, "s32"))
        ),
    ]


def carries(kind: str) -> list[Case]:
    """Returns cases of the carry flag, which passes from one instruction to the next."""
    bits = size(kind)
    register = "%r13" if bits == 32 else "%rd13"
    two, three = " ".join([kind] * 3), " ".join([kind] * 4)

    def low(x: int) -> int:
        return low_bits(x, bits)

    def after(first: str, second: str) -> str:
        return f"{first}.{kind} {register}, {second};\n"

    def borrowed(a: int, b: int) -> int:
        return 7 - (low(b) < low(a) + (low(a) < low(b)))

    def high_product(a: int, b: int, c: int) -> int:
        return (a * b >> bits) + c + (low(a * b) + low(c) >> bits)

    def low_product(a: int, b: int, c: int) -> int:
        return a * b + c + (low(a * b >> bits) + low(c) >> bits)

    return [
        case(
            after("add.cc", "{a}, {b}") + f"addc.{kind} {{d}}, {{b}}, 5;",
            two,
            each(lambda a, b: b + 5 + (low(a) + low(b) >> bits)),
        ),
        case(
            after("sub.cc", "{a}, {b}") + f"subc.{kind} {{d}}, {{b}}, 5;",
            two,
            each(lambda a, b: b - 5 - (low(a) < low(b))),
        ),
        case(
            after("add.cc", "{a}, {b}")
            + after("addc.cc", "{a}, {b}")
            + f"addc.{kind} {{d}}, 0, 0;",
            two,
            each(lambda a, b: low(a) + low(b) + (low(a) + low(b) >> bits) >> bits),
        ),
        case(
            after("sub.cc", "{a}, {b}")
            + after("subc.cc", "{b}, {a}")
            + f"subc.{kind} {{d}}, 7, 0;",
            two,
            each(borrowed),
        ),
        case(
            after("mad.lo.cc", "{a}, {b}, {c}") + f"madc.hi.{kind} {{d}}, {{a}}, {{b}}, {{c}};",
            three,
            each(high_product),
        ),
        case(
            after("mad.hi.cc", "{a}, {b}, {c}") + f"madc.lo.{kind} {{d}}, {{a}}, {{b}}, {{c}};",
            three,
            each(low_product),
        ),
    ]


def dot4(a_kind: str, b_kind: str) -> Case:
    kind = "s32" if "s" in a_kind + b_kind else "u32"

    def want(a: int, b: int, c: int) -> int:
        for i in range(0, 32, 8):
            c += low_bits(a >> i, 8, a_kind == "s32") * low_bits(b >> i, 8, b_kind == "s32")
        return c

    return operation(f"dp4a.{a_kind}.{b_kind}", f"{kind} {a_kind} {b_kind} {kind}", each(want))


CASES = [
    *(c for kind in INTS for c in plain(kind)),
    *saturated(),
    *(c for kind in ("u32", "s32", "u64", "s64") for c in carries(kind)),
    *(dot4(a, b) for a in ("u32", "s32") for b in ("u32", "s32")),
    operation("mul24.lo.u32", "u32 u32 u32", each(lambda a, b: low_bits(a, 24) * low_bits(b, 24))),
    operation(
        "mul24.lo.s32",
        "s32 s32 s32",
        each(lambda a, b: low_bits(a, 24, True) * low_bits(b, 24, True)),
    ),
]
