"""Translation of a parsed PTX module to one C++ file for the runtime in `runtime/`."""

from __future__ import annotations

from dataclasses import dataclass

from ptx_emulator.isa import table, wgmma
from ptx_emulator.operation import Operation, Scope, cpp_bool, symbol
from ptx_emulator.parser import (
    SIZES,
    Brace,
    Function,
    Instruction,
    Label,
    Module,
    PtxError,
    Source,
    Variable,
)

_REGISTER_TYPES = {1: "u16", 2: "u16", 4: "u32", 8: "u64"}  # by bytes
# The registers of a function are elements of one array per type: g++ needs seconds to look up
# thousands of separate variables.
_REGISTER_ARRAYS = {"bool": "p", "u16": "r16_", "u32": "r32_", "u64": "r64_"}
# bytes that a PTX register may take in the stack frame that g++ makes, spills included
_STACK_BYTES_PER_REGISTER = 24
_MIN_STACK_BYTES = 1 << 16


@dataclass(frozen=True)
class Kernel:
    """Facts about a kernel that a launch needs.

    Attributes:
        name: name in the PTX.
        function: name of the C function that launches it.
        parameters: its parameters.
        threads: required block size, or None.
        cluster: required cluster size, or None.
        static_shared: bytes of static shared memory.
    """

    name: str
    function: str
    parameters: tuple[Variable, ...]
    threads: tuple[int, ...] | None
    cluster: tuple[int, ...] | None
    static_shared: int


@dataclass(frozen=True)
class Program:
    """The C++ of a module, and facts for launching it and for reading reports and counters.

    Attributes:
        code: C++ source.
        kernels: kernels by name.
        globals: C++ name, bytes and PTX name of each module-scope variable in memory.
        classes: instruction class and flops per thread of each execution counter.
        sources: source line of each PTX line that has one.
        uses_global_atomics: some kernel has an atomic on global or generic addresses.
    """

    code: str
    kernels: dict[str, Kernel]
    globals: tuple[tuple[str, int, str], ...]
    classes: tuple[tuple[str, int], ...]
    sources: dict[int, Source]
    uses_global_atomics: bool


def translate(module: Module) -> Program:
    """Translates all kernels and functions of a module.

    Raises:
        UnsupportedInstruction: an instruction is not implemented; names it and its line.
        PtxError: a declaration is not supported.
    """
    return _Translator(module).program()


