"""Matrix products of a warpgroup: `wgmma`."""

from __future__ import annotations

import re

from ptx_emulator.operation import Operation, cpp_bool
from ptx_emulator.parser import Immediate, Instruction, Operand, Register, Vector

_DEPTHS = {"bf16": 16, "f16": 16, "tf32": 8}


def _shape(op: Operation) -> tuple[int, int]:
    """Columns and depth of `.m64nNkK`."""
    for modifier in op.modifiers:
        if shape := re.fullmatch(r"m64n(\d+)k(\d+)", modifier):
            return int(shape[1]), int(shape[2])
    raise op.unsupported("shape")


def flops(op: Operation) -> int:
    """Floating-point operations per thread: a share of the 2 M N K of the warpgroup's product."""
    if not op.has("mma_async"):
        return 0
    columns, depth = _shape(op)
    return 2 * 64 * columns * depth // 128


def registers_of(instruction: Instruction) -> set[str]:
    """Names of the registers that a product uses as accumulators and for A."""
    if instruction.parts[:2] != ("wgmma", "mma_async"):
        return set()
    vectors = [x for x in instruction.operands[:2] if isinstance(x, Vector)]
    return {item.name for v in vectors for item in v.items if isinstance(item, Register)}


def wgmma(op: Operation) -> str:
    """Translates `wgmma`."""
    kind = op.one_of("fence", "commit_group", "wait_group", "mma_async")
    if kind == "mma_async":
        return _product(op)
    op.allow(kind, "sync", "aligned")
    if kind == "fence":
        return "fence_registers(t);"
    if kind == "commit_group":
        return "t.product_group++;"
    return f"wait_products(t, {_constant(op, 0)}, {op.line});"


def _constant(op: Operation, index: int) -> int:
    """Returns an operand that must be a literal integer."""
    operand = op.operands[index]
    if not isinstance(operand, Immediate):
        raise op.unsupported("operand form")
    return operand.bits if operand.bits < 2**63 else operand.bits - 2**64


def _product(op: Operation) -> str:
    """Translates `wgmma.mma_async`."""
    columns, depth = _shape(op)
    op.allow("mma_async", "sync", "aligned", f"m64n{columns}k{depth}")
    if len(op.types) != 3 or op.types[0] not in ("f32", "f16"):
        raise op.unsupported("types")
    sums, kind, other = op.types
    fits = _DEPTHS.get(kind) == depth and kind == other and (sums == "f32" or kind == "f16")
    if not fits or columns % 8 or not 8 <= columns <= 256:
        raise op.unsupported("types or shape")
    target, left = op.items(op.operands[0]), op.operands[1]
    in_registers = isinstance(left, Vector)
    # operands 3 to 7: add to the accumulators, signs of A and B, and for halves transposed A and B
    signs = [_constant(op, 4), _constant(op, 5)]
    transposed = [_constant(op, i) for i in range(6, len(op.operands))]
    if in_registers:
        transposed.insert(0, 0)
    expected = 0 if kind == "tf32" else 2
    if (expected and len(transposed) != expected) or (not expected and any(transposed)):
        raise op.unsupported(f"{len(op.operands)} operands")
    if len(target) != columns // (2 if sums == "f32" else 4):
        raise op.unsupported(f"{len(target)} accumulators")
    left_transposed, right_transposed = transposed[:2] if expected else (0, 0)
    flags = [
        name
        for name, is_set in (
            ("LEFT_IN_REGISTERS", in_registers),
            ("LEFT_TRANSPOSED", left_transposed),
            ("RIGHT_TRANSPOSED", right_transposed),
            ("LEFT_NEGATED", signs[0] < 0),
            ("RIGHT_NEGATED", signs[1] < 0),
            ("HALF_SUMS", sums == "f16"),
        )
        if is_set
    ]
    a = "0" if in_registers else op.argument(1, "u64")
    code = f"u32* target[] = {{{_pointers(op, target)}}};"
    if isinstance(left, Vector):
        code += f"u32* left[] = {{{_pointers(op, left.items)}}};"
    return code + (
        f"issue_product(t, {{{op.line}, MMA_{kind.upper()}, {columns}, "
        f"{' | '.join(flags) or '0'}, {op.argument(3, 'bool')}, {a}, "
        f"{op.argument(2, 'u64')}}}, target, {len(target)}, "
        f"{'left' if in_registers else 'nullptr'});"
    )


def _pointers(op: Operation, items: tuple[Operand, ...]) -> str:
    """Returns the addresses of registers, separated by commas."""
    names = [x.name for x in items if isinstance(x, Register)]
    if len(names) != len(items):
        raise op.unsupported("operand form")
    return ", ".join(f"&{op.cpp_name(name)}" for name in names)


def register_copy(instruction: Instruction) -> tuple[str, str] | None:
    """Target and source of an unguarded `mov` between registers, else None.

    If one of the two is a register of a product, ptxas gives both the same hardware register. Such
    a copy writes nothing: compilers place it between `wgmma.fence` and the product.
    """
    if instruction.parts[0] != "mov" or instruction.guard is not None:
        return None
    target, source = instruction.operands
    if not isinstance(target, Register) or not isinstance(source, Register):
        return None
    return target.name, source.name


def with_copy_sources(names: set[str], sources: dict[str, set[str]]) -> set[str]:
    """Adds all registers that are copied, directly or through others, to one of `names`.

    Args:
        names: registers that products use.
        sources: for each target of a copy, the registers copied to it.
    """
    found, pending = set(names), list(names)
    while pending:
        new = sources.get(pending.pop(), set()) - found
        found |= new
        pending += new
    return found


def register_checks(op: Operation, names: set[str]) -> str:
    """Returns statements that check how an instruction uses registers of products.

    Args:
        names: registers that products use, and the sources of copies to them.
    """
    instruction = op.instruction
    if instruction.parts[0] == "wgmma":
        return ""
    names = {name for name in names if op.scope.register(name)}  # without special registers
    if (copy := register_copy(instruction)) and names.issuperset(copy):
        target, source = (f"&{op.cpp_name(name)}" for name in copy)
        return f"copy_register(t, {target}, {source}, {op.line});"
    code = ""
    has_target = instruction.parts[0] not in ("st", "red", "stmatrix", "cp", "bra")
    for i, operand in enumerate(instruction.operands):
        for item in op.items(operand):
            if isinstance(item, Register) and item.name in names:
                writes = cpp_bool(i == 0 and has_target)
                code += f"check_register(t, &{op.cpp_name(item.name)}, {writes}, {op.line});"
    return code
