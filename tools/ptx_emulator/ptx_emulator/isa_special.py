"""Instructions whose C++ is more than one expression: moves, memory, jumps, barriers."""

from __future__ import annotations

import re

from ptx_emulator.parser import SIZES, Address, Group, Operand, Pair, Register, Vector
from ptx_emulator.site import Site, cpp_bool, cpp_type, cpp_unsigned, symbol

_FLOATS = ("f16", "bf16", "f32", "f64")
_ROUND = {"rn": "RN", "rz": "RZ", "rm": "RM", "rp": "RP", "rna": "RNA"}
_WHOLE = {"rni": "RN", "rzi": "RZ", "rmi": "RM", "rpi": "RP"}
_SPACES = {
    "global": "GLOBAL",
    "const": "GLOBAL",
    "local": "LOCAL",
    "shared": "SHARED",
    "shared::cluster": "SHARED",
}
_SCOPES = ("cta", "cluster", "gpu", "sys")
_ORDERS = ("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "sc")


def nothing(site: Site) -> str:
    return ";"


def cache_policy(site: Site) -> str:
    """There are no caches here: any policy is 0."""
    site.only("fractional", "L2::evict_first", "L2::evict_last", "L2::evict_normal")
    return site.assign(site.operands[0], "(u64)0")


# ---- moves and comparisons


def mov(site: Site) -> str:
    site.only()
    target, source = site.operands
    ptx_type = site.types[0]
    if ptx_type == "pred":
        return site.assign(target, site.value(source, "bool"))
    size = SIZES[ptx_type]
    if isinstance(target, Vector):
        part = size // len(target.items)
        whole = f"{cpp_unsigned(size)} whole = {site.value(source, cpp_unsigned(size))};"
        return whole + "".join(
            site.assign(x, f"({cpp_unsigned(part)})(whole >> {8 * part * i})")
            for i, x in enumerate(target.items)
        )
    if isinstance(source, Vector):
        part, whole = size // len(source.items), cpp_unsigned(size)
        packed = " | ".join(
            f"(({whole}){site.value(x, cpp_unsigned(part))} << {8 * part * i})"
            for i, x in enumerate(source.items)
        )
        return site.assign(target, f"({whole})({packed})")
    return site.assign(target, site.value(source, cpp_type(ptx_type)))


def setp(site: Site) -> str:
    root, ptx_type = site.instruction.parts[0], site.types[-1]
    comparison, *rest = site.modifiers
    combine = next((m for m in rest if m in ("and", "or", "xor")), None)
    site.only(comparison, "and", "or", "xor", "ftz")
    if ptx_type in ("f16x2", "bf16x2"):
        raise site.unsupported("comparison of pairs")
    is_float = ptx_type in _FLOATS
    own = cpp_type(ptx_type)
    if comparison in ("lo", "ls", "hi", "hs"):
        own = "u" + own[1:]
        comparison = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}[comparison]
    x, y = site.argument(1, own), site.argument(2, own)
    if is_float:
        wide = "f64" if own == "f64" else "f32"
        x, y = (f"({wide})flush<{cpp_bool(site.has('ftz'))}>({v})" for v in (x, y))
    symbols = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    ordered = "(x_ == x_ && y_ == y_)"
    if comparison == "ne" and is_float:
        test = "x_ < y_ || x_ > y_"  # false where either is NaN
    elif comparison in symbols:
        test = f"x_ {symbols[comparison]} y_"
    elif comparison in ("num", "nan"):
        test = ordered if comparison == "num" else f"!{ordered}"
    elif comparison[-1] == "u" and comparison[:-1] in symbols:
        test = f"!{ordered} || x_ {symbols[comparison[:-1]]} y_"
    else:
        raise site.unsupported(f"comparison .{comparison}")
    code = f"auto x_ = {x}; auto y_ = {y}; bool test = {test};"
    last, other = "test", "!test"
    if combine:
        joined = {"and": "&&", "or": "||", "xor": "!="}[combine]
        code += f"bool with = {site.argument(3, 'bool')};"
        last, other = f"test {joined} with", f"!test {joined} with"
    target = site.operands[0]
    if root == "set":
        result = cpp_type(site.types[0])
        yes, no = ("1.f", "0.f") if result in _FLOATS else ("-1", "0")
        return code + site.assign(target, f"({result})({last} ? {yes} : {no})")
    targets = target.items if isinstance(target, Pair) else (target,)
    values = (last, other)
    code += "".join(f"bool p{i} = {values[i]};" for i in range(len(targets)))
    return code + "".join(site.assign(x, f"p{i}") for i, x in enumerate(targets))