class _Translator:
    def __init__(self, module: Module) -> None:
        self.module = module
        self.defined = [f for f in module.functions if not f.declared_only]
        self.shared: dict[str, dict[str, int]] = {}  # offsets of the variables of each function
        self.static_shared: dict[str, int] = {}  # bytes of each function
        self.extern_shared: list[str] = []
        self.globals: list[tuple[str, int, str]] = []
        self.definitions: list[str] = []
        self.classes: dict[tuple[str, int], int] = {}
        self.sources: dict[int, Source] = {}
        self.access_sites = 0
        self.local_bytes = 0
        self.kernel_registers = 0  # of the largest kernel
        self.function_registers = 0  # of all functions: they may call each other in a chain
        self.smallest_shared_access = 4
        self.uses_global_atomics = False
        self.uses_async_proxy = False

    def program(self) -> Program:
        self.place_variables()
        functions = [self.function(f) for f in self.defined]
        declarations = [self.head(f) + ";" for f in self.defined if not f.entry]
        kernels = [f for f in self.defined if f.entry]
        addresses = [
            f'extern "C" void* {name}_address() {{ return {name}; }}' for name, _, _ in self.globals
        ]
        code = [
            '#include "launch.h"',
            *self.definitions,
            *declarations,
            *functions,
            *map(self.launcher, kernels),
            *addresses,
        ]
        return Program(
            "\n".join(code) + "\n",
            {f.name: self.kernel(f) for f in kernels},
            tuple(self.globals),
            tuple(self.classes),
            self.sources,
            self.uses_global_atomics,
        )

    # ---- variables

    def place_variables(self) -> None:
        """Places shared variables and defines those in global and constant memory."""
        module_shared = [v for v in self.module.variables if v.space == "shared"]
        common, end = self.place_shared(module_shared, 0)
        # the variables of functions lie below those of the kernels, which share the rest
        for function in sorted(self.module.functions, key=lambda f: f.entry):
            declared = [v for v in function.body if isinstance(v, Variable)]
            own, stop = self.place_shared([v for v in declared if v.space == "shared"], end)
            self.shared[function.name] = common | own
            self.static_shared[function.name] = stop
            end = end if function.entry else stop
            for variable in declared:
                if variable.space in ("global", "const"):
                    self.define_global(variable)
        for variable in self.module.variables:
            if variable.space in ("global", "const"):
                self.define_global(variable)
        if self.extern_shared:
            largest = max(self.static_shared.values(), default=0)
            for name, offsets in self.shared.items():
                offsets |= dict.fromkeys(self.extern_shared, largest)
                self.static_shared[name] = largest

    def place_shared(self, variables: list[Variable], start: int) -> tuple[dict[str, int], int]:
        """Returns the offsets of sized shared variables from `start` on, and their end."""
        offsets: dict[str, int] = {}
        for variable in variables:
            if variable.count < 0 or variable.bytes == 0:
                self.extern_shared.append(variable.name)
                continue
            start = _round_up(start, variable.align)
            offsets[variable.name] = start
            start += variable.bytes
        return offsets, _round_up(start, 16)

    def define_global(self, variable: Variable) -> None:
        """Adds the C++ definition of a variable in global or constant memory."""
        name, size = symbol("V_", variable.name), max(variable.bytes, 1)
        values = "{}"
        if variable.init:
            literals = [x.strip() for x in variable.init.strip().strip("{}").split(",")]
            if not all(x.lstrip("-").isalnum() for x in literals):
                raise PtxError(
                    f"PTX line {variable.line}: the initialiser of {variable.name} is not a list "
                    "of numbers (addresses are not supported)"
                )
            values = ", ".join(f"({variable.type})({_cpp_literal(x)})" for x in literals)
            values = "{" + values + "}"
        self.definitions.append(
            f"alignas({max(variable.align, 16)}) static {variable.type} "
            f"{name}[{max(variable.count, 1)}] = {values};"
        )
        self.globals.append((name, size, variable.name))

    # ---- functions

    def head(self, function: Function) -> str:
        """Returns the head of a function's C++ definition."""
        if function.entry:
            return f"static void {symbol('K_', function.name)}(Thread& t, u8** parameters)"
        names = [p.name for p in (*function.results, *function.parameters)]
        parameters = ", ".join(["Thread& t", *(f"u8* {symbol('P_', n)}" for n in names)])
        return f"static void {symbol('F_', function.name)}({parameters})"

    def function(self, function: Function) -> str:
        """Returns the C++ definition of a kernel or function."""
        scope = Scope(
            shared=self.shared[function.name],
            globals={name for _, _, name in self.globals},
            parameters={p.name for p in (*function.parameters, *function.results)},
            functions={f.name for f in self.defined},
            branch_targets=_branch_targets(function),
            wgmma_registers=_wgmma_registers(function),
            access_sites=self.access_sites,
            is_entry=function.entry,
        )
        registers = dict.fromkeys(_REGISTER_ARRAYS, 0)  # number of registers of each type
        lines: list[str] = []
        frame = 0
        labels = _scoped_labels(function)
        for i, statement in enumerate(function.body):
            if isinstance(statement, Brace):
                hidden = f" __label__ {', '.join(labels[i])};" if labels.get(i) else ""
                lines.append(statement.text + hidden)
                if statement.text == "{":
                    scope.registers.append({})
                else:
                    scope.registers.pop()
            elif isinstance(statement, Label):
                if not statement.targets:
                    lines.append(f"{symbol('L_', statement.name)}:;")
            elif isinstance(statement, Instruction):
                lines.append(self.instruction(statement, scope))
            elif statement.space == "reg":
                _declare_register(statement, scope, registers)
            elif statement.space == "local":
                frame = _round_up(frame, statement.align)
                scope.locals[statement.name] = frame
                frame += statement.bytes
            elif statement.space == "param":
                scope.parameters.add(statement.name)
                size = max(statement.bytes, 1)
                lines.append(f"alignas(16) u8 {symbol('P_', statement.name)}[{size}];")
        self.access_sites = scope.access_sites
        if function.entry:
            self.kernel_registers = max(self.kernel_registers, sum(registers.values()))
        else:
            self.function_registers += sum(registers.values())
            frame = max(frame, 16)  # so that endless recursion runs out of local memory
        self.local_bytes += _round_up(frame, 16)
        start = [
            f"u8* {symbol('P_', p.name)} = parameters[{i}];"
            for i, p in enumerate(function.parameters)
            if function.entry
        ]
        start += [f"{t} {_REGISTER_ARRAYS[t]}[{n}] = {{}};" for t, n in registers.items() if n]
        start += [f"Frame frame(t, {frame});"] if frame else []
        return f"{self.head(function)} {{\n" + "\n".join([*start, *lines]) + "\n}"

    def instruction(self, instruction: Instruction, scope: Scope) -> str:
        """Returns an instruction's C++ statement, with its counter, its checks and its guard."""
        if instruction.source:
            self.sources[instruction.line] = instruction.source
        code, kind, flops = table.translate(instruction, scope)
        number = self.classes.setdefault((kind, flops), len(self.classes))
        code = f"count_instruction(t, {number}); {code}"
        if scope.wgmma_registers:
            op = Operation(instruction, scope)
            code = wgmma.register_checks(op, scope.wgmma_registers) + code
        self.note_memory_access(instruction)
        if instruction.guard is None:
            return f"{{ {code} }}"
        guard = scope.register(instruction.guard.name)
        if guard is None:
            raise PtxError(
                f"PTX line {instruction.line}: unknown guard register {instruction.guard.name}"
            )
        return f"if ({'!' if instruction.guard.negated else ''}{guard}) {{ {code} }}"

    def note_memory_access(self, instruction: Instruction) -> None:
        """Updates the facts about memory that a launch needs."""
        root, *modifiers = instruction.parts
        if root in ("atom", "red") and not any(m.startswith("shared") for m in modifiers):
            self.uses_global_atomics = True
        accesses = root in ("ld", "st", "atom", "red", "ldmatrix", "stmatrix")
        if accesses and "param" not in modifiers:
            kind = next((m for m in reversed(modifiers) if m in SIZES), "b32")
            self.smallest_shared_access = min(self.smallest_shared_access, SIZES[kind])
        self.uses_async_proxy |= root == "wgmma" or "bulk" in modifiers

    # ---- kernels

    def kernel(self, function: Function) -> Kernel:
        return Kernel(
            function.name,
            symbol("launch_", function.name),
            function.parameters,
            function.threads,
            function.cluster,
            self.static_shared[function.name],
        )

    def launcher(self, function: Function) -> str:
        """Returns the C function that launches a kernel: the arguments are a `KernelInfo`."""
        registers = self.kernel_registers + self.function_registers
        stack = _round_up(_MIN_STACK_BYTES + _STACK_BYTES_PER_REGISTER * registers, 4096)
        info = (
            *(self.static_shared[function.name], stack, self.local_bytes),
            *(self.access_sites, len(self.classes)),
            self.smallest_shared_access.bit_length() - 1,
            cpp_bool(self.uses_async_proxy),
        )
        return (
            f'extern "C" Outcome* {symbol("launch_", function.name)}(const LaunchRequest* r) '
            f"{{ return start_launch(*r, {symbol('K_', function.name)}, "
            f"{{{', '.join(map(str, info))}}}); }}"
        )


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _cpp_literal(text: str) -> str:
    """Returns a PTX number as a C++ expression."""
    if text[:2].lower() == "0f":
        return f"bits_as<f32>(0x{text[2:]}u)"
    if text[:2].lower() == "0d":
        return f"bits_as<f64>((u64)0x{text[2:]}ull)"
    return text


