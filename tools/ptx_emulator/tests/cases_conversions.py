"""Cases of cvt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cases_integers import clip, each
from exact_arithmetic import clamp, flush, relu, round_array
from instruction_cases import Case, operation

INTS = tuple(f"{sign}{bits}" for bits in (8, 16, 32, 64) for sign in "us")
FLOATS, HALVES = ("f32", "f64"), ("f16", "bf16")
MODES = ("rn", "rz", "rm", "rp")
WHOLE: dict[str, Callable] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def between_ints(target: str, source: str) -> list[Case]:
    """Returns the plain conversion, and that with .sat if a value can exceed the target."""
    types, bits = f"{target} {source}", int(source[1:])
    found = []
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if source[0] == "s" else (0, 2**bits - 1)
    if any(clip(x, target) != x for x in ends):
        found.append(
            operation(f"cvt.sat.{types.replace(' ', '.')}", types, each(lambda a: clip(a, target)))
        )
    if target != source:
        found.append(operation(f"cvt.{types.replace(' ', '.')}", types, lambda a: a))
    return found


def to_int(target: str, source: str, mode: str, more: str = "") -> Case:
    """Rounds and clamps; NaN becomes 0, or the top bit alone if one of the types has 64 bits."""
    bits = int(target[1:])
    not_a_number = 2 ** (bits - 1) if source == "f64" or bits == 64 else 0
    top = 2.0**70  # exceeds every integer type

    def want(a: np.ndarray) -> np.ndarray:
        a = flush(a, source) if more else a
        rounded = np.clip(WHOLE[mode](a.astype("f8")), -top, top)
        values = (not_a_number if x != x else clip(int(x), target) for x in rounded.tolist())
        return np.array(list(values), object)

    return operation(f"cvt.{mode}{more}.{target}.{source}", f"{target} {source}", want)


def from_int(target: str, source: str, mode: str, more: str = "") -> Case:
    def want(a: np.ndarray) -> np.ndarray:
        rounded = round_array(a, target, mode)
        return clamp(rounded) if more else rounded

    return operation(f"cvt.{mode}{more}.{target}.{source}", f"{target} {source}", want)


def between_floats(target: str, source: str, mode: str = "", more: str = "") -> Case:
    """Converts a float; `mode` is empty if every value fits. .ftz applies to float32 only."""

    def want(a: np.ndarray) -> np.ndarray:
        if ".ftz" in more and source == "f32":
            a = flush(a, source)
        result = round_array(a, target, mode or "rn")
        result = flush(result, target) if ".ftz" in more and target == "f32" else result
        result = clamp(result) if ".sat" in more else result
        return relu(result) if ".relu" in more else result

    rounding = f".{mode}" if mode else ""
    return operation(f"cvt{rounding}{more}.{target}.{source}", f"{target} {source}", want)


def whole(kind: str, mode: str, more: str = "") -> Case:
    def want(a: np.ndarray) -> np.ndarray:
        result = WHOLE[mode](flush(a, kind) if ".ftz" in more else a)
        return clamp(result) if ".sat" in more else result

    return operation(f"cvt.{mode}{more}.{kind}.{kind}", f"{kind} {kind}", want)


def packed(kind: str, mode: str, more: str = "") -> Case:
    """Converts two floats to a pair of halves; the first one is the high half."""

    def want(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        pairs = round_array(np.stack([b, a], axis=1), kind, mode)
        return relu(pairs) if more else pairs

    return operation(f"cvt.{mode}{more}.{kind}x2.f32", f"{kind}x2 f32 f32", want)


def tf32(a: np.ndarray) -> np.ndarray:
    """Rounds the 13 low bits of a float away, ties away from zero."""
    bits = a.view("u4").astype(object)
    return np.where(np.isnan(a), 0x7FFFFFFF, bits + 0x1000 & 0xFFFFE000)


def tf32_even(a: np.ndarray) -> np.ndarray:
    bits = a.view("u4").astype(object)
    odd = each(lambda x: x >> 13 & 1)(bits)
    return np.where(np.isnan(a), 0x7FFFFFFF, bits + 0xFFF + odd & 0xFFFFE000)


def tf32_zero(a: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(a), 0x7FFFFFFF, a.view("u4").astype(object) & 0xFFFFE000)


CASES = [
    *(c for target in INTS for source in INTS for c in between_ints(target, source)),
    *(
        to_int(target, source, mode)
        for target in INTS
        for source in (*FLOATS, *HALVES)
        for mode in WHOLE
        if (target[1:], source) != ("8", "bf16")
    ),
    to_int("s32", "f32", "rmi", ".ftz"),
    to_int("u16", "f32", "rpi", ".ftz"),
    *(
        from_int(target, source, mode)
        for target in (*FLOATS, *HALVES)
        for source in INTS
        for mode in MODES
        if (target, source[1:]) != ("bf16", "8")
    ),
    from_int("f32", "s32", "rn", ".sat"),
    from_int("f16", "s16", "rn", ".sat"),
    between_floats("f64", "f32"),
    between_floats("f64", "f32", more=".ftz"),
    between_floats("f64", "f16"),
    between_floats("f32", "f16"),
    between_floats("f32", "f16", more=".ftz"),
    between_floats("f32", "f16", more=".sat"),
    between_floats("f32", "bf16"),
    between_floats("f32", "f32", more=".sat"),
    between_floats("f32", "f32", more=".ftz"),
    between_floats("f64", "f64", more=".sat"),
    between_floats("f16", "f16", more=".sat"),
    *(between_floats("f32", "f64", mode) for mode in MODES),
    *(between_floats("f32", "f64", mode, ".ftz") for mode in MODES),
    between_floats("f32", "f64", "rn", ".sat"),
    *(between_floats("f16", source, mode) for source in FLOATS for mode in MODES),
    *(between_floats("bf16", source, mode) for source in ("f64", "f16") for mode in MODES),
    between_floats("f64", "bf16"),
    between_floats("f16", "bf16", "rn"),
    *(between_floats(half, "f32", mode) for half in HALVES for mode in ("rn", "rz")),
    *(between_floats(half, "f32", mode, ".relu") for half in HALVES for mode in ("rn", "rz")),
    between_floats("f16", "f32", "rn", ".ftz"),
    between_floats("f16", "f32", "rn", ".sat"),
    between_floats("f16", "f64", "rn", ".sat"),
    *(whole(kind, mode) for kind in ("f32", "f64", "f16", "bf16") for mode in WHOLE),
    whole("f32", "rpi", ".ftz"),
    whole("f32", "rni", ".ftz.sat"),
    whole("f16", "rmi", ".sat"),
    *(
        packed(half, mode, more)
        for half in HALVES
        for mode in ("rn", "rz")
        for more in ("", ".relu")
    ),
    operation("cvt.rna.tf32.f32", "u32 f32", tf32),
    operation("cvt.rn.tf32.f32", "u32 f32", tf32_even),
    operation("cvt.rz.tf32.f32", "u32 f32", tf32_zero),
]
