"""One instruction's place in the C++: its types, modifiers and operands as expressions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from ptx_emulator.parser import (
    SIZES,
    Address,
    Immediate,
    Instruction,
    Operand,
    PtxError,
    Register,
    Vector,
)

SPECIAL = {
    **{f"%tid.{d}": f"t.{d}" for d in "xyz"},
    **{f"%ntid.{d}": f"t.launch->size[{i}]" for i, d in enumerate("xyz")},
    **{f"%ctaid.{d}": f"t.place->{d}" for d in "xyz"},
    **{f"%nctaid.{d}": f"t.launch->grid[{i}]" for i, d in enumerate("xyz")},
    **{
        f"%cluster_ctaid.{d}": f"(t.place->{d} % t.launch->cluster[{i}])"
        for i, d in enumerate("xyz")
    },
    **{f"%cluster_nctaid.{d}": f"t.launch->cluster[{i}]" for i, d in enumerate("xyz")},
    **{f"%clusterid.{d}": f"(t.place->{d} / t.launch->cluster[{i}])" for i, d in enumerate("xyz")},
    **{
        f"%nclusterid.{d}": f"(t.launch->grid[{i}] / t.launch->cluster[{i}])"
        for i, d in enumerate("xyz")
    },
    "%cluster_ctarank": "t.place->rank",
    "%cluster_nctarank": "t.launch->blocks_a_cluster()",
    "%is_explicit_cluster": "(t.launch->blocks_a_cluster() > 1)",
    **dict.fromkeys(("%globaltimer", "%clock64"), "tick(t)"),
    **dict.fromkeys(("%globaltimer_lo", "%clock"), "(u32)tick(t)"),
    "%laneid": "t.lane",
    "%warpid": "t.warp",
    "%nwarpid": "((t.place->count + 31) / 32)",
    "%lanemask_eq": "(1u << t.lane)",
    "%lanemask_lt": "((1u << t.lane) - 1)",
    "%lanemask_le": "((2u << t.lane) - 1)",
    "%lanemask_gt": "~((2u << t.lane) - 1)",
    "%lanemask_ge": "~((1u << t.lane) - 1)",
    "%dynamic_smem_size": "t.launch->dynamic_shared",
    "WARP_SZ": "32u",
}
_CPP = {"pred": "bool", "f16x2": "u32", "bf16x2": "u32", "tf32": "u32"}


class UnsupportedInstruction(PtxError):
    """An instruction the emulator does not implement; names it and its PTX line."""


def cpp_type(ptx_type: str) -> str:
    return _CPP.get(ptx_type, ptx_type)


def cpp_bool(value: bool) -> str:
    return "true" if value else "false"


def cpp_unsigned(size: int) -> str:
    """The unsigned C++ type of `size` bytes."""
    return f"u{8 * size}"


@dataclass
class Scope:
    """What a function's names stand for in C++."""

    registers: list[dict[str, str]] = field(default_factory=lambda: [{}])
    parameters: set[str] = field(default_factory=set)
    locals: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    globals: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)
    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    product_registers: set[str] = field(default_factory=set)  # of wgmma
    sites: int = 0
    is_entry: bool = True

    def register(self, name: str) -> str | None:
        return next((scope[name] for scope in reversed(self.registers) if name in scope), None)


def symbol(prefix: str, name: str) -> str:
    """A C++ identifier for a PTX name; distinct names stay distinct."""
    return prefix + re.sub(r"[^A-Za-z0-9]", lambda m: f"_{ord(m[0]):x}_", name)


