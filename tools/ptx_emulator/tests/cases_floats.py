"""Cases of arithmetic and functions on floats and halves."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from exact_arithmetic import arithmetic, flush, relu
from instruction_cases import Case, case, operation

FLOATS, HALVES, PAIRS = ("f32", "f64"), ("f16", "bf16"), ("f16x2", "bf16x2")
MODES = ("rn", "rz", "rm", "rp")
OPERANDS = {"add": 2, "sub": 2, "mul": 2, "div": 2, "fma": 3, "sqrt": 1, "rcp": 1}


def repeat(kind: str, count: int) -> str:
    return " ".join([kind] * (count + 1))


def computed(name: str, kind: str, mode: str = "rn", more: str = "") -> Case:
    """Returns a case of an instruction that rounds once; `more` may hold .ftz and .sat."""
    want = arithmetic(name, kind.removesuffix("x2"), mode, ".ftz" in more, ".sat" in more)
    return operation(f"{name}.{mode}{more}.{kind}", repeat(kind, OPERANDS[name]), want)


def rectified(kind: str, more: str = "") -> Case:
    fused = arithmetic("fma", kind.removesuffix("x2"), "rn", ".ftz" in more)
    return operation(
        f"fma.rn{more}.relu.{kind}", repeat(kind, 3), lambda a, b, c: relu(fused(a, b, c))
    )


def lesser(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the minimum; -0 is less than +0, and NaN if one of the two is."""
    return np.where(a == b, np.where(np.signbit(a), a, b), np.minimum(a, b))


