"""Cases of shifts, bit fields, logic, comparisons and moves."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from cases_integers import INTS, each, low_bits, size
from instruction_cases import Case, case, operation

BITS = ("b16", "b32", "b64")
COMPARISONS: dict[str, Callable] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def operand_type(kind: str) -> str:
    """Returns the operand type; that of an untyped instruction is unsigned."""
    return kind.replace("b", "u")


def logic(kind: str) -> list[Case]:
    one, two = " ".join([operand_type(kind)] * 2), " ".join([operand_type(kind)] * 3)
    return [
        operation(f"and.{kind}", two, lambda a, b: a & b),
        operation(f"or.{kind}", two, lambda a, b: a | b),
        operation(f"xor.{kind}", two, lambda a, b: a ^ b),
        operation(f"not.{kind}", one, lambda a: ~a),
        operation(f"cnot.{kind}", one, lambda a: a == 0),
    ]


def predicates(name: str, f: Callable) -> Case:
    code = "setp.ne.u32 %p0, {a}, 0;\nsetp.gt.s32 %p1, {b}, 4;\n"
    operands = "%p0;" if name == "not" else "%p0, %p1;"
    code += f"{name}.pred %p2, {operands}\nmov.pred %p3, %p2;\nselp.u32 {{d}}, 1, 0, %p3;"
    return case(code, "u32 u32 s32", lambda a, b: f(a != 0, b > 4))


def shifts(kind: str) -> list[Case]:
    bits, types = size(kind), f"{operand_type(kind)} {operand_type(kind)} amount"
    signed = kind.replace("b", "s")
    return [
        operation(f"shl.{kind}", types, each(lambda a, n: a << n if n < bits else 0)),
        operation(f"shr.{kind}", types, each(lambda a, n: a >> min(n, bits))),
        operation(f"shr.{operand_type(kind)}", types, each(lambda a, n: a >> min(n, bits))),
        operation(
            f"shr.{signed}", f"{signed} {signed} amount", each(lambda a, n: a >> min(n, bits))
        ),
    ]


def funnel(mode: str) -> list[Case]:
    def amount(n: int) -> int:
        return n % 32 if mode == "wrap" else min(n, 32)

    return [
        operation(
            f"shf.l.{mode}.b32",
            "u32 u32 u32 amount",
            each(lambda a, b, n: (b << 32 | a) << amount(n) >> 32),
        ),
        operation(
            f"shf.r.{mode}.b32",
            "u32 u32 u32 amount",
            each(lambda a, b, n: (b << 32 | a) >> amount(n)),
        ),
    ]


def select_bytes(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    result = 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = source[pick & 7]
        result |= ((255 if byte > 127 else 0) if pick & 8 else byte) << 8 * i
    return result


def truth_table(table: int) -> Case:
    def want(a: int, b: int, c: int) -> int:
        rows = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32)]
        return sum((table >> row & 1) << i for i, row in enumerate(rows))

    return operation("lop3.b32", "u32 u32 u32 u32", each(want), f", {table}")


def extracted_field(kind: str) -> Case:
    """Returns a case of bfe; bits past the top repeat the sign of the field's last existing bit."""
    bits, signed = size(kind), kind[0] == "s"

    def want(a: int, start: int, length: int) -> int:
        start, length = start % 256, length % 256
        if length == 0:
            return 0
        if start >= bits:
            return -(low_bits(a, bits) >> (bits - 1)) if signed else 0
        return low_bits(low_bits(a, bits) >> start, min(length, bits - start), signed)

    return operation(f"bfe.{kind}", f"{kind} {kind} amount amount", each(want))


def inserted_field(kind: str, start: int, length: int) -> Case:
    mask = low_bits(-1, length % 256) << start % 256
    code = f"bfi.{kind} {{d}}, {{a}}, {{b}}, {start}, {length};"
    types = " ".join([operand_type(kind)] * 3)
    return case(code, types, each(lambda a, b: b & ~mask | a << start % 256 & mask))


def top_bit(a: int) -> int:
    return (a if a >= 0 else ~a).bit_length() - 1


def positions(kind: str) -> list[Case]:
    return [
        operation(f"bfind.{kind}", f"u32 {kind}", each(top_bit)),
        operation(
            f"bfind.shiftamt.{kind}",
            f"u32 {kind}",
            each(lambda a: -1 if top_bit(a) < 0 else size(kind) - 1 - top_bit(a)),
        ),
    ]


