"""Instructions on the registers of one thread: moves, comparisons, carries, conversions."""

from __future__ import annotations

from ptx_emulator.operation import Operation, cpp_bool, cpp_type, cpp_unsigned
from ptx_emulator.parser import SIZES, Pair, Vector

_FLOATS = ("f16", "bf16", "f32", "f64")
_ROUNDINGS = {"rn": "RN", "rz": "RZ", "rm": "RM", "rp": "RP", "rna": "RNA"}
_INTEGER_ROUNDINGS = {"rni": "RN", "rzi": "RZ", "rmi": "RM", "rpi": "RP"}

# ---- moves and comparisons


def mov(op: Operation) -> str:
    """Translates `mov`: a copy, and packing or unpacking a vector."""
    op.allow()
    target, source = op.operands
    ptx_type = op.types[0]
    if ptx_type == "pred":
        return op.assign(target, op.value(source, "bool"))
    size = SIZES[ptx_type]
    if isinstance(target, Vector):
        part = size // len(target.items)
        whole = f"{cpp_unsigned(size)} whole = {op.value(source, cpp_unsigned(size))};"
        return whole + "".join(
            op.assign(x, f"({cpp_unsigned(part)})(whole >> {8 * part * i})")
            for i, x in enumerate(target.items)
        )
    if isinstance(source, Vector):
        part, whole = size // len(source.items), cpp_unsigned(size)
        packed = " | ".join(
            f"(({whole}){op.value(x, cpp_unsigned(part))} << {8 * part * i})"
            for i, x in enumerate(source.items)
        )
        return op.assign(target, f"({whole})({packed})")
    return op.assign(target, op.value(source, cpp_type(ptx_type)))


def setp(op: Operation) -> str:
    """Translates `setp` and `set`."""
    root, ptx_type = op.instruction.parts[0], op.types[-1]
    comparison, *rest = op.modifiers
    combine = next((m for m in rest if m in ("and", "or", "xor")), None)
    op.allow(comparison, "and", "or", "xor", "ftz")
    if ptx_type in ("f16x2", "bf16x2"):
        raise op.unsupported("comparison of pairs")
    is_float = ptx_type in _FLOATS
    own = cpp_type(ptx_type)
    if comparison in ("lo", "ls", "hi", "hs"):
        own = "u" + own[1:]
        comparison = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}[comparison]
    x, y = op.argument(1, own), op.argument(2, own)
    if is_float:
        wide = "f64" if own == "f64" else "f32"
        x, y = (f"({wide})flush<{cpp_bool(op.has('ftz'))}>({v})" for v in (x, y))
    code = f"auto x_ = {x}; auto y_ = {y};"
    code += f"bool test = {_comparison(op, comparison, is_float)};"
    last, other = "test", "!test"
    if combine:
        joined = {"and": "&&", "or": "||", "xor": "!="}[combine]
        code += f"bool with = {op.argument(3, 'bool')};"
        last, other = f"test {joined} with", f"!test {joined} with"
    target = op.operands[0]
    if root == "set":
        result = cpp_type(op.types[0])
        yes, no = ("1.f", "0.f") if result in _FLOATS else ("-1", "0")
        return code + op.assign(target, f"({result})({last} ? {yes} : {no})")
    targets = target.items if isinstance(target, Pair) else (target,)
    values = (last, other)
    code += "".join(f"bool p{i} = {values[i]};" for i in range(len(targets)))
    return code + "".join(op.assign(x, f"p{i}") for i, x in enumerate(targets))


def _comparison(op: Operation, name: str, is_float: bool) -> str:
    """Returns a comparison of x_ and y_ in C++."""
    symbols = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    ordered = "(x_ == x_ && y_ == y_)"
    if name == "ne" and is_float:
        return "x_ < y_ || x_ > y_"  # false if an operand is NaN
    if name in symbols:
        return f"x_ {symbols[name]} y_"
    if name in ("num", "nan"):
        return ordered if name == "num" else f"!{ordered}"
    if name[-1] == "u" and name[:-1] in symbols:
        return f"!{ordered} || x_ {symbols[name[:-1]]} y_"
    raise op.unsupported(f"comparison .{name}")


def testp(op: Operation) -> str:
    """Translates `testp`."""
    tests = {
        "finite": "std::isfinite(x_)",
        "infinite": "std::isinf(x_)",
        "number": "!std::isnan(x_)",
        "notanumber": "std::isnan(x_)",
        "normal": "(std::isnormal(x_) || x_ == 0)",
        "subnormal": "(std::fpclassify(x_) == FP_SUBNORMAL)",
    }
    test = tests[op.one_of(*tests)]
    value = op.argument(1, cpp_type(op.types[0]))
    return f"auto x_ = {value};" + op.assign(op.operands[0], f"(bool){test}")


