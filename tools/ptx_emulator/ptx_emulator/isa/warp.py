"""Instructions that the lanes of a warp run together: shuffles, votes, reductions, matrices."""

from __future__ import annotations

import re

from ptx_emulator.operation import Operation, cpp_bool, cpp_unsigned
from ptx_emulator.parser import SIZES, Pair


def shuffle(op: Operation) -> str:
    """Translates `shfl`."""
    op.allow("sync", "up", "down", "bfly", "idx")
    kind = op.one_of("up", "down", "bfly", "idx").upper()
    arguments = ", ".join(op.argument(i, "u32") for i in (1, 2, 3, 4))
    target = op.operands[0]
    targets = target.items if isinstance(target, Pair) else (target,)
    code = f"u32 moved = (u32)shuffle_(t, W_{kind}, {arguments}, {op.line});"
    code += op.assign(targets[0], "moved")
    return code + (op.assign(targets[1], "(bool)t.out[1]") if len(targets) > 1 else "")


def vote(op: Operation) -> str:
    """Translates `vote`."""
    op.allow("sync", "all", "any", "uni", "ballot")
    kind = op.one_of("all", "any", "uni", "ballot")
    voter = f"{op.argument(1, 'bool')}, {op.argument(2, 'u32')}, {op.line}"
    voted = f"vote_(t, W_{kind.upper()}, {voter})"
    return op.assign(op.operands[0], f"({'u32' if kind == 'ballot' else 'bool'}){voted}")


def match(op: Operation) -> str:
    """Translates `match`."""
    op.allow("sync", "any", "all")
    kind, own = op.one_of("any", "all"), cpp_unsigned(SIZES[op.types[0]])
    target = op.operands[0]
    targets = target.items if isinstance(target, Pair) else (target,)
    value, mask = op.argument(1, own), op.argument(2, "u32")
    code = f"u32 equal = (u32)vote_(t, W_MATCH_{kind.upper()}, {value}, {mask}, {op.line});"
    code += op.assign(targets[0], "equal")
    return code + (op.assign(targets[1], "(bool)t.out[1]") if len(targets) > 1 else "")


def reduce(op: Operation) -> str:
    """Translates `redux`."""
    op.allow("sync", "add", "min", "max", "and", "or", "xor")
    kind = op.one_of("add", "min", "max", "and", "or", "xor")
    if op.types[0] not in ("u32", "s32", "b32"):
        raise op.unsupported()
    signed = "_SIGNED" if op.types[0] == "s32" and kind in ("min", "max") else ""
    voter = f"{op.argument(1, 'u32')}, {op.argument(2, 'u32')}, {op.line}"
    voted = f"vote_(t, W_{kind.upper()}{signed}, {voter})"
    return op.assign(op.operands[0], f"(u32){voted}")


def matrix(op: Operation) -> str:
    """Translates `ldmatrix` and `stmatrix`."""
    op.allow("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared")
    count = int(op.one_of("x1", "x2", "x4")[1:])
    is_load = op.instruction.parts[0] == "ldmatrix"
    if op.types != ["b16"] or not op.has("m8n8"):
        raise op.unsupported()
    at, data = (1, 0) if is_load else (0, 1)
    items = op.items(op.operands[data])
    code = f"t.in[0] = {op.address(at)}; t.in[1] = {count}; t.in[2] = {cpp_bool(op.has('trans'))};"
    code += f"t.in[8] = {op.access_sites()};"
    if not is_load:
        code += "".join(f"t.in[{3 + i}] = {op.value(x, 'u32')};" for i, x in enumerate(items))
    code += f"warp_sync(t, {'W_LDMATRIX' if is_load else 'W_STMATRIX'}, ~0u, {op.line});"
    if is_load:
        code += "".join(op.assign(x, f"(u32)t.out[{i}]") for i, x in enumerate(items))
    return code


# rows and depth of the products of each type of A
_MMA_SHAPES = {
    "bf16": {(16, 8), (16, 16)},
    "f16": {(16, 8), (16, 16)},
    "tf32": {(16, 4), (16, 8)},
    "f64": {(8, 4)},
    "s8": {(16, 16), (16, 32)},
    "u8": {(16, 16), (16, 32)},
}
# codes of the accumulator types, as in runtime/matrix.h
_MMA_SUMS = {"f32": 0, "f16": 1, "f64": 2, "s32": 3}


def _mma_shape(op: Operation) -> tuple[int, int]:
    for modifier in op.modifiers:
        if shape := re.fullmatch(r"m(\d+)n8k(\d+)", modifier):
            return int(shape[1]), int(shape[2])
    raise op.unsupported("shape")


def mma_flops(op: Operation) -> int:
    """Floating-point operations per lane: a share of the 2 M N K of the warp's product."""
    rows, depth = _mma_shape(op)
    return 2 * rows * 8 * depth // 32


def mma(op: Operation) -> str:
    """Translates `mma`."""
    rows, depth = _mma_shape(op)
    op.allow("sync", "aligned", f"m{rows}n8k{depth}", "row", "col", "rn")
    if len(op.types) != 4:
        raise op.unsupported()
    d, a, b, c = op.types
    fits = (rows, depth) in _MMA_SHAPES.get(a, ()) and d == c and d in _MMA_SUMS
    sums = {"f16": ("f32", "f16"), "f64": ("f64",), "s8": ("s32",), "u8": ("s32",)}
    if not fits or d not in sums.get(a, ("f32",)) or (a != b and {a, b} != {"s8", "u8"}):
        raise op.unsupported("types or shape")
    width = "u64" if a == "f64" else "u32"
    code = ""
    for start, operand in zip((0, 4, 6), op.operands[1:4], strict=True):
        for i, item in enumerate(op.items(operand)):
            code += f"t.in[{start + i}] = {op.value(item, width)};"
    code += f"t.in[10] = MMA_{a.upper()} | MMA_{b.upper()} << 4 | {_MMA_SUMS[d]} << 8;"
    code += f"t.in[11] = {rows << 8 | depth}; warp_sync(t, W_MMA, ~0u, {op.line});"
    results = op.items(op.operands[0])
    return code + "".join(op.assign(x, f"({width})t.out[{i}]") for i, x in enumerate(results))