def counts(kind: str) -> list[Case]:
    types, bits = f"u32 {operand_type(kind)}", size(kind)
    return [
        operation(f"popc.{kind}", types, each(lambda a: a.bit_count())),
        operation(f"clz.{kind}", types, each(lambda a: bits - a.bit_length())),
        operation(
            f"brev.{kind}",
            f"{operand_type(kind)} {operand_type(kind)}",
            each(lambda a: int(f"{a:0{bits}b}"[::-1], 2)),
        ),
    ]


def comparisons(kind: str) -> list[Case]:
    types, compared = f"u32 {kind} {kind}", dict(COMPARISONS)
    if kind[0] == "u":
        names = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
        compared |= {name: COMPARISONS[same] for name, same in names.items()}
    found = [
        case(f"setp.{name}.{kind} %p0, {{a}}, {{b}};\nselp.u32 {{d}}, 1, 0, %p0;", types, f)
        for name, f in compared.items()
    ]
    found += [
        combined(kind, name, f)
        for name, f in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor))
    ]
    found.append(
        operation(f"set.le.s32.{kind}", f"s32 {kind} {kind}", each(lambda a, b: -(a <= b)))
    )
    return found


def combined(kind: str, name: str, f: Callable) -> Case:
    """Returns a case with both results of a comparison, each combined with a negated predicate."""
    code = "setp.ne.u32 %p2, {c}, 4;\n"
    code += f"setp.lt.{name}.{kind} %p0|%p1, {{a}}, {{b}}, !%p2;\n"
    code += "selp.u32 %r13, 1, 0, %p0;\nselp.u32 {d}, 2, 0, %p1;\nor.b32 {d}, {d}, %r13;"
    want = each(lambda a, b, c: f(a < b, c == 4) + 2 * f(a >= b, c == 4))
    return case(code, f"u32 {kind} {kind} amount", want)


def chosen(kind: str) -> Case:
    code = f"setp.gt.u32 %p0, {{c}}, 32;\nselp.{kind} {{d}}, {{a}}, {{b}}, %p0;"
    types = f"{operand_type(kind)} {operand_type(kind)} {operand_type(kind)} amount"
    return case(code, types, lambda a, b, c: np.where(c > 32, a, b))


def moved(kind: str) -> Case:
    return operation(f"mov.{kind}", f"{operand_type(kind)} {operand_type(kind)}", lambda a: a)


MOVES = [
    case("mov.b32 {d}, {{a}, {b}};", "u32 u16 u16", lambda a, b: a | b << 16),
    case("mov.b64 {d}, {{a}, {b}};", "u64 u32 u32", lambda a, b: a | b << 32),
    case(
        "mov.b64 {d}, {{a}, {b}, 1, {a}};",
        "u64 u16 u16",
        lambda a, b: a | b << 16 | 1 << 32 | a << 48,
    ),
    case("mov.b32 {%h1, {d}}, {a};", "u16 u32", lambda a: a >> 16),
    case("mov.b64 {{d}, _}, {a};", "u32 u64", lambda a: a),
    case("mov.b64 {%h1, %h2, {d}, %h3}, {a};", "u16 u64", lambda a: a >> 32),
    case("mov.u32 {d}, -5;", "u32 u32", lambda a: 0 * a - 5),
    case("mov.f32 {d}, 0f3F800000;", "f32 f32", np.ones_like),
]
FIELDS = [(4, 8), (0, 64), (24, 16), (31, 1), (40, 30), (7, 0)]
CASES = [
    *(c for kind in BITS for c in logic(kind) + shifts(kind)),
    predicates("and", operator.and_),
    predicates("or", operator.or_),
    predicates("xor", operator.xor),
    predicates("not", lambda a, b: np.logical_not(a)),
    *funnel("wrap"),
    *funnel("clamp"),
    *(truth_table(table) for table in (0x96, 0x3C, 0xE8, 0x01, 0x80, 0xCA)),
    operation("prmt.b32", "u32 u32 u32 bytes", each(select_bytes)),
    *(
        c
        for kind in ("u32", "s32", "u64", "s64")
        for c in [extracted_field(kind), *positions(kind)]
    ),
    *(inserted_field(kind, *field) for kind in ("b32", "b64") for field in FIELDS),
    *(c for kind in ("b32", "b64") for c in counts(kind)),
    *(c for kind in INTS for c in comparisons(kind)),
    *(
        case(
            f"setp.{name}.{kind} %p0, {{a}}, {{b}};\nselp.u32 {{d}}, 1, 0, %p0;",
            f"u32 {operand_type(kind)} {operand_type(kind)}",
            COMPARISONS[name],
        )
        for kind in BITS
        for name in ("eq", "ne")
    ),
    *(chosen(kind) for kind in (*BITS, *INTS, "f32", "f64")),
    *(moved(kind) for kind in (*BITS, *INTS, "f32", "f64")),
    *MOVES,
]