def testp(site: Site) -> str:
    tests = {
        "finite": "std::isfinite(x_)",
        "infinite": "std::isinf(x_)",
        "number": "!std::isnan(x_)",
        "notanumber": "std::isnan(x_)",
        "normal": "(std::isnormal(x_) || x_ == 0)",
        "subnormal": "(std::fpclassify(x_) == FP_SUBNORMAL)",
    }
    test = tests[site.one(*tests)]
    value = site.argument(1, cpp_type(site.types[0]))
    return f"auto x_ = {value};" + site.assign(site.operands[0], f"(bool){test}")


# ---- arithmetic with carries, and wide sums


def carry(site: Site) -> str | None:
    root = site.instruction.parts[0]
    uses = root in ("addc", "subc", "madc")
    if not uses and not site.has("cc"):
        return None
    site.only("cc", "lo", "hi")
    unsigned, bits = cpp_unsigned(SIZES[site.types[0]]), 8 * SIZES[site.types[0]]
    wide, carried = "unsigned __int128", "t.carry" if uses else "0"
    if root.startswith("mad"):
        product = f"(({wide}){site.argument(1, unsigned)} * ({wide}){site.argument(2, unsigned)})"
        if site.has("hi") and site.types[0].startswith("s"):
            signed = f"s{bits}"
            factors = f"{site.argument(1, signed)}, {site.argument(2, signed)}"
            product = f"(u64)mul_hi<{signed}>({factors})"
        elif site.has("hi"):
            product = f"({product} >> {bits})"
        left, right = f"({wide})({unsigned}){product}", site.argument(3, unsigned)
    else:
        left, right = f"({wide}){site.argument(1, unsigned)}", site.argument(2, unsigned)
    sign = "-" if root.startswith("sub") else "+"
    code = f"{wide} sum = {left} {sign} ({wide}){right} {sign} {carried};"
    if site.has("cc"):
        code += f"t.carry = (u32)(sum >> {bits}) & 1;"
    return code + site.assign(site.operands[0], f"({unsigned})sum")


def mad_wide(site: Site) -> str | None:
    if not site.has("wide"):
        return None
    site.only("wide")
    own = site.types[0]
    if own not in ("u16", "s16", "u32", "s32"):
        raise site.unsupported()
    wide = own[0] + str(16 * SIZES[own])
    product = f"mul_wide<{own}>({site.argument(1, own)}, {site.argument(2, own)})"
    total = f"wrap_add<{wide}>({product}, {site.argument(3, wide)})"
    return site.assign(site.operands[0], total)


def dp4a(site: Site) -> str:
    site.only()
    a, b = (cpp_bool(t == "s32") for t in site.types)
    args = [site.argument(i, "u32") for i in (1, 2, 3)]
    return site.assign(site.operands[0], f"dot4({args[0]}, {a}, {args[1]}, {b}, {args[2]})")


# ---- conversions


