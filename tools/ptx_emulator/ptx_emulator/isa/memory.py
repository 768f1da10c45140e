"""Instructions on addresses and memory: loads, stores, atomics, address conversions."""

from __future__ import annotations

import re

from ptx_emulator.operation import Operation, cpp_type
from ptx_emulator.parser import SIZES, Register

_FLOATS = ("f16", "bf16", "f32", "f64")
_SPACES = {
    "global": "GLOBAL",
    "const": "GLOBAL",
    "local": "LOCAL",
    "shared": "SHARED",
    "shared::cluster": "SHARED",
}
_SCOPES = ("cta", "cluster", "gpu", "sys")
_ORDERS = ("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "sc")
_CACHE_OPERATORS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc")
_CACHE_HINT = r"L[12]::(evict_\w+|no_allocate|\d+B|cache_hint)"


def cvta(op: Operation) -> str:
    """Translates `cvta`: an address of a state space to a generic address, or back."""
    spaces = ("global", "shared", "shared::cluster", "local", "const", "param")
    op.allow("to", *spaces)
    space = op.one_of(*spaces)
    x = op.argument(1, cpp_type(op.types[0]))
    tag = {"shared": "kSharedTag", "local": "kLocalTag"}.get(space.removesuffix("::cluster"))
    if tag and op.has("to"):
        code = f"(u64)({x}) & kOffsetMask"
    else:
        code = f"(u64)({x}) | {tag}" if tag else f"(u64)({x})"
    return op.assign(op.operands[0], f"({cpp_type(op.types[0])})({code})")


def isspacep(op: Operation) -> str:
    """Translates `isspacep`."""
    spaces = {"global": 0, "shared": 1, "shared::cluster": 1, "local": 2}
    op.allow(*spaces)
    space, x = op.one_of(*spaces), op.argument(1, "u64")
    code = f"(({x}) >> 56) == {spaces[space]}"
    if space == "shared":
        code += f" && rank_of(t, {x}) == t.position->rank"
    return op.assign(op.operands[0], f"(bool)({code})")


def map_address(op: Operation) -> str:
    """Translates `mapa`: the same address in another block's shared memory."""
    op.allow("shared::cluster")
    own = cpp_type(op.types[0])
    code = f"map_shared<{own}>({op.argument(1, own)}, {op.argument(2, 'u32')})"
    return op.assign(op.operands[0], code)


def block_rank(op: Operation) -> str:
    """Translates `getctarank`."""
    op.allow("shared::cluster")
    return op.assign(op.operands[0], f"rank_of(t, {op.argument(1, 'u64')})")


def _space(op: Operation) -> str:
    found = [s for s in _SPACES if op.has(s)]
    return _SPACES[found[0]] if found else "NO_SPACE"


def load_store(op: Operation) -> str:
    """Translates `ld`, `ldu` and `st`; the policy operand of a cache hint is ignored."""
    hints = [m for m in op.modifiers if re.fullmatch(_CACHE_HINT, m)]
    op.allow("v2", "v4", *_SPACES, "param", *_CACHE_OPERATORS, *hints, *_SCOPES, *_ORDERS)
    is_store = op.instruction.parts[0] == "st"
    at, data = (0, 1) if is_store else (1, 0)
    items, size = op.items(op.operands[data]), SIZES[op.types[0]]
    own = cpp_type(op.types[0])
    address, total = op.address(at), size * len(items)
    code = f"{own} data[{len(items)}];"
    if is_store:
        code += "".join(f"data[{i}] = {op.value(x, own)};" for i, x in enumerate(items))
    if op.has("param"):
        arguments = ("(void*)(" + address + ")", "data")
        code += f"memcpy({', '.join(arguments if is_store else arguments[::-1])}, {total});"
    else:
        call = "store" if is_store else "load"
        code += (
            f"{call}(t, {_space(op)}, {address}, data, {total}, {op.line}, {op.access_sites()});"
        )
    if not is_store:
        code += "".join(
            op.assign(x, f"data[{i}]")
            for i, x in enumerate(items)
            if not (isinstance(x, Register) and x.name == "_")
        )
    return code


def atomic(op: Operation) -> str:
    """Translates `atom` and `red`."""
    kinds = ("add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas")
    kind = op.one_of(*kinds)
    op.allow(kind, *_SCOPES, *_ORDERS, *_SPACES, "noftz")
    returns = op.instruction.parts[0] == "atom"
    own, first = cpp_type(op.types[0]), 1 if returns else 0
    if op.types[0] in ("f16x2", "bf16x2"):
        if kind != "add":
            raise op.unsupported()
        half = op.types[0][:-2]
        adder = f"add_<{half}, RN, false, false>"
        change = f"pairwise<{half}>([](auto x, auto y, auto) {{ return {adder}(x, y); }}, old, x_)"
    else:
        add = f"add_<{own}, RN, false, false>(old, x_)"
        integer = op.types[0] not in _FLOATS
        change = {
            "add": f"({own})(old + x_)" if integer else add,
            "min": f"min_<{own}, false, false>(old, x_)",
            "max": f"max_<{own}, false, false>(old, x_)",
            "and": f"({own})(old & x_)",
            "or": f"({own})(old | x_)",
            "xor": f"({own})(old ^ x_)",
            "inc": f"({own})(old >= x_ ? 0 : old + 1)",
            "dec": f"({own})(old == 0 || old > x_ ? x_ : old - 1)",
            "exch": "x_",
            "cas": "old == x_ ? y_ : old",
        }[kind]
    code = f"{own} x_ = {op.argument(first + 1, own)};"
    if kind == "cas":
        code += f"{own} y_ = {op.argument(first + 2, own)};"
    code += (
        f"{own} was = atomic_<{own}>(t, {_space(op)}, {op.address(first)}, "
        f"[&]({own} old) -> {own} {{ return {change}; }}, {op.line}, {op.access_sites()});"
    )
    return code + (op.assign(op.operands[0], "was") if returns else "(void)was;")


def cache_policy(op: Operation) -> str:
    """Translates `createpolicy`: the emulator has no caches, every policy is 0."""
    op.allow("fractional", "L2::evict_first", "L2::evict_last", "L2::evict_normal")
    return op.assign(op.operands[0], "(u64)0")