def extreme(name: str, kind: str, more: str = "") -> Case:
    def want(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if ".ftz" in more:
            a, b = flush(a, kind.removesuffix("x2")), flush(b, kind.removesuffix("x2"))
        both = lesser(a, b) if name == "min" else -lesser(-a, -b)
        if ".NaN" in more:
            return both
        return np.where(np.isnan(a), b, np.where(np.isnan(b), a, both))

    return operation(f"{name}{more}.{kind}", repeat(kind, 2), want)


def sign_only(kind: str, more: str = "") -> list[Case]:
    def flushed(x: np.ndarray) -> np.ndarray:
        return flush(x, kind.removesuffix("x2")) if more else x

    return [
        operation(f"abs{more}.{kind}", repeat(kind, 1), lambda a: flushed(np.abs(a))),
        operation(f"neg{more}.{kind}", repeat(kind, 1), lambda a: flushed(-a)),
    ]


def approximate(opcode: str, kind: str, f: Callable, tolerance: float, more: str = "") -> Case:
    """Returns a case of a function that the hardware approximates, with a tolerance."""

    def want(*operands: np.ndarray) -> np.ndarray:
        inputs = [x.astype("f8") for x in operands]
        if not more:
            return f(*inputs)
        one = kind.removesuffix("x2")
        return flush(f(*(flush(x, one) for x in inputs)), one)

    count = 2 if opcode.startswith("div") else 1
    return replace(
        operation(f"{opcode}{more}.{kind}", repeat(kind, count), want), tolerance=tolerance
    )


ORDERED: dict[str, Callable] = {
    "eq": operator.eq,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}
UNORDERED: dict[str, Callable] = {
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": operator.ne,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


def comparisons(kind: str) -> list[Case]:
    types, compared = f"{kind} {kind}", ORDERED | UNORDERED
    found = [
        case(
            f"setp.{name}.{kind} %p0, {{a}}, {{b}};\nselp.u32 {{d}}, 1, 0, %p0;", f"u32 {types}", f
        )
        for name, f in compared.items()
    ]
    if kind in ("f32", "f16"):

        def flushed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return flush(a, kind) < flush(b, kind)

        code = f"setp.lt.ftz.{kind} %p0, {{a}}, {{b}};\nselp.u32 {{d}}, 1, 0, %p0;"
        found.append(case(code, f"u32 {types}", flushed))
    for result, yes in (("u32", 2**32 - 1), ("s32", -1), ("f32", 1.0)):
        if kind in FLOATS or result != "f32":
            found.append(
                operation(
                    f"set.gtu.{result}.{kind}",
                    f"{result} {types}",
                    lambda a, b, yes=yes: np.where(a <= b, 0, yes),
                )
            )
    if kind in HALVES:
        found.append(
            operation(f"set.ge.{kind}.{kind}", f"{kind} {types}", lambda a, b: (a >= b) * 1.0)
        )
    return found


def tests(kind: str) -> list[Case]:
    tiny = np.finfo(kind.replace("f", "float")).tiny
    properties: dict[str, Callable] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        # zeros count as normal
        "normal": lambda a: (np.abs(a) >= tiny) & np.isfinite(a) | (a == 0),
        "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }
    return [
        case(f"testp.{name}.{kind} %p0, {{a}};\nselp.u32 {{d}}, 1, 0, %p0;", f"u32 {kind}", f)
        for name, f in properties.items()
    ]


def functions() -> list[Case]:
    single: dict[str, Callable] = {
        "ex2": np.exp2,
        "lg2": np.log2,
        "sin": np.sin,
        "cos": np.cos,
        "rcp": lambda a: 1 / a,
        "sqrt": np.sqrt,
        "rsqrt": lambda a: 1 / np.sqrt(a),
    }
    found = [approximate("tanh.approx", "f32", np.tanh, 2.0**-22)]
    for more in ("", ".ftz"):
        found += [approximate(f"{x}.approx", "f32", f, 2.0**-22, more) for x, f in single.items()]
        found += [
            approximate("div.approx", "f32", np.divide, 2.0**-22, more),
            approximate("div.full", "f32", np.divide, 2.0**-22, more),
        ]
    # in float64 only 20 bits are exact
    for name in ("rcp", "rsqrt"):
        found.append(approximate(f"{name}.approx", "f64", single[name], 2.0**-20, ".ftz"))
    found.append(approximate("rsqrt.approx", "f64", single["rsqrt"], 2.0**-20))
    for kind, bits in (("f16", 10), ("bf16", 7)):
        found.append(approximate("tanh.approx", kind, np.tanh, 2.0**-bits))
        found.append(approximate("tanh.approx", kind + "x2", np.tanh, 2.0**-bits))
    found.append(approximate("ex2.approx", "f16", np.exp2, 2.0**-10))
    found.append(approximate("ex2.approx", "f16x2", np.exp2, 2.0**-10))
    found.append(approximate("ex2.approx", "bf16", np.exp2, 2.0**-7, ".ftz"))
    found.append(approximate("ex2.approx", "bf16x2", np.exp2, 2.0**-7, ".ftz"))
    return found


CASES = [
    *(computed(name, kind, mode) for name in OPERANDS for kind in FLOATS for mode in MODES),
    *(
        computed(name, "f32", mode, more)
        for name in OPERANDS
        for mode, more in [("rn", ".ftz"), ("rp", ".ftz")]
    ),
    *(
        computed(name, kind, "rn", more)
        for name in ("add", "sub", "mul", "fma")
        for kind, more in [
            ("f32", ".sat"),
            ("f32", ".ftz.sat"),
            *((half, more) for half in ("f16", "f16x2") for more in ("", ".ftz", ".sat")),
            *((half, "") for half in ("bf16", "bf16x2")),
        ]
    ),
    *(rectified(kind) for kind in (*HALVES, *PAIRS)),
    *(rectified(kind, ".ftz") for kind in ("f16", "f16x2")),
    operation("mad.rn.f32", repeat("f32", 3), arithmetic("fma", "f32")),
    operation("mad.rz.f64", repeat("f64", 3), arithmetic("fma", "f64", "rz")),
    operation("mad.rn.ftz.sat.f32", repeat("f32", 3), arithmetic("fma", "f32", "rn", True, True)),
    *(
        extreme(name, kind, more)
        for name in ("min", "max")
        for kind, more in [
            ("f64", ""),
            *(
                (kind, more)
                for kind in ("f32", "f16", "f16x2")
                for more in ("", ".ftz", ".NaN", ".ftz.NaN")
            ),
            *((kind, more) for kind in ("bf16", "bf16x2") for more in ("", ".NaN")),
        ]
    ),
    *(c for kind in (*FLOATS, *HALVES, *PAIRS) for c in sign_only(kind)),
    *(c for kind in ("f32", "f16", "f16x2") for c in sign_only(kind, ".ftz")),
    *(
        operation(f"copysign.{kind}", repeat(kind, 2), lambda a, b: np.copysign(b, a))
        for kind in FLOATS
    ),
    *(c for kind in (*FLOATS, *HALVES) for c in comparisons(kind)),
    *(c for kind in FLOATS for c in tests(kind)),
    *functions(),
]