def _declare_register(variable: Variable, scope: Scope, registers: dict[str, int]) -> None:
    """Gives a register the next element of the array of its type."""
    kind = "bool" if variable.type == "pred" else _REGISTER_TYPES.get(SIZES[variable.type])
    if kind is None:
        raise PtxError(f"PTX line {variable.line}: registers of .{variable.type} are not supported")
    scope.registers[-1][variable.name] = f"{_REGISTER_ARRAYS[kind]}[{registers[kind]}]"
    registers[kind] += 1


def _branch_targets(function: Function) -> dict[str, tuple[str, ...]]:
    labels = [x for x in function.body if isinstance(x, Label)]
    return {label.name: label.targets for label in labels if label.targets}


def _scoped_labels(function: Function) -> dict[int, list[str]]:
    """Returns the labels of each scope, by the position of its brace in the body.

    PTX hides a label outside of its scope, C++ only if it is declared there.
    """
    found: dict[int, list[str]] = {}
    scopes: list[int] = []
    for i, statement in enumerate(function.body):
        if isinstance(statement, Brace):
            if statement.text == "{":
                scopes.append(i)
                found[i] = []
            else:
                scopes.pop()
        elif isinstance(statement, Label) and scopes and not statement.targets:
            found[scopes[-1]].append(symbol("L_", statement.name))
    return found


def _wgmma_registers(function: Function) -> set[str]:
    """Returns the registers that `wgmma` products use, and the sources of copies to them."""
    names: set[str] = set()
    sources: dict[str, set[str]] = {}
    for statement in function.body:
        if isinstance(statement, Instruction):
            names |= wgmma.registers_of(statement)
            if copy := wgmma.register_copy(statement):
                sources.setdefault(copy[0], set()).add(copy[1])
    return wgmma.with_copy_sources(names, sources)