def cvt(site: Site) -> str:
    site.only(*_ROUND, *_WHOLE, "ftz", "sat", "relu")
    if len(site.types) != 2:
        raise site.unsupported()
    target, source = site.types
    ftz, sat, relu = (cpp_bool(site.has(m)) for m in ("ftz", "sat", "relu"))
    mode = next((_ROUND[m] for m in site.modifiers if m in _ROUND), "RN")
    whole = next((_WHOLE[m] for m in site.modifiers if m in _WHOLE), None)
    if target in ("f16x2", "bf16x2"):
        half = target[:-2]
        call = f"to_float<{half}, {mode}, false, {sat}, {relu}, f32>"
        high, low = (f"(u32){call}({site.argument(i, 'f32')}).bits" for i in (1, 2))
        return site.assign(site.operands[0], f"({high} << 16 | {low})")
    if target == "tf32":
        if source != "f32" or site.has("relu") or site.has("sat"):
            raise site.unsupported()
        return site.assign(site.operands[0], f"to_tf32<{mode}>({site.argument(1, 'f32')})")
    if source not in SIZES or source in ("f16x2", "bf16x2", "tf32") or mode == "RNA":
        raise site.unsupported()
    x = site.argument(1, cpp_type(source))
    if source in _FLOATS and target in _FLOATS:
        if whole and target != source:
            raise site.unsupported("rounds to a whole number and changes the type")
        if whole:
            code = f"to_whole<{target}, {whole}, {ftz}, {sat}>({x})"
        else:
            code = f"to_float<{target}, {mode}, {ftz}, {sat}, {relu}, {source}>({x})"
    elif source in _FLOATS:
        if whole is None:
            raise site.unsupported("needs .rni, .rzi, .rmi or .rpi")
        code = f"to_int<{target}, {whole}, {ftz}, {source}>({x})"
    elif target in _FLOATS:
        code = f"int_to_float<{target}, {mode}, {sat}, {source}>({x})"
    else:
        code = f"sat_to<{target}>((__int128){x})" if site.has("sat") else f"({target})({x})"
    return site.assign(site.operands[0], code)


def cvta(site: Site) -> str:
    spaces = ("global", "shared", "shared::cluster", "local", "const", "param")
    site.only("to", *spaces)
    space = site.one(*spaces)
    x = site.argument(1, cpp_type(site.types[0]))
    tag = {"shared": "kSharedTag", "local": "kLocalTag"}.get(space.removesuffix("::cluster"))
    if tag and site.has("to"):
        code = f"(u64)({x}) & kOffsetMask"
    else:
        code = f"(u64)({x}) | {tag}" if tag else f"(u64)({x})"
    return site.assign(site.operands[0], f"({cpp_type(site.types[0])})({code})")


def isspacep(site: Site) -> str:
    spaces = {"global": 0, "shared": 1, "shared::cluster": 1, "local": 2}
    site.only(*spaces)
    space, x = site.one(*spaces), site.argument(1, "u64")
    code = f"(({x}) >> 56) == {spaces[space]}"
    if space == "shared":
        code += f" && rank_of(t, {x}) == t.place->rank"
    return site.assign(site.operands[0], f"(bool)({code})")


def mapa(site: Site) -> str:
    site.only("shared::cluster")
    own = cpp_type(site.types[0])
    code = f"map_shared<{own}>({site.argument(1, own)}, {site.argument(2, 'u32')})"
    return site.assign(site.operands[0], code)


def block_rank(site: Site) -> str:
    site.only("shared::cluster")
    return site.assign(site.operands[0], f"rank_of(t, {site.argument(1, 'u64')})")


# ---- memory


def _space(site: Site) -> str:
    found = [s for s in _SPACES if site.has(s)]
    return _SPACES[found[0]] if found else "NO_SPACE"


