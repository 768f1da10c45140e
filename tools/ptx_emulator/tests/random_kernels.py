"""Random CUDA kernels without undefined behaviour, each with an evaluation in numpy.

They test control flow, exchanges between threads and mixed types. Single instructions have tests
of their own, so a few operators per type are enough.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cases_conversions import to_int
from cases_integers import each, low_bits
from exact_arithmetic import arithmetic
from instruction_cases import wrapped

THREADS = 64
Environment = dict[str, np.ndarray]
# a kernel has one variable of each type: C type, numpy type, PTX type
TYPES = {
    "i": ("int", "i4", "s32"),
    "u": ("unsigned", "u4", "u32"),
    "l": ("long long", "i8", "s64"),
    "f": ("float", "f4", "f32"),
    "d": ("double", "f8", "f64"),
}
PRELUDE = """
#define INTEGERS(T, U, name, most)                                        \\
  __device__ T add_##name(T a, T b) { return (T)((U)a + (U)b); }          \\
  __device__ T mul_##name(T a, T b) { return (T)((U)a * (U)b); }          \\
  __device__ T shr_##name(T a, int n) { return a >> (n & most); }         \\
  __device__ T xor_##name(T a, T b) { return a ^ b; }                     \\
  __device__ T max_##name(T a, T b) { return a > b ? a : b; }
INTEGERS(int, unsigned, i, 31)
INTEGERS(unsigned, unsigned, u, 31)
INTEGERS(long long, unsigned long long, l, 63)
#define FLOATS(T, name)                                       \\
  __device__ T add_##name(T a, T b) { return a + b; }         \\
  __device__ T mul_##name(T a, T b) { return a * b; }         \\
  __device__ T div_##name(T a, T b) { return a / b; }         \\
  __device__ T root_##name(T a) { return sqrt(fabs(a)); }