class Site:
    """An instruction being translated.

    Attributes:
        types: the instruction's type modifiers, in order.
        modifiers: all other parts of the opcode after the first.
    """

    def __init__(self, instruction: Instruction, scope: Scope) -> None:
        self.instruction = instruction
        self.scope = scope
        self.line = instruction.line
        self.operands = instruction.operands
        parts = [p.replace("::cta", "") for p in instruction.parts[1:]]
        self.types = [p for p in parts if p in SIZES or p == "pred"]
        self.modifiers = [p for p in parts if p not in self.types]

    def unsupported(self, why: str = "") -> UnsupportedInstruction:
        source = f" ({self.instruction.source})" if self.instruction.source else ""
        return UnsupportedInstruction(
            f"PTX line {self.line}{source}: unsupported instruction {self.instruction.opcode}"
            + (f": {why}" if why else "")
        )

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers

    def only(self, *allowed: str) -> None:
        """Refuse any modifier outside of `allowed`."""
        for modifier in self.modifiers:
            if modifier not in allowed:
                raise self.unsupported(f"modifier .{modifier}")

    def one(self, *choices: str) -> str:
        """The one modifier among `choices` that is there."""
        found = [m for m in self.modifiers if m in choices]
        if len(found) != 1:
            raise self.unsupported(f"expected one of .{', .'.join(choices)}")
        return found[0]

    def new_sites(self, count: int = 1) -> int:
        first, self.scope.sites = self.scope.sites, self.scope.sites + count
        return first

    # ---- operands

    def name(self, text: str) -> str:
        """A name as a C++ value: register, special register, or a variable's address."""
        scope = self.scope
        if register := scope.register(text):
            return register
        if text in SPECIAL:
            return SPECIAL[text]
        if text in scope.locals:
            return f"(u64)(frame.base + {scope.locals[text]})"
        if text in scope.shared:
            return f"(u64){scope.shared[text]}"
        if text in scope.parameters or text in scope.globals:
            return f"(u64){symbol('P_' if text in scope.parameters else 'V_', text)}"
        raise self.unsupported(f"unknown name {text}")

    def value(self, operand: Operand, cpp: str) -> str:
        """An operand read as the C++ type `cpp`."""
        if isinstance(operand, Immediate):
            bits = operand.bits
            if operand.kind == "f32" and cpp == "f64":
                return f"(f64)bits_as<f32>(0x{bits:x}u)"
            if operand.kind == "f64" and cpp == "f32":
                return f"(f32)bits_as<f64>((u64)0x{bits:x}ull)"
            return (
                f"((u64)0x{bits:x}ull != 0)" if cpp == "bool" else f"as<{cpp}>((u64)0x{bits:x}ull)"
            )
        if not isinstance(operand, Register):
            raise self.unsupported("operand form")
        name = self.name(operand.name)
        if cpp == "bool":
            return f"(!{name})" if operand.negated else name
        return f"as<{cpp}>({name})"

    def argument(self, index: int, cpp: str) -> str:
        """Operand number `index` (0 is the destination) read as `cpp`."""
        if index >= len(self.operands):
            raise self.unsupported(f"expected more than {index} operands")
        return self.value(self.operands[index], cpp)

    def assign(self, operand: Operand, expression: str) -> str:
        """Statement that puts a typed C++ expression into a destination."""
        if not isinstance(operand, Register):
            raise self.unsupported("destination form")
        if operand.name == "_":
            return f"(void)({expression});"
        register = self.scope.register(operand.name)
        if register is None:
            raise self.unsupported(f"unknown register {operand.name}")
        return f"put({register}, {expression});"

    def items(self, operand: Operand) -> tuple[Operand, ...]:
        return operand.items if isinstance(operand, Vector) else (operand,)

    def address(self, index: int) -> str:
        """Operand number `index`, `[base + offset]`, as a 64-bit C++ expression."""
        operand = self.operands[index]
        if not isinstance(operand, Address):
            raise self.unsupported("expected an address")
        return self.place(operand)

    def place(self, operand: Address) -> str:
        base = "0ull" if operand.base is None else f"(u64)({self.name(operand.base)})"
        if operand.base is not None and self.scope.register(operand.base):
            # 32-bit addresses wrap at 32 bits, as with a negative offset kept as unsigned
            return f"wrap_address({self.name(operand.base)}, {operand.offset})"
        return f"({base} + (u64)(s64){operand.offset})"


# None: the function does not know this form
Code = Callable[[Site], str | None]
