"""Jumps, calls, and instructions without an effect."""

from __future__ import annotations

from ptx_emulator.operation import Operation, symbol
from ptx_emulator.parser import Group, Operand, Register


def branch(op: Operation) -> str:
    """Translates `bra`."""
    op.allow("uni")
    target = op.operands[0]
    if not isinstance(target, Register):
        raise op.unsupported("operand form")
    return f"count_jump(t, {op.line}); goto {symbol('L_', target.name)};"


def branch_indexed(op: Operation) -> str:
    """Translates `brx.idx`."""
    op.allow("idx", "uni")
    table = op.operands[1]
    if not isinstance(table, Register) or table.name not in op.scope.branch_targets:
        raise op.unsupported("branch targets")
    cases = "".join(
        f"case {i}: goto {symbol('L_', name)};"
        for i, name in enumerate(op.scope.branch_targets[table.name])
    )
    return f"count_jump(t, {op.line}); switch ({op.argument(0, 'u32')}) {{ {cases} }}"


def call(op: Operation) -> str:
    """Translates `call`; a call of `__assertfail` is a trap."""
    op.allow("uni")
    first, *operands = op.operands
    results: tuple[Operand, ...] = ()
    if isinstance(first, Group):
        results, name, operands = first.items, operands[0], operands[1:]
    else:
        name = first
    arguments = operands[0].items if operands and isinstance(operands[0], Group) else ()
    if not isinstance(name, Register):
        raise op.unsupported("operand form")
    if name.name == "__assertfail":
        return trap(op)
    if name.name not in op.scope.functions:
        raise op.unsupported(f"function {name.name} has no body here")
    names = [x.name for x in (*results, *arguments) if isinstance(x, Register)]
    passed = ", ".join(["t", *(symbol("P_", n) for n in names)])
    return f"{symbol('F_', name.name)}({passed});"


def leave(op: Operation) -> str:
    """Translates `ret` and `exit`."""
    op.allow("uni")
    if op.instruction.parts[0] == "exit" and not op.scope.is_entry:
        raise op.unsupported("outside of a kernel")
    return "return;"


def trap(op: Operation) -> str:
    """Translates `trap`: reports it and stops the block."""
    return f"stop_block(t, TRAP, {op.line});"


def no_effect(op: Operation) -> str:
    """Translates an instruction that changes nothing in the emulator."""
    return ";"
