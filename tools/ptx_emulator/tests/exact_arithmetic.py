"""Exact floating-point arithmetic: results as fractions, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

# significant bits, exponent of the smallest subnormal, largest exponent
FORMATS = {
    "f16": (11, -24, 15),
    "bf16": (8, -133, 127),
    "f32": (24, -149, 127),
    "f64": (53, -1074, 1023),
}


def round_fraction(x: Fraction, kind: str, mode: str) -> float:
    """Rounds x != 0 to the type `kind` in mode rn, rz, rm, rp, or rna (ties away from zero)."""
    bits, least, largest = FORMATS[kind]
    sign, x = (-1 if x < 0 else 1), abs(x)
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if x < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - bits + 1, least)
    whole, rest = divmod(x / unit, 1)
    half = Fraction(1, 2)
    up = {
        "rn": rest > half or (rest == half and whole % 2 == 1),
        "rna": rest >= half,
        "rz": False,
        "rm": rest > 0 and sign < 0,
        "rp": rest > 0 and sign > 0,
    }[mode]
    value = (whole + up) * unit
    top = (2 - Fraction(2) ** (1 - bits)) * 2**largest
    if value > top:
        to_infinity = mode in ("rn", "rna") or mode == ("rm" if sign < 0 else "rp")
        return sign * (math.inf if to_infinity else float(top))
    return math.copysign(float(value), sign)


def root(x: Fraction) -> Fraction:
    """Returns the square root, precise enough to be rounded to any format."""
    scaled = (x.numerator << 2400) // x.denominator
    whole = math.isqrt(scaled)
    inexact = whole * whole * x.denominator != x.numerator << 2400
    return Fraction(2 * whole + inexact, 2 << 1200)


def round_array(x: np.ndarray, kind: str, mode: str = "rn") -> np.ndarray:
    """Rounds floats or integers to the type `kind`; the result is float64."""
    flat = [
        round_fraction(Fraction(v), kind, mode) if v and math.isfinite(v) else float(v)
        for v in np.ravel(x).tolist()
    ]
    return np.array(flat, np.float64).reshape(np.shape(x))


def flush(x: np.ndarray, kind: str) -> np.ndarray:
    """Replaces subnormals by zeros of the same sign."""
    bits, least, _ = FORMATS[kind]
    return np.where(np.abs(x) < 2.0 ** (least + bits - 1), np.copysign(0.0, x), x)


def clamp(x: np.ndarray) -> np.ndarray:
    """Clamps to [0, 1] as .sat does; NaN becomes 0."""
    return np.where(x > 0, np.minimum(x, 1), 0.0)


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), x, np.where(x > 0, x, 0.0))


# name: the exact value, and the operands whose signs change its sign
OPERATIONS: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "add": (lambda a, b: a + b, (0, 1)),
    "sub": (lambda a, b: a - b, (0, 1)),
    "mul": (lambda a, b: a * b, (0,)),
    "div": (lambda a, b: a / b, (0,)),
    "rcp": (lambda a: 1 / a, (0,)),
    "fma": (lambda a, b, c: a * b + c, (0, 2)),
    "sqrt": (lambda a: root(a) if isinstance(a, Fraction) else np.sqrt(a), ()),
}


def one(name: str, values: tuple[float, ...], kind: str, mode: str) -> float:
    f, flips = OPERATIONS[name]
    finite = all(map(math.isfinite, values))
    if finite and not (name == "sqrt" and values[0] < 0):
        try:
            exact = f(*map(Fraction, values))
        except ZeroDivisionError:
            exact = Fraction(0)
        if exact:
            return round_fraction(exact, kind, mode)
    else:
        # next to an infinity or NaN only the sign of a number matters
        values = tuple(math.copysign(1, v) if v and math.isfinite(v) else v for v in values)
    if mode == "rm" and flips:  # zero sums are -0: computed as the negative of a rounded-up value
        negated = (-v if i in flips else v for i, v in enumerate(values))
        return -float(f(*map(np.float64, negated)))
    return float(f(*map(np.float64, values)))


def arithmetic(
    name: str, kind: str, mode: str = "rn", ftz: bool = False, sat: bool = False
) -> Callable[..., np.ndarray]:
    """Returns an operation over arrays of values of `kind`; its results are float64."""

    def want(*operands: np.ndarray) -> np.ndarray:
        inputs = [flush(x, kind) if ftz else x for x in operands]
        flat = zip(*(np.ravel(x).tolist() for x in inputs), strict=True)
        result = np.array([one(name, v, kind, mode) for v in flat])
        result = result.reshape(operands[0].shape)
        result = flush(result, kind) if ftz else result
        return clamp(result) if sat else result

    return want