# ---- integer arithmetic


def carry(op: Operation) -> str | None:
    """Translates `.cc`, `addc`, `subc` and `madc`: arithmetic on the carry flag."""
    root = op.instruction.parts[0]
    uses = root in ("addc", "subc", "madc")
    if not uses and not op.has("cc"):
        return None
    op.allow("cc", "lo", "hi")
    unsigned, bits = cpp_unsigned(SIZES[op.types[0]]), 8 * SIZES[op.types[0]]
    wide, carried = "unsigned __int128", "t.carry" if uses else "0"
    if root.startswith("mad"):
        product = f"(({wide}){op.argument(1, unsigned)} * ({wide}){op.argument(2, unsigned)})"
        if op.has("hi") and op.types[0].startswith("s"):
            signed = f"s{bits}"
            factors = f"{op.argument(1, signed)}, {op.argument(2, signed)}"
            product = f"(u64)mul_hi<{signed}>({factors})"
        elif op.has("hi"):
            product = f"({product} >> {bits})"
        left, right = f"({wide})({unsigned}){product}", op.argument(3, unsigned)
    else:
        left, right = f"({wide}){op.argument(1, unsigned)}", op.argument(2, unsigned)
    sign = "-" if root.startswith("sub") else "+"
    code = f"{wide} sum = {left} {sign} ({wide}){right} {sign} {carried};"
    if op.has("cc"):
        code += f"t.carry = (u32)(sum >> {bits}) & 1;"
    return code + op.assign(op.operands[0], f"({unsigned})sum")


def mad_wide(op: Operation) -> str | None:
    """Translates `mad.wide`."""
    if not op.has("wide"):
        return None
    op.allow("wide")
    own = op.types[0]
    if own not in ("u16", "s16", "u32", "s32"):
        raise op.unsupported()
    wide = own[0] + str(16 * SIZES[own])
    product = f"mul_wide<{own}>({op.argument(1, own)}, {op.argument(2, own)})"
    total = f"wrap_add<{wide}>({product}, {op.argument(3, wide)})"
    return op.assign(op.operands[0], total)


def dp4a(op: Operation) -> str:
    """Translates `dp4a`."""
    op.allow()
    a, b = (cpp_bool(t == "s32") for t in op.types)
    args = [op.argument(i, "u32") for i in (1, 2, 3)]
    return op.assign(op.operands[0], f"dot4({args[0]}, {a}, {args[1]}, {b}, {args[2]})")


# ---- conversions


def cvt(op: Operation) -> str:
    """Translates `cvt`."""
    op.allow(*_ROUNDINGS, *_INTEGER_ROUNDINGS, "ftz", "sat", "relu")
    if len(op.types) != 2:
        raise op.unsupported()
    target, source = op.types
    ftz, sat, relu = (cpp_bool(op.has(m)) for m in ("ftz", "sat", "relu"))
    mode = next((_ROUNDINGS[m] for m in op.modifiers if m in _ROUNDINGS), "RN")
    whole = next((_INTEGER_ROUNDINGS[m] for m in op.modifiers if m in _INTEGER_ROUNDINGS), None)
    if target in ("f16x2", "bf16x2"):
        half = target[:-2]
        call = f"to_float<{half}, {mode}, false, {sat}, {relu}, f32>"
        high, low = (f"(u32){call}({op.argument(i, 'f32')}).bits" for i in (1, 2))
        return op.assign(op.operands[0], f"({high} << 16 | {low})")
    if target == "tf32":
        if source != "f32" or op.has("relu") or op.has("sat"):
            raise op.unsupported()
        return op.assign(op.operands[0], f"to_tf32<{mode}>({op.argument(1, 'f32')})")
    if source not in SIZES or source in ("f16x2", "bf16x2", "tf32") or mode == "RNA":
        raise op.unsupported()
    x = op.argument(1, cpp_type(source))
    if source in _FLOATS and target in _FLOATS:
        if whole and target != source:
            raise op.unsupported("rounds to a whole number and changes the type")
        if whole:
            code = f"to_whole<{target}, {whole}, {ftz}, {sat}>({x})"
        else:
            code = f"to_float<{target}, {mode}, {ftz}, {sat}, {relu}, {source}>({x})"
    elif source in _FLOATS:
        if whole is None:
            raise op.unsupported("needs .rni, .rzi, .rmi or .rpi")
        code = f"to_int<{target}, {whole}, {ftz}, {source}>({x})"
    elif target in _FLOATS:
        code = f"int_to_float<{target}, {mode}, {sat}, {source}>({x})"
    else:
        code = f"sat_to<{target}>((__int128){x})" if op.has("sat") else f"({target})({x})"
    return op.assign(op.operands[0], code)
