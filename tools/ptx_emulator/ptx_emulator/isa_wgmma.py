"""Matrix products of a warpgroup, `wgmma`."""

from __future__ import annotations

import re

from ptx_emulator.parser import Immediate, Instruction, Operand, Register, Vector
from ptx_emulator.site import Site, cpp_bool

_DEPTHS = {"bf16": 16, "f16": 16, "tf32": 8}


def _shape(site: Site) -> tuple[int, int]:
    """Columns and depth of `.m64nNkK`."""
    for modifier in site.modifiers:
        if shape := re.fullmatch(r"m64n(\d+)k(\d+)", modifier):
            return int(shape[1]), int(shape[2])
    raise site.unsupported("shape")


def flops(site: Site) -> int:
    """Flops a thread: 2 M N K of the warpgroup's product."""
    if not site.has("mma_async"):
        return 0
    columns, depth = _shape(site)
    return 2 * 64 * columns * depth // 128


def registers(instruction: Instruction) -> set[str]:
    """The names of the registers a product uses as accumulators and for A."""
    if instruction.parts[:2] != ("wgmma", "mma_async"):
        return set()
    vectors = [x for x in instruction.operands[:2] if isinstance(x, Vector)]
    return {item.name for v in vectors for item in v.items if isinstance(item, Register)}


def wgmma(site: Site) -> str:
    kind = site.one("fence", "commit_group", "wait_group", "mma_async")
    if kind == "mma_async":
        return _product(site)
    site.only(kind, "sync", "aligned")
    if kind == "fence":
        return "fence_registers(t);"
    if kind == "commit_group":
        return "t.product_group++;"
    return f"wait_products(t, {_constant(site, 0)}, {site.line});"


def _constant(site: Site, index: int) -> int:
    operand = site.operands[index]
    if not isinstance(operand, Immediate):
        raise site.unsupported("operand form")
    return operand.bits if operand.bits < 2**63 else operand.bits - 2**64


def _product(site: Site) -> str:
    columns, depth = _shape(site)
    site.only("mma_async", "sync", "aligned", f"m64n{columns}k{depth}")
    if len(site.types) != 3 or site.types[0] not in ("f32", "f16"):
        raise site.unsupported("types")
    sums, kind, other = site.types
    fits = _DEPTHS.get(kind) == depth and kind == other and (sums == "f32" or kind == "f16")
    if not fits or columns % 8 or not 8 <= columns <= 256:
        raise site.unsupported("types or shape")
    target, left = site.items(site.operands[0]), site.operands[1]
    in_registers = isinstance(left, Vector)
    # after the two operands: add or not, signs of both, and for halves which are transposed
    signs = [_constant(site, 4), _constant(site, 5)]
    transposed = [_constant(site, i) for i in range(6, len(site.operands))]
    if in_registers:
        transposed.insert(0, 0)
    expected = 0 if kind == "tf32" else 2
    if (expected and len(transposed) != expected) or (not expected and any(transposed)):
        raise site.unsupported(f"{len(site.operands)} operands")
    if len(target) != columns // (2 if sums == "f32" else 4):
        raise site.unsupported(f"{len(target)} accumulators")
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
    a = "0" if in_registers else site.argument(1, "u64")
    code = f"u32* target[] = {{{_pointers(site, target)}}};"
    if isinstance(left, Vector):
        code += f"u32* left[] = {{{_pointers(site, left.items)}}};"
    return code + (
        f"issue_product(t, {{{site.line}, MMA_{kind.upper()}, {columns}, "
        f"{' | '.join(flags) or '0'}, {site.argument(3, 'bool')}, {a}, "
        f"{site.argument(2, 'u64')}}}, target, {len(target)}, "
        f"{'left' if in_registers else 'nullptr'});"
    )


def _pointers(site: Site, items: tuple[Operand, ...]) -> str:
    names = [x.name for x in items if isinstance(x, Register)]
    if len(names) != len(items):
        raise site.unsupported("operand form")
    return ", ".join(f"&{site.name(name)}" for name in names)


def copied(instruction: Instruction) -> tuple[str, str] | None:
    """Target and source of a `mov` from a register to a register.

    ptxas gives both the same hardware register where one of them is a product's, so that such a
    copy defines nothing: compilers put it between `wgmma.fence` and the product.
    """
    if instruction.parts[0] != "mov" or instruction.guard is not None:
        return None
    target, source = instruction.operands
    if not isinstance(target, Register) or not isinstance(source, Register):
        return None
    return target.name, source.name


def with_sources(names: set[str], copies: dict[str, set[str]]) -> set[str]:
    """The registers that products use, and those that are copied to them on any path."""
    found, left = set(names), list(names)
    while left:
        new = copies.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


def touches(instruction: Instruction, site: Site, names: set[str]) -> str:
    """Statements that check an ordinary instruction's use of registers that products use."""
    if instruction.parts[0] == "wgmma":
        return ""
    names = {name for name in names if site.scope.register(name)}  # a copy's source may be special
    if (copy := copied(instruction)) and names.issuperset(copy):
        target, source = (f"&{site.name(name)}" for name in copy)
        return f"copy_register(t, {target}, {source}, {site.line});"
    code = ""
    stores = instruction.parts[0] in ("st", "red", "stmatrix", "cp", "bra")
    for i, operand in enumerate(instruction.operands):
        for item in site.items(operand):
            if isinstance(item, Register) and item.name in names:
                writes = cpp_bool(i == 0 and not stores)
                code += f"touch_register(t, &{site.name(item.name)}, {writes}, {site.line});"
    return code
