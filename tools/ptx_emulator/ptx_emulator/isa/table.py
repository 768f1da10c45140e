"""The table of instructions: opcode to forms.

To add an instruction, add a `Form` or a function to `TABLE`, and cases to tests/cases_*.py until
tests/test_coverage.py passes. The first form that fits an instruction translates it.
"""

from __future__ import annotations

from collections.abc import Callable

from ptx_emulator.isa import async_copy, control, memory, scalar, sync, warp, wgmma
from ptx_emulator.isa.forms import (
    BITS,
    FLOAT_MODIFIERS,
    FLOATS,
    HALF_PAIRS,
    HALVES,
    INTS,
    NARROW_INTS,
    WIDE_BITS,
    WIDE_INTS,
    Form,
    binary,
    extreme,
    function,
    logic,
    names,
    sign_change,
)
from ptx_emulator.operation import Operation, Scope
from ptx_emulator.parser import Instruction

# returns the C++ statement, or None if the function does not handle this form of the opcode
Translator = Callable[[Operation], str | None]

_FMA = "fma_<{T}, {R}, {F}, {S}>({a}, {b}, {c})"
_FMA_PAIR = (
    "pairwise<{T}>([](auto x, auto y, auto z) "
    "{{ return fma_<{T}, RN, {F}, {S}>(x, y, z); }}, {a}, {b}, {c})"
)
_FMA_RELU = "max_<{T}, true, false>(fma_<{T}, RN, {F}, false>({a}, {b}, {c}), {T}(0.f))"
_FMA_RELU_PAIR = (
    "pairwise<{T}>([](auto x, auto y, auto z) "
    "{{ return max_<{T}, true, false>(fma_<{T}, RN, {F}, false>(x, y, z), {T}(0.f)); }}, "
    "{a}, {b}, {c})"
)
_FMA_MODIFIERS = FLOAT_MODIFIERS - {"approx", "full"}

