"""Instruction forms: instructions whose result is one C++ expression of their operands."""

from __future__ import annotations

from dataclasses import dataclass

from ptx_emulator.operation import Operation, cpp_bool, cpp_type

FLOATS = frozenset(("f32", "f64"))
HALVES = frozenset(("f16", "bf16"))
HALF_PAIRS = frozenset(("f16x2", "bf16x2"))
INTS = frozenset(f"{sign}{bits}" for sign in "us" for bits in (16, 32, 64))
WIDE_INTS = INTS - {"u16", "s16"}
NARROW_INTS = INTS - {"u64", "s64"}
BITS = frozenset(("b16", "b32", "b64"))
WIDE_BITS = BITS - {"b16"}
# .approx and .full: the emulator computes the exact function
_ROUNDINGS = {"rn": "RN", "rz": "RZ", "rm": "RM", "rp": "RP", "approx": "RN", "full": "RN"}
FLOAT_MODIFIERS = frozenset((*_ROUNDINGS, "ftz", "sat"))


@dataclass(frozen=True)
class Form:
    """One form of an instruction.

    In `code`, {a} {b} {c} {d} are the operands after the destination, {T} is the C++ type of the
    operands (of one half, for a pair of halves), {R} the rounding mode, {F} and {S} are "true" if
    the instruction has .ftz and .sat.

    Attributes:
        types: types that the instruction may have.
        code: C++ expression of the result.
        needs: modifiers that the instruction must have.
        allows: further modifiers that the instruction may have.
        operands: C++ types of the operands after the destination; "T" is the instruction's type.
        result: C++ type of the result.
        kind: counter class.
        flops: floating-point operations per thread.
    """

    types: frozenset[str]
    code: str
    needs: frozenset[str] = frozenset()
    allows: frozenset[str] = frozenset()
    operands: str = "T T T T"
    result: str = "T"
    kind: str = "integer"
    flops: int = 0

    def fits(self, op: Operation) -> bool:
        """Checks if the form applies to the instruction's type and modifiers."""
        modifiers = set(op.modifiers)
        return (
            len(op.types) == 1
            and op.types[0] in self.types
            and self.needs <= modifiers <= self.needs | self.allows
        )

    def render(self, op: Operation) -> str:
        """Returns the C++ statement of an instruction that fits.

        Raises:
            UnsupportedInstruction: the instruction has another number of operands.
        """
        ptx_type = op.types[0]
        own_type = cpp_type(ptx_type)
        if len(op.operands) != self.arity + 1:
            raise op.unsupported(f"{len(op.operands)} operands")
        kinds = zip("abcd"[: self.arity], self.operands.split(), strict=False)
        arguments = {
            name: op.argument(i, own_type if kind == "T" else kind)
            for i, (name, kind) in enumerate(kinds, start=1)
        }
        code = self.code.format(
            T=ptx_type.removesuffix("x2") if ptx_type in HALF_PAIRS else own_type,
            R=next((_ROUNDINGS[m] for m in op.modifiers if m in _ROUNDINGS), "RN"),
            F=cpp_bool(op.has("ftz")),
            S=cpp_bool(op.has("sat")),
            **arguments,
        )
        result = own_type if self.result == "T" else self.result.format(T=own_type)
        return op.assign(op.operands[0], f"({result})({code})")

    @property
    def arity(self) -> int:
        """Number of operands after the destination."""
        return sum("{" + name + "}" in self.code for name in "abcd")


def names(*given: str) -> frozenset[str]:
    """Returns a set of types or modifiers."""
    return frozenset(given)


def binary(name: str, packed: bool = True) -> tuple[Form, ...]:
    """Returns the forms of a float operation on two operands.

    Args:
        name: add, sub, mul or div.
        packed: include the forms on halves and on pairs of halves.
    """
    forms = (
        Form(
            FLOATS | HALVES if packed else FLOATS,
            f"{name}_<{{T}}, {{R}}, {{F}}, {{S}}>({{a}}, {{b}})",
            allows=FLOAT_MODIFIERS,
            kind=name,
            flops=1,
        ),
    )
    if not packed:
        return forms
    call = f"[](auto x, auto y, auto) {{{{ return {name}_<{{T}}, RN, {{F}}, {{S}}>(x, y); }}}}"
    return (
        *forms,
        Form(
            HALF_PAIRS,
            f"pairwise<{{T}}>({call}, {{a}}, {{b}})",
            allows=names("rn", "ftz", "sat"),
            kind=name,
            flops=2,
        ),
    )


def extreme(name: str) -> tuple[Form, ...]:
    """Returns the forms of min or max; with .NaN the result is NaN if an operand is."""
    nan = names("NaN")
    call = "[](auto x, auto y, auto) {{{{ return {n}_<{{T}}, {w}, {{F}}>(x, y); }}}}"
    pair = f"pairwise<{{{{T}}}}>({call}, {{{{a}}}}, {{{{b}}}})"
    return (
        Form(INTS, f"{name}_<{{T}}, false, false>({{a}}, {{b}})"),
        Form(
            FLOATS | HALVES,
            f"{name}_<{{T}}, false, {{F}}>({{a}}, {{b}})",
            allows=names("ftz"),
            kind="float",
        ),
        Form(
            HALVES | {"f32"},
            f"{name}_<{{T}}, true, {{F}}>({{a}}, {{b}})",
            nan,
            names("ftz"),
            kind="float",
        ),
        Form(HALF_PAIRS, pair.format(n=name, w="false"), allows=names("ftz"), kind="float"),
        Form(HALF_PAIRS, pair.format(n=name, w="true"), nan, names("ftz"), kind="float"),
    )


def function(code: str, types: frozenset[str]) -> tuple[Form, ...]:
    """Returns the forms of a float function of one operand; `code` is its C++ expression of x."""
    lam = f"[](auto x) {{{{ return {code}; }}}}"
    one = f"unary_<{{R}}, {{F}}, {{S}}>({lam}, {{a}})"
    if not types & HALVES:
        return (Form(types, one, allows=FLOAT_MODIFIERS, kind="special"),)
    each = f"[](auto y, auto, auto) {{{{ return unary_<RN, {{F}}, false>({lam}, y); }}}}"
    return (
        Form(types, one, allows=FLOAT_MODIFIERS, kind="special"),
        Form(
            HALF_PAIRS,
            f"pairwise<{{T}}>({each}, {{a}})",
            allows=names("approx", "ftz"),
            kind="special",
        ),
    )


def sign_change(name: str) -> tuple[Form, ...]:
    """Returns the forms of `absolute` or `negative`."""
    signed = names("s16", "s32", "s64")
    pair = (
        f"pairwise<{{T}}>([](auto x, auto, auto) {{{{ return flush<{{F}}>({name}(x)); }}}}, {{a}})"
    )
    return (
        Form(signed, f"{name}<{{T}}>({{a}})"),
        Form(
            FLOATS | HALVES,
            f"flush<{{F}}>({name}<{{T}}>({{a}}))",
            allows=names("ftz"),
            kind="float",
        ),
        Form(HALF_PAIRS, pair, allows=names("ftz"), kind="float"),
    )


def logic(symbol: str, predicate: str) -> tuple[Form, ...]:
    """Returns the forms of a C++ operator on bits and of the one on predicates."""
    return (Form(BITS, f"{{a}} {symbol} {{b}}"), Form(names("pred"), f"{{a}} {predicate} {{b}}"))
