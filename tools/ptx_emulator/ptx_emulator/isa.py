"""The table from opcode to C++: one line an instruction form.

To add an instruction, add one `Form` to `TABLE`, and cases to tests/cases_*.py
until tests/test_coverage.py passes.
In a form's code, {a} {b} {c} {d} are the operands after the destination, {T} their C++ type,
{R} the rounding mode, {F} and {S} whether .ftz and .sat are given. Forms that need more than an
expression are functions in `isa_special.py` and
its siblings.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptx_emulator import isa_async as asynchronous
from ptx_emulator import isa_special as special
from ptx_emulator import isa_sync as sync
from ptx_emulator import isa_warp as warp
from ptx_emulator import isa_wgmma as warpgroup
from ptx_emulator.parser import SIZES, Instruction
from ptx_emulator.site import Code, Scope, Site, cpp_type

INTS = frozenset(f"{k}{n}" for k in "us" for n in (16, 32, 64))
BITS = frozenset(f"b{n}" for n in (16, 32, 64))
LONG = frozenset(f"{k}{n}" for k in "us" for n in (32, 64))
LONG_BITS = BITS - {"b16"}
F = frozenset(("f32", "f64"))
SINGLE = frozenset(("f32",))
HALVES = frozenset(("f16", "bf16"))
PACKED = frozenset(("f16x2", "bf16x2"))
W32 = frozenset(("b32", "u32", "s32"))
ROUNDINGS = {"rn": "RN", "rz": "RZ", "rm": "RM", "rp": "RP", "approx": "RN", "full": "RN"}
FLOAT_MODS = frozenset((*ROUNDINGS, "ftz", "sat"))


@dataclass(frozen=True)
class Form:
    """One shape of an instruction.

    Attributes:
        types: what its type modifier may be.
        code: C++ expression of the result.
        needs: modifiers it must have; `allows`: further ones it may have.
        operands: C++ types of the operands after the destination; "T" the instruction's own.
        result: C++ type of the result.
        kind: the counters' class; `flops` floating-point operations a thread.
    """

    types: frozenset[str]
    code: str
    needs: frozenset[str] = frozenset()
    allows: frozenset[str] = frozenset()
    operands: str = "T T T T"
    result: str = "T"
    kind: str = "integer"
    flops: int = 0

    def fits(self, site: Site) -> bool:
        modifiers = set(site.modifiers)
        return (
            len(site.types) == 1
            and site.types[0] in self.types
            and self.needs <= modifiers <= self.needs | self.allows
        )

    def render(self, site: Site) -> str:
        ptx_type = site.types[0]
        own = cpp_type(ptx_type)
        names = "abcd"[: self.arity]
        arguments = {
            name: site.argument(i + 1, own if kind == "T" else kind)
            for i, (name, kind) in enumerate(zip(names, self.operands.split(), strict=False))
        }
        if len(site.operands) != self.arity + 1:
            raise site.unsupported(f"{len(site.operands)} operands")
        rounding = next((ROUNDINGS[m] for m in site.modifiers if m in ROUNDINGS), "RN")
        code = self.code.format(
            T=ptx_type[:-2] if ptx_type in PACKED else own,
            R=rounding,
            F=str(site.has("ftz")).lower(),
            S=str(site.has("sat")).lower(),
            N=8 * SIZES.get(ptx_type, 0),
            **arguments,
        )
        result = own if self.result == "T" else self.result
        return site.assign(site.operands[0], f"({result.format(T=own)})({code})")

    @property
    def arity(self) -> int:
        return sum("{" + name + "}" in self.code for name in "abcd")


def fs(*names: str) -> frozenset[str]:
    return frozenset(names)


def binary(name: str, packed: bool = True) -> tuple[Form, ...]:
    """Rounded float arithmetic on two operands, packed halves included."""
    forms = (
        Form(
            F | HALVES if packed else F,
            f"{name}_<{{T}}, {{R}}, {{F}}, {{S}}>({{a}}, {{b}})",
            allows=FLOAT_MODS,
            kind=name,
            flops=1,
        ),
    )
    if not packed:
        return forms
    call = f"[](auto x, auto y, auto) {{{{ return {name}_<{{T}}, RN, {{F}}, {{S}}>(x, y); }}}}"
    return (
        *forms,
        Form(
            PACKED,
            f"pairwise<{{T}}>({call}, {{a}}, {{b}})",
            allows=fs("rn", "ftz", "sat"),
            kind=name,
            flops=2,
        ),
    )


def extreme(name: str) -> tuple[Form, ...]:
    """min or max; NaN wins only where .NaN asks for it."""
    nan = fs("NaN")
    call = "[](auto x, auto y, auto) {{{{ return {n}_<{{T}}, {w}, {{F}}>(x, y); }}}}"
    pair = f"pairwise<{{{{T}}}}>({call}, {{{{a}}}}, {{{{b}}}})"
    return (
        Form(INTS, f"{name}_<{{T}}, false, false>({{a}}, {{b}})"),
        Form(
            F | HALVES,
            f"{name}_<{{T}}, false, {{F}}>({{a}}, {{b}})",
            allows=fs("ftz"),
            kind="float",
        ),
        Form(
            HALVES | SINGLE,
            f"{name}_<{{T}}, true, {{F}}>({{a}}, {{b}})",
            nan,
            fs("ftz"),
            kind="float",
        ),
        Form(PACKED, pair.format(n=name, w="false"), allows=fs("ftz"), kind="float"),
        Form(PACKED, pair.format(n=name, w="true"), nan, fs("ftz"), kind="float"),
    )


def function(code: str, types: frozenset[str]) -> tuple[Form, ...]:
    """A float function of one operand; `code` is its exact value of x."""
    lam = f"[](auto x) {{{{ return {code}; }}}}"
    one = f"unary_<{{R}}, {{F}}, {{S}}>({lam}, {{a}})"
    if not types & HALVES:
        return (Form(types, one, allows=FLOAT_MODS, kind="special"),)
    each = f"[](auto y, auto, auto) {{{{ return unary_<RN, {{F}}, false>({lam}, y); }}}}"
    return (
        Form(types, one, allows=FLOAT_MODS, kind="special"),
        Form(PACKED, f"pairwise<{{T}}>({each}, {{a}})", allows=fs("approx", "ftz"), kind="special"),
    )


def flipped(name: str) -> tuple[Form, ...]:
    signed = fs("s16", "s32", "s64")
    pair = (
        f"pairwise<{{T}}>([](auto x, auto, auto) {{{{ return flush<{{F}}>({name}(x)); }}}}, {{a}})"
    )
    return (
        Form(signed, f"{name}<{{T}}>({{a}})"),
        Form(F | HALVES, f"flush<{{F}}>({name}<{{T}}>({{a}}))", allows=fs("ftz"), kind="float"),
        Form(PACKED, pair, allows=fs("ftz"), kind="float"),
    )


def logic(symbol: str, predicate: str) -> tuple[Form, ...]:
    return (Form(BITS, f"{{a}} {symbol} {{b}}"), Form(fs("pred"), f"{{a}} {predicate} {{b}}"))


_FMA = "fma_<{T}, {R}, {F}, {S}>({a}, {b}, {c})"
_FMA2 = (
    "pairwise<{T}>([](auto x, auto y, auto z) "
    "{{ return fma_<{T}, RN, {F}, {S}>(x, y, z); }}, {a}, {b}, {c})"
)
_RELU = "max_<{T}, true, false>(fma_<{T}, RN, {F}, false>({a}, {b}, {c}), {T}(0.f))"
_RELU2 = (
    "pairwise<{T}>([](auto x, auto y, auto z) "
    "{{ return max_<{T}, true, false>(fma_<{T}, RN, {F}, false>(x, y, z), {T}(0.f)); }}, "
    "{a}, {b}, {c})"
)
NARROW = fs("u16", "s16", "u32", "s32")

TABLE: dict[str, tuple[Form | Code, ...]] = {
    "add": (
        *binary("add"),
        Form(INTS, "wrap_add<{T}>({a}, {b})"),
        Form(fs("s32"), "sat_to<{T}>((__int128){a} + {b})", fs("sat")),
        special.carry,
    ),
    "sub": (
        *binary("sub"),
        Form(INTS, "wrap_sub<{T}>({a}, {b})"),
        Form(fs("s32"), "sat_to<{T}>((__int128){a} - {b})", fs("sat")),
        special.carry,
    ),
    "addc": (special.carry,),
    "subc": (special.carry,),
    "madc": (special.carry,),
    "mul": (
        *binary("mul"),
        Form(INTS, "mul_lo<{T}>({a}, {b})", fs("lo")),
        Form(INTS, "mul_hi<{T}>({a}, {b})", fs("hi")),
        Form(NARROW, "mul_wide<{T}>({a}, {b})", fs("wide"), result="Wide<{T}>"),
    ),
    "mad": (
        Form(INTS, "wrap_add<{T}>(mul_lo<{T}>({a}, {b}), {c})", fs("lo")),
        Form(INTS, "wrap_add<{T}>(mul_hi<{T}>({a}, {b}), {c})", fs("hi")),
        Form(fs("s32"), "sat_to<{T}>((__int128)mul_hi<{T}>({a}, {b}) + {c})", fs("hi", "sat")),
        special.mad_wide,
        special.carry,
        Form(F, _FMA, allows=FLOAT_MODS, kind="fma", flops=2),
    ),
    "mul24": (
        Form(fs("u32"), "({a} & 0xffffffu) * ({b} & 0xffffffu)", fs("lo")),
        Form(
            fs("s32"), "mul_lo<s32>((s32)((u32){a} << 8) >> 8, (s32)((u32){b} << 8) >> 8)", fs("lo")
        ),
    ),
    "fma": (
        Form(F | HALVES, _FMA, allows=FLOAT_MODS - {"approx", "full"}, kind="fma", flops=2),
        Form(PACKED, _FMA2, allows=fs("rn", "ftz", "sat"), kind="fma", flops=4),
        Form(HALVES, _RELU, fs("rn", "relu"), fs("ftz"), kind="fma", flops=2),
        Form(PACKED, _RELU2, fs("rn", "relu"), fs("ftz"), kind="fma", flops=4),
    ),
    "div": (*binary("div", packed=False), Form(INTS, "div_int<{T}>({a}, {b})")),
    "rem": (Form(INTS, "rem_int<{T}>({a}, {b})"),),
    "abs": flipped("absolute"),
    "neg": flipped("negative"),
    "sad": (
        Form(
            INTS,
            "wrap_add<{T}>({a} > {b} ? wrap_sub<{T}>({a}, {b}) : wrap_sub<{T}>({b}, {a}), {c})",
        ),
    ),
    "min": extreme("min"),
    "max": extreme("max"),
    "sqrt": function("std::sqrt(x)", F),
    "rcp": function("1 / x", F),
    "rsqrt": function("1 / std::sqrt((double)x)", F),
    "ex2": function("std::exp2(x)", SINGLE | HALVES),
    "lg2": function("std::log2(x)", SINGLE),
    "sin": function("std::sin(x)", SINGLE),
    "cos": function("std::cos(x)", SINGLE),
    "tanh": function("std::tanh(x)", SINGLE | HALVES),
    "copysign": (Form(F, "std::copysign({b}, {a})", kind="float"),),
    "and": logic("&", "&&"),
    "or": logic("|", "||"),
    "xor": logic("^", "!="),
    "not": (Form(BITS, "~{a}"), Form(fs("pred"), "!{a}")),
    "cnot": (Form(BITS, "{a} == 0"),),
    "shl": (Form(BITS, "shift_left<{T}>({a}, {b})", operands="T u32"),),
    "shr": (Form(BITS | INTS, "shift_right<{T}>({a}, {b})", operands="T u32"),),
    "shf": (
        Form(fs("b32"), "funnel_left({a}, {b}, {c} & 31)", fs("l", "wrap")),
        Form(fs("b32"), "funnel_left({a}, {b}, std::min({c}, 32u))", fs("l", "clamp")),
        Form(fs("b32"), "funnel_right({a}, {b}, {c} & 31)", fs("r", "wrap")),
        Form(fs("b32"), "funnel_right({a}, {b}, std::min({c}, 32u))", fs("r", "clamp")),
    ),
    "lop3": (Form(fs("b32"), "lop3_({a}, {b}, {c}, {d})"),),
    "prmt": (Form(fs("b32"), "permute_bytes({a}, {b}, {c})"),),
    "bfe": (Form(LONG, "extract_field<{T}>({a}, {b}, {c})", operands="T u32 u32"),),
    "bfi": (Form(LONG_BITS, "insert_field<{T}>({a}, {b}, {c}, {d})", operands="T T u32 u32"),),
    "brev": (Form(LONG_BITS, "reverse_bits<{T}>({a})"),),
    "popc": (Form(LONG_BITS, "__builtin_popcountll({a})", result="u32"),),
    "clz": (Form(LONG_BITS, "leading_zeros<{T}>({a})", result="u32"),),
    "bfind": (
        Form(LONG, "find_top<{T}>({a}, false)", result="u32"),
        Form(LONG, "find_top<{T}>({a}, true)", fs("shiftamt"), result="u32"),
    ),
    "dp4a": (special.dp4a,),
    "selp": (Form(BITS | INTS | F, "{c} ? {a} : {b}", operands="T T bool"),),
    "mov": (special.mov,),
    "setp": (special.setp,),
    "set": (special.setp,),
    "testp": (special.testp,),
    "cvt": (special.cvt,),
    "cvta": (special.cvta,),
    "isspacep": (special.isspacep,),
    "ld": (special.load_store,),
    "ldu": (special.load_store,),
    "st": (special.load_store,),
    "atom": (special.atomic,),
    "red": (special.atomic,),
    "bra": (special.branch,),
    "brx": (special.branch_indexed,),
    "call": (special.call,),
    "ret": (special.leave,),
    "exit": (special.leave,),
    "trap": (special.trap,),
    "bar": (sync.barrier,),
    "barrier": (sync.barrier,),
    "mbarrier": (sync.mbarrier,),
    "fence": (sync.fence,),
    "elect": (sync.elect,),
    "griddepcontrol": (sync.grid_dependency,),
    "setmaxnreg": (sync.register_count,),
    "nanosleep": (sync.sleep,),
    "mapa": (special.mapa,),
    "getctarank": (special.block_rank,),
    "activemask": (Form(fs("b32"), "(1u << t.lane)"),),
    "shfl": (warp.shuffle,),
    "vote": (warp.vote,),
    "match": (warp.match,),
    "redux": (warp.reduce,),
    "ldmatrix": (warp.matrix,),
    "stmatrix": (warp.matrix,),
    "mma": (warp.mma,),
    "wgmma": (warpgroup.wgmma,),
    "cp": (asynchronous.copy_async,),
    # no effect on the emulated machine: memory is coherent, and these only hint at timing
    "membar": (special.nothing,),
    "prefetch": (special.nothing,),
    "prefetchu": (special.nothing,),
    "createpolicy": (special.cache_policy,),
}

_MEMORY = ("ld", "ldu", "st", "atom", "red", "cp", "ldmatrix", "stmatrix")
_CONTROL = (
    *("bra", "brx", "call", "ret", "exit", "trap", "bar", "barrier", "membar", "fence"),
    *("mbarrier", "griddepcontrol", "setmaxnreg", "nanosleep"),
)
_WARP = ("shfl", "vote", "match", "redux", "elect")


def translate(instruction: Instruction, scope: Scope) -> tuple[str, str, int]:
    """C++ statement, counter class and flops a thread of one instruction.

    Raises:
        UnsupportedInstruction: no form of the table fits it.
    """
    site = Site(instruction, scope)
    root = instruction.parts[0]
    for form in TABLE.get(root, ()):
        if not isinstance(form, Form):
            code = form(site)
            if code is not None:
                return code, *classify(root, site)
        elif form.fits(site):
            counted = form.flops or form.kind == "special"
            kind = f"{form.kind}.{site.types[0]}" if counted else form.kind
            return form.render(site), kind, form.flops
    raise site.unsupported()


def classify(root: str, site: Site) -> tuple[str, int]:
    """Counter class and flops a thread of an instruction that has no `Form`."""
    if root == "mma":
        return f"mma.{site.types[1]}", warp.mma_flops(site)
    if root == "wgmma":
        flops = warpgroup.flops(site)
        return (f"wgmma.{site.types[1]}", flops) if flops else ("control", 0)
    if root in _MEMORY:
        return "memory", 0
    if root in _CONTROL:
        return "control", 0
    if root in _WARP:
        return "warp", 0
    return ("convert" if root in ("cvt", "cvta") else "move" if root == "mov" else "integer"), 0