TABLE: dict[str, tuple[Form | Translator, ...]] = {
    "add": (
        *binary("add"),
        Form(INTS, "wrap_add<{T}>({a}, {b})"),
        Form(names("s32"), "sat_to<{T}>((__int128){a} + {b})", names("sat")),
        scalar.carry,
    ),
    "sub": (
        *binary("sub"),
        Form(INTS, "wrap_sub<{T}>({a}, {b})"),
        Form(names("s32"), "sat_to<{T}>((__int128){a} - {b})", names("sat")),
        scalar.carry,
    ),
    "addc": (scalar.carry,),
    "subc": (scalar.carry,),
    "madc": (scalar.carry,),
    "mul": (
        *binary("mul"),
        Form(INTS, "mul_lo<{T}>({a}, {b})", names("lo")),
        Form(INTS, "mul_hi<{T}>({a}, {b})", names("hi")),
        Form(NARROW_INTS, "mul_wide<{T}>({a}, {b})", names("wide"), result="Wide<{T}>"),
    ),
    "mad": (
        Form(INTS, "wrap_add<{T}>(mul_lo<{T}>({a}, {b}), {c})", names("lo")),
        Form(INTS, "wrap_add<{T}>(mul_hi<{T}>({a}, {b}), {c})", names("hi")),
        Form(
            names("s32"), "sat_to<{T}>((__int128)mul_hi<{T}>({a}, {b}) + {c})", names("hi", "sat")
        ),
        scalar.mad_wide,
        scalar.carry,
        Form(FLOATS, _FMA, allows=FLOAT_MODIFIERS, kind="fma", flops=2),
    ),
    "mul24": (
        Form(names("u32"), "({a} & 0xffffffu) * ({b} & 0xffffffu)", names("lo")),
        Form(
            names("s32"),
            "mul_lo<s32>((s32)((u32){a} << 8) >> 8, (s32)((u32){b} << 8) >> 8)",
            names("lo"),
        ),
    ),
    "fma": (
        Form(FLOATS | HALVES, _FMA, allows=_FMA_MODIFIERS, kind="fma", flops=2),
        Form(HALF_PAIRS, _FMA_PAIR, allows=names("rn", "ftz", "sat"), kind="fma", flops=4),
        Form(HALVES, _FMA_RELU, names("rn", "relu"), names("ftz"), kind="fma", flops=2),
        Form(HALF_PAIRS, _FMA_RELU_PAIR, names("rn", "relu"), names("ftz"), kind="fma", flops=4),
    ),
    "div": (*binary("div", packed=False), Form(INTS, "div_int<{T}>({a}, {b})")),
    "rem": (Form(INTS, "rem_int<{T}>({a}, {b})"),),
    "abs": sign_change("absolute"),
    "neg": sign_change("negative"),
    "sad": (
        Form(
            INTS,
            "wrap_add<{T}>({a} > {b} ? wrap_sub<{T}>({a}, {b}) : wrap_sub<{T}>({b}, {a}), {c})",
        ),
    ),
    "min": extreme("min"),
    "max": extreme("max"),
    "sqrt": function("std::sqrt(x)", FLOATS),
    "rcp": function("1 / x", FLOATS),
    "rsqrt": function("1 / std::sqrt((double)x)", FLOATS),
    "ex2": function("std::exp2(x)", HALVES | {"f32"}),
    "lg2": function("std::log2(x)", names("f32")),
    "sin": function("std::sin(x)", names("f32")),
    "cos": function("std::cos(x)", names("f32")),
    "tanh": function("std::tanh(x)", HALVES | {"f32"}),
    "copysign": (Form(FLOATS, "std::copysign({b}, {a})", kind="float"),),
    "and": logic("&", "&&"),
    "or": logic("|", "||"),
    "xor": logic("^", "!="),
    "not": (Form(BITS, "~{a}"), Form(names("pred"), "!{a}")),
    "cnot": (Form(BITS, "{a} == 0"),),
    "shl": (Form(BITS, "shift_left<{T}>({a}, {b})", operands="T u32"),),
    "shr": (Form(BITS | INTS, "shift_right<{T}>({a}, {b})", operands="T u32"),),
    "shf": (
        Form(names("b32"), "funnel_left({a}, {b}, {c} & 31)", names("l", "wrap")),
        Form(names("b32"), "funnel_left({a}, {b}, std::min({c}, 32u))", names("l", "clamp")),
        Form(names("b32"), "funnel_right({a}, {b}, {c} & 31)", names("r", "wrap")),
        Form(names("b32"), "funnel_right({a}, {b}, std::min({c}, 32u))", names("r", "clamp")),
    ),
    "lop3": (Form(names("b32"), "lop3_({a}, {b}, {c}, {d})"),),
    "prmt": (Form(names("b32"), "permute_bytes({a}, {b}, {c})"),),
    "bfe": (Form(WIDE_INTS, "extract_field<{T}>({a}, {b}, {c})", operands="T u32 u32"),),
    "bfi": (Form(WIDE_BITS, "insert_field<{T}>({a}, {b}, {c}, {d})", operands="T T u32 u32"),),
    "brev": (Form(WIDE_BITS, "reverse_bits<{T}>({a})"),),
    "popc": (Form(WIDE_BITS, "__builtin_popcountll({a})", result="u32"),),
    "clz": (Form(WIDE_BITS, "leading_zeros<{T}>({a})", result="u32"),),
    "bfind": (
        Form(WIDE_INTS, "find_top<{T}>({a}, false)", result="u32"),
        Form(WIDE_INTS, "find_top<{T}>({a}, true)", names("shiftamt"), result="u32"),
    ),
    "dp4a": (scalar.dp4a,),
    "selp": (Form(BITS | INTS | FLOATS, "{c} ? {a} : {b}", operands="T T bool"),),
    "mov": (scalar.mov,),
    "setp": (scalar.setp,),
    "set": (scalar.setp,),
    "testp": (scalar.testp,),
    "cvt": (scalar.cvt,),
    "cvta": (memory.cvta,),
    "isspacep": (memory.isspacep,),
    "ld": (memory.load_store,),
    "ldu": (memory.load_store,),
    "st": (memory.load_store,),
    "atom": (memory.atomic,),
    "red": (memory.atomic,),
    "bra": (control.branch,),
    "brx": (control.branch_indexed,),
    "call": (control.call,),
    "ret": (control.leave,),
    "exit": (control.leave,),
    "trap": (control.trap,),
    "bar": (sync.barrier,),
    "barrier": (sync.barrier,),
    "mbarrier": (sync.mbarrier,),
    "fence": (sync.fence,),
    "elect": (sync.elect,),
    "griddepcontrol": (sync.grid_dependency,),
    "setmaxnreg": (sync.register_count,),
    "nanosleep": (sync.sleep,),
    "mapa": (memory.map_address,),
    "getctarank": (memory.block_rank,),
    "activemask": (Form(names("b32"), "(1u << t.lane)"),),
    "shfl": (warp.shuffle,),
    "vote": (warp.vote,),
    "match": (warp.match,),
    "redux": (warp.reduce,),
    "ldmatrix": (warp.matrix,),
    "stmatrix": (warp.matrix,),
    "mma": (warp.mma,),
    "wgmma": (wgmma.wgmma,),
    "cp": (async_copy.copy_async,),
    # the emulated memory is coherent, and timing hints have no effect
    "membar": (control.no_effect,),
    "prefetch": (control.no_effect,),
    "prefetchu": (control.no_effect,),
    "createpolicy": (memory.cache_policy,),
}

_MEMORY_OPCODES = ("ld", "ldu", "st", "atom", "red", "cp", "ldmatrix", "stmatrix")
_CONTROL_OPCODES = (
    *("bra", "brx", "call", "ret", "exit", "trap", "bar", "barrier", "membar", "fence"),
    *("mbarrier", "griddepcontrol", "setmaxnreg", "nanosleep"),
)
_WARP_OPCODES = ("shfl", "vote", "match", "redux", "elect")


def translate(instruction: Instruction, scope: Scope) -> tuple[str, str, int]:
    """Returns an instruction's C++ statement, its counter class, and its flops per thread.

    Raises:
        UnsupportedInstruction: no form of the table fits the instruction.
    """
    op = Operation(instruction, scope)
    root = instruction.parts[0]
    for form in TABLE.get(root, ()):
        if not isinstance(form, Form):
            code = form(op)
            if code is not None:
                return code, *_classify(root, op)
        elif form.fits(op):
            counted = form.flops or form.kind == "special"
            kind = f"{form.kind}.{op.types[0]}" if counted else form.kind
            return form.render(op), kind, form.flops
    raise op.unsupported()


def _classify(root: str, op: Operation) -> tuple[str, int]:
    """Returns the counter class and the flops per thread of an instruction without a `Form`."""
    if root == "mma":
        return f"mma.{op.types[1]}", warp.mma_flops(op)
    if root == "wgmma":
        flops = wgmma.flops(op)
        return (f"wgmma.{op.types[1]}", flops) if flops else ("control", 0)
    if root in _MEMORY_OPCODES:
        return "memory", 0
    if root in _CONTROL_OPCODES:
        return "control", 0
    if root in _WARP_OPCODES:
        return "warp", 0
    return ("convert" if root in ("cvt", "cvta") else "move" if root == "mov" else "integer"), 0
