"""One instruction during translation: its types, modifiers and operands as C++ expressions."""

from __future__ import annotations

import re
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

# special registers, as expressions of the thread `t`
SPECIAL_REGISTERS = {
    **{f"%tid.{d}": f"t.{d}" for d in "xyz"},
    **{f"%ntid.{d}": f"t.launch->size[{i}]" for i, d in enumerate("xyz")},
    **{f"%ctaid.{d}": f"t.position->{d}" for d in "xyz"},
    **{f"%nctaid.{d}": f"t.launch->grid[{i}]" for i, d in enumerate("xyz")},
    **{
        f"%cluster_ctaid.{d}": f"(t.position->{d} % t.launch->cluster[{i}])"
        for i, d in enumerate("xyz")
    },
    **{f"%cluster_nctaid.{d}": f"t.launch->cluster[{i}]" for i, d in enumerate("xyz")},
    **{
        f"%clusterid.{d}": f"(t.position->{d} / t.launch->cluster[{i}])"
        for i, d in enumerate("xyz")
    },
    **{
        f"%nclusterid.{d}": f"(t.launch->grid[{i}] / t.launch->cluster[{i}])"
        for i, d in enumerate("xyz")
    },
    "%cluster_ctarank": "t.position->rank",
    "%cluster_nctarank": "t.launch->blocks_per_cluster()",
    "%is_explicit_cluster": "(t.launch->blocks_per_cluster() > 1)",
    **dict.fromkeys(("%globaltimer", "%clock64"), "read_clock(t)"),
    **dict.fromkeys(("%globaltimer_lo", "%clock"), "(u32)read_clock(t)"),
    "%laneid": "t.lane",
    "%warpid": "t.warp",
    "%nwarpid": "((t.position->count + 31) / 32)",
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
    """An instruction that the emulator does not implement; names it and its PTX line."""


def cpp_type(ptx_type: str) -> str:
    """The C++ type of a PTX type."""
    return _CPP.get(ptx_type, ptx_type)


def cpp_bool(value: bool) -> str:
    """The C++ literal of a bool."""
    return "true" if value else "false"


def cpp_unsigned(size: int) -> str:
    """The unsigned C++ type of `size` bytes."""
    return f"u{8 * size}"


@dataclass
class Scope:
    """The names that are visible in a function, and what they are in C++.

    Attributes:
        registers: PTX name to C++ variable, one dictionary per open brace.
        parameters: names of parameters.
        locals: offset of each variable in the frame of local memory.
        shared: offset of each variable in shared memory.
        globals: names of module-scope variables.
        functions: functions with a body.
        branch_targets: labels of each `.branchtargets` list.
        wgmma_registers: registers that `wgmma` products use, and sources of copies to them.
        access_sites: number of memory accesses translated so far, in the whole module.
        is_entry: the function is a kernel.
    """

    registers: list[dict[str, str]] = field(default_factory=lambda: [{}])
    parameters: set[str] = field(default_factory=set)
    locals: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    globals: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)
    branch_targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    wgmma_registers: set[str] = field(default_factory=set)
    access_sites: int = 0
    is_entry: bool = True

    def register(self, name: str) -> str | None:
        """Returns the C++ variable of a register, or None."""
        return next((scope[name] for scope in reversed(self.registers) if name in scope), None)


def symbol(prefix: str, name: str) -> str:
    """Returns a C++ identifier for a PTX name; different names get different identifiers."""
    return prefix + re.sub(r"[^A-Za-z0-9]", lambda m: f"_{ord(m[0]):x}_", name)


class Operation:
    """One instruction during translation.

    Attributes:
        types: type modifiers of the opcode, in order.
        modifiers: the other parts of the opcode after the first, in order.
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
        """Returns the error to raise for this instruction."""
        source = f" ({self.instruction.source})" if self.instruction.source else ""
        return UnsupportedInstruction(
            f"PTX line {self.line}{source}: unsupported instruction {self.instruction.opcode}"
            + (f": {why}" if why else "")
        )

    def has(self, modifier: str) -> bool:
        """Checks if the opcode has a modifier."""
        return modifier in self.modifiers

    def allow(self, *allowed: str) -> None:
        """Raises UnsupportedInstruction if the opcode has another modifier."""
        for modifier in self.modifiers:
            if modifier not in allowed:
                raise self.unsupported(f"modifier .{modifier}")

    def one_of(self, *choices: str) -> str:
        """Returns the only modifier among `choices`; raises UnsupportedInstruction otherwise."""
        found = [m for m in self.modifiers if m in choices]
        if len(found) != 1:
            raise self.unsupported(f"expected one of .{', .'.join(choices)}")
        return found[0]

    def access_sites(self, count: int = 1) -> int:
        """Numbers `count` new memory accesses for the counters; returns the first number."""
        first, self.scope.access_sites = self.scope.access_sites, self.scope.access_sites + count
        return first

    # ---- operands

    def cpp_name(self, text: str) -> str:
        """Returns the C++ value of a name: a register, or the address of a variable."""
        scope = self.scope
        if register := scope.register(text):
            return register
        if text in SPECIAL_REGISTERS:
            return SPECIAL_REGISTERS[text]
        if text in scope.locals:
            return f"(u64)(frame.base + {scope.locals[text]})"
        if text in scope.shared:
            return f"(u64){scope.shared[text]}"
        if text in scope.parameters or text in scope.globals:
            return f"(u64){symbol('P_' if text in scope.parameters else 'V_', text)}"
        raise self.unsupported(f"unknown name {text}")

    def value(self, operand: Operand, cpp: str) -> str:
        """Returns an operand as a value of the C++ type `cpp`."""
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
        name = self.cpp_name(operand.name)
        if cpp == "bool":
            return f"(!{name})" if operand.negated else name
        return f"as<{cpp}>({name})"

    def argument(self, index: int, cpp: str) -> str:
        """Returns operand number `index`, counted from the destination, as a value of `cpp`."""
        if index >= len(self.operands):
            raise self.unsupported(f"expected more than {index} operands")
        return self.value(self.operands[index], cpp)

    def assign(self, operand: Operand, expression: str) -> str:
        """Returns the statement that writes a typed C++ expression to a destination."""
        if not isinstance(operand, Register):
            raise self.unsupported("destination form")
        if operand.name == "_":
            return f"(void)({expression});"
        register = self.scope.register(operand.name)
        if register is None:
            raise self.unsupported(f"unknown register {operand.name}")
        return f"put({register}, {expression});"

    def items(self, operand: Operand) -> tuple[Operand, ...]:
        """Returns the elements of a vector operand, or the operand itself."""
        return operand.items if isinstance(operand, Vector) else (operand,)

    def address(self, index: int) -> str:
        """Returns the address in operand number `index` as a 64-bit C++ expression."""
        operand = self.operands[index]
        if not isinstance(operand, Address):
            raise self.unsupported("expected an address")
        return self.address_of(operand)

    def address_of(self, operand: Address) -> str:
        """Returns `[base + offset]` as a 64-bit C++ expression."""
        base = "0ull" if operand.base is None else f"(u64)({self.cpp_name(operand.base)})"
        if operand.base is not None and self.scope.register(operand.base):
            # 32-bit addresses wrap around at 32 bits
            return f"wrap_address({self.cpp_name(operand.base)}, {operand.offset})"
        return f"({base} + (u64)(s64){operand.offset})"
