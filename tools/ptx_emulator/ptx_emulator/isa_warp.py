"""Instructions a whole warp runs together: shuffles, votes, reductions, matrices."""

from __future__ import annotations

import re

from ptx_emulator.parser import SIZES, Pair
from ptx_emulator.site import Site, cpp_bool, cpp_unsigned


def shuffle(site: Site) -> str:
    site.only("sync", "up", "down", "bfly", "idx")
    kind = site.one("up", "down", "bfly", "idx").upper()
    arguments = ", ".join(site.argument(i, "u32") for i in (1, 2, 3, 4))
    target = site.operands[0]
    targets = target.items if isinstance(target, Pair) else (target,)
    code = f"u32 moved = (u32)shuffle_(t, W_{kind}, {arguments}, {site.line});"
    code += site.assign(targets[0], "moved")
    return code + (site.assign(targets[1], "(bool)t.out[1]") if len(targets) > 1 else "")


def vote(site: Site) -> str:
    site.only("sync", "all", "any", "uni", "ballot")
    kind = site.one("all", "any", "uni", "ballot")
    voter = f"{site.argument(1, 'bool')}, {site.argument(2, 'u32')}, {site.line}"
    voted = f"vote_(t, W_{kind.upper()}, {voter})"
    return site.assign(site.operands[0], f"({'u32' if kind == 'ballot' else 'bool'}){voted}")


def match(site: Site) -> str:
    site.only("sync", "any", "all")
    kind, own = site.one("any", "all"), cpp_unsigned(SIZES[site.types[0]])
    target = site.operands[0]
    targets = target.items if isinstance(target, Pair) else (target,)
    value, mask = site.argument(1, own), site.argument(2, "u32")
    code = f"u32 equal = (u32)vote_(t, W_MATCH_{kind.upper()}, {value}, {mask}, {site.line});"
    code += site.assign(targets[0], "equal")
    return code + (site.assign(targets[1], "(bool)t.out[1]") if len(targets) > 1 else "")


def reduce(site: Site) -> str:
    site.only("sync", "add", "min", "max", "and", "or", "xor")
    kind = site.one("add", "min", "max", "and", "or", "xor")
    if site.types[0] not in ("u32", "s32", "b32"):
        raise site.unsupported()
    signed = "_SIGNED" if site.types[0] == "s32" and kind in ("min", "max") else ""
    voter = f"{site.argument(1, 'u32')}, {site.argument(2, 'u32')}, {site.line}"
    voted = f"vote_(t, W_{kind.upper()}{signed}, {voter})"
    return site.assign(site.operands[0], f"(u32){voted}")


def matrix(site: Site) -> str:
    site.only("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared")
    count = int(site.one("x1", "x2", "x4")[1:])
    is_load = site.instruction.parts[0] == "ldmatrix"
    if site.types != ["b16"] or not site.has("m8n8"):
        raise site.unsupported()
    at, data = (1, 0) if is_load else (0, 1)
    items = site.items(site.operands[data])
    code = (
        f"t.in[0] = {site.address(at)}; t.in[1] = {count}; t.in[2] = {cpp_bool(site.has('trans'))};"
    )
    code += f"t.in[8] = {site.new_sites()};"
    if not is_load:
        code += "".join(f"t.in[{3 + i}] = {site.value(x, 'u32')};" for i, x in enumerate(items))
    code += f"warp_sync(t, {'W_LDMATRIX' if is_load else 'W_STMATRIX'}, ~0u, {site.line});"
    if is_load:
        code += "".join(site.assign(x, f"(u32)t.out[{i}]") for i, x in enumerate(items))
    return code


_MMA_SHAPES = {
    "bf16": {(16, 8), (16, 16)},
    "f16": {(16, 8), (16, 16)},
    "tf32": {(16, 4), (16, 8)},
    "f64": {(8, 4)},
    "s8": {(16, 16), (16, 32)},
    "u8": {(16, 16), (16, 32)},
}
_MMA_SUMS = {"f32": 0, "f16": 1, "f64": 2, "s32": 3}


def _mma_shape(site: Site) -> tuple[int, int]:
    for modifier in site.modifiers:
        if shape := re.fullmatch(r"m(\d+)n8k(\d+)", modifier):
            return int(shape[1]), int(shape[2])
    raise site.unsupported("shape")


def mma_flops(site: Site) -> int:
    """Flops a lane: 2 M N K of the whole warp's product."""
    rows, depth = _mma_shape(site)
    return 2 * rows * 8 * depth // 32


def mma(site: Site) -> str:
    rows, depth = _mma_shape(site)
    site.only("sync", "aligned", f"m{rows}n8k{depth}", "row", "col", "rn")
    if len(site.types) != 4:
        raise site.unsupported()
    d, a, b, c = site.types
    fits = (rows, depth) in _MMA_SHAPES.get(a, ()) and d == c and d in _MMA_SUMS
    sums = {"f16": ("f32", "f16"), "f64": ("f64",), "s8": ("s32",), "u8": ("s32",)}
    if not fits or d not in sums.get(a, ("f32",)) or (a != b and {a, b} != {"s8", "u8"}):
        raise site.unsupported("types or shape")
    width = "u64" if a == "f64" else "u32"
    code = ""
    for start, operand in zip((0, 4, 6), site.operands[1:4], strict=True):
        for i, item in enumerate(site.items(operand)):
            code += f"t.in[{start + i}] = {site.value(item, width)};"
    code += f"t.in[10] = MMA_{a.upper()} | MMA_{b.upper()} << 4 | {_MMA_SUMS[d]} << 8;"
    code += f"t.in[11] = {rows << 8 | depth}; warp_sync(t, W_MMA, ~0u, {site.line});"
    results = site.items(site.operands[0])
    return code + "".join(site.assign(x, f"({width})t.out[{i}]") for i, x in enumerate(results))