FLOATS(float, f)
FLOATS(double, d)
"""


@dataclass(frozen=True)
class Operator:
    """A C function or cast, the types of its operands, and the same function in numpy."""

    code: str
    operands: str
    want: Callable[..., np.ndarray]


def wrap(kind: str, f: Callable) -> Callable[..., np.ndarray]:
    """Returns a function of Python integers as a function over arrays, wrapped to the type."""
    bits, sign = (64 if kind == "l" else 32), kind != "u"

    def want(*operands: np.ndarray) -> np.ndarray:
        results = each(f)(*(x.astype(object) for x in operands))
        return np.array([low_bits(int(x), bits, sign) for x in results], TYPES[kind][1])

    return want


def integers(kind: str) -> list[Operator]:
    c_type, dtype, ptx_type = TYPES[kind]
    name, most = {"i": ("int", 31), "u": ("uint", 31), "l": ("ll", 63)}[kind]
    convert = to_int(ptx_type, "f32", "rni").want
    return [
        Operator(f"add_{kind}", kind * 2, wrap(kind, lambda a, b: a + b)),
        Operator(f"mul_{kind}", kind * 2, wrap(kind, lambda a, b: a * b)),
        Operator(f"xor_{kind}", kind * 2, wrap(kind, lambda a, b: a ^ b)),
        Operator(f"max_{kind}", kind * 2, wrap(kind, lambda a, b: max(a, b))),
        Operator(f"shr_{kind}", f"{kind}i", wrap(kind, lambda a, n: a >> (n & most))),
        Operator(f"__float2{name}_rn", "f", lambda a: wrapped(convert(a), ptx_type).astype(dtype)),
        *(Operator(f"({c_type})", k, wrap(kind, lambda a: a)) for k in "iul" if k != kind),
    ]


def cast(f: Callable, dtype: str) -> Callable[..., np.ndarray]:
    return lambda *operands: f(*operands).astype(dtype)


def floats(kind: str) -> list[Operator]:
    c_type, dtype, ptx_type = TYPES[kind]
    letter = "f" if kind == "f" else ""
    return [
        Operator(f"add_{kind}", kind * 2, np.add),
        Operator(f"mul_{kind}", kind * 2, np.multiply),
        Operator(f"div_{kind}", kind * 2, np.divide),
        Operator(f"root_{kind}", kind, lambda a: np.sqrt(np.abs(a))),
        Operator(f"fma{letter}", kind * 3, cast(arithmetic("fma", ptx_type), dtype)),
        Operator(f"__{kind}add_ru", kind * 2, cast(arithmetic("add", ptx_type, "rp"), dtype)),
        *(Operator(f"({c_type})", k, cast(lambda a: a, dtype)) for k in "iulfd" if k != kind),
    ]


OPERATORS = {kind: integers(kind) for kind in "iul"} | {kind: floats(kind) for kind in "fd"}
COMPARISONS: dict[str, Callable] = {
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
    "==": np.equal,
    "!=": np.not_equal,
}


@dataclass(frozen=True)
class Expression:
    code: str
    value: Callable[[Environment], np.ndarray]


@dataclass(frozen=True)
class Statement:
    """A statement; `run` changes the variables of the threads in a mask."""

    code: str
    run: Callable[[Environment, np.ndarray], None]


class Generator:
    """Draws random kernels; the same seed gives the same kernels."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.counters: list[str] = []  # of the loops that enclose the statement

    def expression(self, kind: str, depth: int) -> Expression:
        choice = self.random.random()
        if depth == 0 or choice < 0.1:
            return self.leaf(kind)
        if choice < 0.25:
            test = self.comparison(depth - 1)
            yes, no = (self.expression(kind, depth - 1) for _ in range(2))
            return Expression(
                f"({test.code} ? {yes.code} : {no.code})",
                lambda e: np.where(test.value(e), yes.value(e), no.value(e)),
            )
        operator = self.random.choice(OPERATORS[kind])
        inner = [self.expression(k, depth - 1) for k in operator.operands]
        code = f"{operator.code}({', '.join(x.code for x in inner)})"
        return Expression(code, lambda e: operator.want(*(x.value(e) for x in inner)))

    def leaf(self, kind: str) -> Expression:
        if kind == "i" and self.random.random() < 0.4:
            name = self.random.choice(["t", *self.counters])
            return Expression(name, lambda e: e[name])
        if self.random.random() < 0.8:
            return Expression(kind, lambda e: e[kind])
        number = self.random.choice([0, 1, 2, 3, 7, 31, 100, 65535])
        c_type, dtype, _ = TYPES[kind]
        return Expression(f"({c_type}){number}", lambda e: np.full(THREADS, number, dtype))

    def comparison(self, depth: int) -> Expression:
        kind, sign = self.random.choice("iulfd"), self.random.choice(list(COMPARISONS))
        a, b = (self.expression(kind, depth) for _ in range(2))
        return Expression(
            f"({a.code} {sign} {b.code})", lambda e: COMPARISONS[sign](a.value(e), b.value(e))
        )

    def assignment(self) -> Statement:
        kind = self.random.choice("iulfd")
        value = self.expression(kind, 2)

        def run(e: Environment, mask: np.ndarray) -> None:
            if mask.any():
                e[kind] = np.where(mask, value.value(e), e[kind])

        return Statement(f"{kind} = {value.code};", run)

    def sequence(self, depth: int) -> Statement:
        parts = [self.statement(depth) for _ in range(self.random.randint(1, 2))]

        def run(e: Environment, mask: np.ndarray) -> None:
            for part in parts:
                part.run(e, mask)

        return Statement("\n".join(x.code for x in parts), run)

    def branch(self, depth: int) -> Statement:
        test, yes, no = self.comparison(1), self.sequence(depth - 1), self.sequence(depth - 1)

        def run(e: Environment, mask: np.ndarray) -> None:
            chosen = test.value(e)
            yes.run(e, mask & chosen)
            no.run(e, mask & ~chosen)

        return Statement(f"if {test.code} {{\n{yes.code}\n}} else {{\n{no.code}\n}}", run)

    def loop(self, depth: int) -> Statement:
        """Returns a loop whose number of iterations differs between threads, with a break."""
        name, times = f"n{len(self.counters)}", self.expression("i", 2)
        self.counters.append(name)
        inside, leave = self.sequence(depth - 1), self.comparison(1)
        self.counters.pop()
        code = f"for (int {name} = 0, end = {times.code} & 7; {name} < end; {name}++) {{\n"
        code += f"{inside.code}\nif {leave.code} break;\n}}"

        def run(e: Environment, mask: np.ndarray) -> None:
            end = times.value(e) & 7
            for turn in range(7):
                mask = mask & (turn < end)
                e[name] = np.full(THREADS, turn, "i4")
                inside.run(e, mask)
                mask = mask & ~leave.value(e)

        return Statement(code, run)

    def switch(self, depth: int) -> Statement:
        value = self.expression("i", 1)
        cases = [self.sequence(depth - 1) for _ in range(5)]
        code = "".join(f"case {n}:\n{c.code}\nbreak;\n" for n, c in enumerate(cases))

        def run(e: Environment, mask: np.ndarray) -> None:
            chosen = value.value(e) & 7
            for n, c in enumerate(cases):
                c.run(e, mask & (chosen == n))

        return Statement(f"switch ({value.code} & 7) {{\n{code}}}", run)

    def statement(self, depth: int) -> Statement:
        if depth == 0 or self.random.random() < 0.5:
            return self.assignment()
        return self.random.choice([self.branch, self.loop, self.switch])(depth)

    def permutation(self) -> Statement:
        """Returns an exchange of a variable between all threads through shared memory."""
        kind, step, shift = self.random.choice("iulfd"), *self.random.choices(range(1, 64, 2), k=2)
        index = self.expression("i", 1)
        code = f"shared_{kind}[({step} * t + {shift}) & 63] = {kind};\n__syncthreads();\n"
        code += f"{kind} = shared_{kind}[{index.code} & 63];\n__syncthreads();"

        def run(e: Environment, mask: np.ndarray) -> None:
            memory = np.empty_like(e[kind])
            memory[(step * e["t"] + shift) & 63] = e[kind]
            e[kind] = memory[index.value(e) & 63]

        return Statement(code, run)

    def shuffle(self) -> Statement:
        kind, amount = self.random.choice("iulfd"), self.random.randint(0, 31)
        mode = self.random.choice(["", "_xor", "_up", "_down"])
        lane = np.arange(THREADS) % 32
        source = {"": 0 * lane + amount, "_xor": lane ^ amount}
        source |= {"_up": lane - amount, "_down": lane + amount}
        from_lane = np.where((source[mode] < 0) | (source[mode] > 31), lane, source[mode])

        def run(e: Environment, mask: np.ndarray) -> None:
            e[kind] = e[kind][np.arange(THREADS) // 32 * 32 + from_lane]

        return Statement(f"{kind} = __shfl{mode}_sync(~0u, {kind}, {amount});", run)

    def kernel(self, name: str) -> Statement:
        parts = [self.statement(2), self.permutation(), self.statement(2), self.shuffle()]
        return assemble(name, [*parts, self.statement(2), self.assignment()])


def assemble(name: str, parts: list[Statement]) -> Statement:
    """Returns a kernel that loads the variables, runs statements, and stores the variables."""
    types = [(kind, c_type) for kind, (c_type, _, _) in TYPES.items()]
    parameters = ", ".join(f"{c_type}* memory_{kind}" for kind, c_type in types)
    code = f'extern "C" __global__ void {name}({parameters}) {{\nint t = threadIdx.x;\n'
    code += "".join(f"__shared__ {c_type} shared_{kind}[64];\n" for kind, c_type in types)
    code += "".join(f"{c_type} {kind} = memory_{kind}[t];\n" for kind, c_type in types)
    code += "\n".join(x.code for x in parts)
    code += "".join(f"\nmemory_{kind}[t] = {kind};" for kind in TYPES)

    def run(e: Environment, mask: np.ndarray) -> None:
        for part in parts:
            part.run(e, mask)

    return Statement(f"{code}\n}}\n", run)


def one_operator(kind: str, code: str) -> Statement:
    """Returns a statement that applies an operator to a variable and the thread id."""
    operator = next(x for x in OPERATORS[kind] if x.code == code)
    first, rest = operator.operands[0], operator.operands[1:]
    numbers = "".join(f", ({TYPES[k][0]})t" for k in rest)

    def run(e: Environment, mask: np.ndarray) -> None:
        value = operator.want(e[first], *(e["t"].astype(TYPES[k][1]) for k in rest))
        e[kind] = np.where(mask, value, e[kind])

    return Statement(f"{kind} = {code}({first}{numbers});", run)


def inputs(seed: int) -> Environment:
    """Returns values of each type: edges, small values, and random bits."""
    draw = np.random.default_rng(seed)
    found: Environment = {"t": np.arange(THREADS, dtype="i4")}
    for kind, (_, dtype, _) in TYPES.items():
        size = int(dtype[1])
        noise = np.frombuffer(draw.bytes(THREADS * size), dtype)
        small = draw.integers(0, 200, THREADS).astype(dtype)
        edges = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 0.5, -1.5, 2.5, 1e10]
        if kind in "iul":
            edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
            edges = [x % 2 ** (8 * size) for x in edges]
        values = np.array(edges, dtype if kind in "fd" else f"u{size}").view(dtype)
        pick = draw.integers(0, 3, THREADS)
        found[kind] = np.choose(pick, [noise, small, draw.choice(values, THREADS)])
    return found