def load_store(site: Site) -> str:
    # a cache hint comes with a policy as the last operand
    hint = r"L[12]::(evict_\w+|no_allocate|\d+B|cache_hint)"
    hints = [m for m in site.modifiers if re.fullmatch(hint, m)]
    cache = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc")
    spaces = (*_SPACES, "param")
    site.only("v2", "v4", *spaces, *cache, *hints, *_SCOPES, *_ORDERS)
    is_store = site.instruction.parts[0] == "st"
    at, data = (0, 1) if is_store else (1, 0)
    items, size = site.items(site.operands[data]), SIZES[site.types[0]]
    own = cpp_type(site.types[0])
    address, total = site.address(at), size * len(items)
    code = f"{own} data[{len(items)}];"
    if is_store:
        code += "".join(f"data[{i}] = {site.value(x, own)};" for i, x in enumerate(items))
    operand = site.operands[at]
    assert isinstance(operand, Address)  # site.address has checked it
    if site.has("param"):
        arguments = ("(void*)(" + address + ")", "data")
        code += f"memcpy({', '.join(arguments if is_store else arguments[::-1])}, {total});"
    else:
        call = "store" if is_store else "load"
        code += (
            f"{call}(t, {_space(site)}, {address}, data, {total}, {site.line}, {site.new_sites()});"
        )
    if not is_store:
        code += "".join(
            site.assign(x, f"data[{i}]")
            for i, x in enumerate(items)
            if not (isinstance(x, Register) and x.name == "_")
        )
    return code


def atomic(site: Site) -> str:
    kinds = ("add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas")
    kind = site.one(*kinds)
    site.only(kind, *_SCOPES, *_ORDERS, *_SPACES, "noftz")
    returns = site.instruction.parts[0] == "atom"
    own, first = cpp_type(site.types[0]), 1 if returns else 0
    if site.types[0] in ("f16x2", "bf16x2"):
        if kind != "add":
            raise site.unsupported()
        half = site.types[0][:-2]
        adder = f"add_<{half}, RN, false, false>"
        change = f"pairwise<{half}>([](auto x, auto y, auto) {{ return {adder}(x, y); }}, old, x_)"
    else:
        add = f"add_<{own}, RN, false, false>(old, x_)"
        integer = site.types[0] not in _FLOATS
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
    code = f"{own} x_ = {site.argument(first + 1, own)};"
    if kind == "cas":
        code += f"{own} y_ = {site.argument(first + 2, own)};"
    code += (
        f"{own} was = atomic_<{own}>(t, {_space(site)}, {site.address(first)}, "
        f"[&]({own} old) -> {own} {{ return {change}; }}, {site.line}, {site.new_sites()});"
    )
    return code + (site.assign(site.operands[0], "was") if returns else "(void)was;")


# ---- control


def branch(site: Site) -> str:
    site.only("uni")
    target = site.operands[0]
    if not isinstance(target, Register):
        raise site.unsupported("operand form")
    return f"spend(t, {site.line}); goto {symbol('L_', target.name)};"


def branch_indexed(site: Site) -> str:
    site.only("idx", "uni")
    table = site.operands[1]
    if not isinstance(table, Register) or table.name not in site.scope.targets:
        raise site.unsupported("branch targets")
    cases = "".join(
        f"case {i}: goto {symbol('L_', name)};"
        for i, name in enumerate(site.scope.targets[table.name])
    )
    return f"spend(t, {site.line}); switch ({site.argument(0, 'u32')}) {{ {cases} }}"


def call(site: Site) -> str:
    site.only("uni")
    operands = list(site.operands)
    results: tuple[Operand, ...] = ()
    if isinstance(operands[0], Group):
        results = operands.pop(0).items  # type: ignore[union-attr]
    name = operands[0]
    arguments = operands[1].items if len(operands) > 1 and isinstance(operands[1], Group) else ()
    if not isinstance(name, Register):
        raise site.unsupported("operand form")
    if name.name == "__assertfail":
        return trap(site)
    if name.name not in site.scope.functions:
        raise site.unsupported(f"function {name.name} has no body here")
    names = [x.name for x in (*results, *arguments) if isinstance(x, Register)]
    passed = ", ".join(["t", *(symbol("P_", n) for n in names)])
    return f"{symbol('F_', name.name)}({passed});"


def leave(site: Site) -> str:
    site.only("uni")
    if site.instruction.parts[0] == "exit" and not site.scope.is_entry:
        raise site.unsupported("outside of a kernel")
    return "return;"


def trap(site: Site) -> str:
    return f"stop_block(t, TRAP, {site.line});"
