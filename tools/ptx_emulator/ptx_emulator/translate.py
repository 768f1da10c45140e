"""A parsed PTX module to one C++ file for the runtime in `ptx_emulator/runtime`."""

from __future__ import annotations

from dataclasses import dataclass

from ptx_emulator import isa, isa_wgmma
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
from ptx_emulator.site import Scope, Site, cpp_bool, symbol

_REGISTERS = {1: "u16", 2: "u16", 4: "u32", 8: "u64"}
# a function's registers are elements of an array of each type: g++ took 6 s to look up the names of
# 5,600 variables that now takes 0.9 s to read
_ARRAYS = {"bool": "p", "u16": "r16_", "u32": "r32_", "u64": "r64_"}
_REGISTERS_ON_STACK = 24  # bytes a PTX register may take in g++'s frame, spills included


@dataclass(frozen=True)
class Kernel:
    """What a launch needs to know of a kernel."""

    name: str
    function: str
    parameters: tuple[Variable, ...]
    threads: tuple[int, ...] | None
    cluster: tuple[int, ...] | None
    static_shared: int


@dataclass(frozen=True)
class Program:
    """The C++ and what is needed to launch and to read reports.

    Attributes:
        globals: (C++ name, bytes, PTX name) of each module-scope variable in memory.
        classes: the instruction class each execution counter counts, and flops a thread.
        sources: PTX line to source line, where the PTX has it.
    """

    code: str
    kernels: dict[str, Kernel]
    globals: tuple[tuple[str, int, str], ...]
    classes: tuple[tuple[str, int], ...]
    sources: dict[int, Source]
    target: str
    uses_global_atomics: bool


def _local_labels(function: Function) -> dict[int, list[str]]:
    """The labels of each scope, by the place of its brace in the body: PTX hides them outside."""
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


class _Translator:
    def __init__(self, module: Module) -> None:
        self.module = module
        self.shared: dict[str, dict[str, int]] = {}
        self.static_shared: dict[str, int] = {}
        self.extern_shared: list[str] = []
        self.globals: list[tuple[str, int, str]] = []
        self.definitions: list[str] = []
        self.classes: dict[tuple[str, int], int] = {}
        self.sources: dict[int, Source] = {}
        self.sites = 0
        self.local_bytes = 0
        self.registers = 0  # of the largest kernel
        self.called_registers = 0  # of all functions together: they may call each other in a chain
        self.smallest_shared = 4
        self.atomics = False
        self.async_proxy = False
        self.bodies = {f.name for f in module.functions if not f.declared_only}

    # ---- variables

    def place_shared(self, variables: list[Variable], start: int) -> tuple[dict[str, int], int]:
        """Offsets of sized shared variables from `start` on, and where they end."""
        offsets: dict[str, int] = {}
        for variable in variables:
            if variable.count < 0 or variable.bytes == 0:
                self.extern_shared.append(variable.name)
                continue
            start = (start + variable.align - 1) // variable.align * variable.align
            offsets[variable.name] = start
            start += variable.bytes
        return offsets, (start + 15) // 16 * 16

    def define_global(self, variable: Variable) -> None:
        name, size = symbol("V_", variable.name), max(variable.bytes, 1)
        values = ""
        if variable.init:
            text = variable.init.strip().strip("{}")
            if not all(x.strip().lstrip("-").isalnum() for x in text.split(",")):
                raise PtxError(
                    f"PTX line {variable.line}: initialiser of {variable.name} holds an address, "
                    "which is not supported"
                )
            items = ", ".join(f"({variable.type})({_literal(x.strip())})" for x in text.split(","))
            values = "{" + items + "}"
        elements = max(variable.count, 1)
        self.definitions.append(
            f"alignas({max(variable.align, 16)}) static {variable.type} {name}[{elements}] = "
            f"{values or '{}'};"
        )
        self.globals.append((name, size, variable.name))

    def collect(self) -> None:
        module_shared = [v for v in self.module.variables if v.space == "shared"]
        common, end = self.place_shared(module_shared, 0)
        # a .func's variables lie below those of every kernel; kernels share the rest
        for function in sorted(self.module.functions, key=lambda f: f.entry):
            inside = [v for v in function.body if isinstance(v, Variable)]
            own, stop = self.place_shared([v for v in inside if v.space == "shared"], end)
            self.shared[function.name] = common | own
            self.static_shared[function.name] = stop
            end = end if function.entry else stop
            for variable in inside:
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

    # ---- functions

    def parameters(self, function: Function) -> str:
        names = [p.name for p in (*function.results, *function.parameters)]
        return ", ".join(["Thread& t", *(f"u8* {symbol('P_', n)}" for n in names)])

    def head(self, function: Function) -> str:
        if function.entry:
            return f"static void {symbol('K_', function.name)}(Thread& t, u8** parameters)"
        return f"static void {symbol('F_', function.name)}({self.parameters(function)})"

    def instruction(self, instruction: Instruction, scope: Scope) -> str:
        if instruction.source:
            self.sources[instruction.line] = instruction.source
        code, kind, flops = isa.translate(instruction, scope)
        number = self.classes.setdefault((kind, flops), len(self.classes))
        counted = f"count_instruction(t, {number}); {code}"
        if scope.product_registers:
            site = Site(instruction, scope)
            counted = isa_wgmma.touches(instruction, site, scope.product_registers) + counted
        root = instruction.parts[0]
        if root in ("atom", "red") and not any(p.startswith("shared") for p in instruction.parts):
            self.atomics = True
        if root in ("ld", "st", "atom", "red", "ldmatrix", "stmatrix"):
            kind = next((p for p in reversed(instruction.parts) if p in SIZES), "b32")
            if "param" not in instruction.parts:
                self.smallest_shared = min(self.smallest_shared, SIZES[kind])
        self.async_proxy |= root == "wgmma" or "bulk" in instruction.parts
        if instruction.guard is None:
            return f"{{ {counted} }}"
        guard = scope.register(instruction.guard.name)
        if guard is None:
            raise PtxError(f"PTX line {instruction.line}: unknown {instruction.guard.name}")
        return f"if ({'!' if instruction.guard.negated else ''}{guard}) {{ {counted} }}"

    def function(self, function: Function) -> str:
        scope = Scope(
            shared=self.shared[function.name],
            globals={name for _, _, name in self.globals},
            parameters={p.name for p in (*function.parameters, *function.results)},
            functions=self.bodies,
            sites=self.sites,
            is_entry=function.entry,
        )
        registers = dict.fromkeys(_ARRAYS, 0)
        lines: list[str] = []
        frame = 0
        copies: dict[str, set[str]] = {}
        for statement in function.body:
            if isinstance(statement, Label) and statement.targets:
                scope.targets[statement.name] = statement.targets
            elif isinstance(statement, Instruction):
                scope.product_registers |= isa_wgmma.registers(statement)
                if copy := isa_wgmma.copied(statement):
                    copies.setdefault(copy[0], set()).add(copy[1])
        scope.product_registers = isa_wgmma.with_sources(scope.product_registers, copies)
        labels = _local_labels(function)
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
                kind = "bool" if statement.type == "pred" else _REGISTERS.get(SIZES[statement.type])
                if kind is None:
                    raise PtxError(
                        f"PTX line {statement.line}: registers of .{statement.type} "
                        "are not supported"
                    )
                scope.registers[-1][statement.name] = f"{_ARRAYS[kind]}[{registers[kind]}]"
                registers[kind] += 1
            elif statement.space == "local":
                frame = (frame + statement.align - 1) // statement.align * statement.align
                scope.locals[statement.name] = frame
                frame += statement.bytes
            elif statement.space == "param":
                scope.parameters.add(statement.name)
                size = max(statement.bytes, 1)
                lines.append(f"alignas(16) u8 {symbol('P_', statement.name)}[{size}];")
        if not function.entry:
            frame = max(frame, 16)  # so that recursion meets the end of local memory, and no crash
        self.sites = scope.sites
        if function.entry:
            self.registers = max(self.registers, sum(registers.values()))
        else:
            self.called_registers += sum(registers.values())
        self.local_bytes += (frame + 15) // 16 * 16
        unpack = [
            f"u8* {symbol('P_', p.name)} = parameters[{i}];"
            for i, p in enumerate(function.parameters)
            if function.entry
        ]
        arrays = [f"{kind} {_ARRAYS[kind]}[{n}] = {{}};" for kind, n in registers.items() if n]
        frame_line = [f"Frame frame(t, {frame});"] if frame else []
        body = "\n".join([*unpack, *arrays, *frame_line, *lines])
        return f"{self.head(function)} {{\n{body}\n}}"

    def program(self) -> Program:
        self.collect()
        present = [f for f in self.module.functions if not f.declared_only]
        functions = [self.function(f) for f in present]
        heads = [self.head(f) + ";" for f in present if not f.entry]
        stack = (1 << 16) + _REGISTERS_ON_STACK * (self.registers + self.called_registers)
        stack = (stack + 4095) // 4096 * 4096
        launches = [
            f'extern "C" Outcome* {symbol("launch_", f.name)}(const LaunchRequest* r) {{ '
            f"return start_launch(*r, {symbol('K_', f.name)}, {{{self.static_shared[f.name]}, "
            f"{stack}, {self.local_bytes}, {self.sites}, {len(self.classes)}, "
            f"{self.smallest_shared.bit_length() - 1}, {cpp_bool(self.async_proxy)}}}); }}"
            for f in present
            if f.entry
        ]
        addresses = [
            f'extern "C" void* {name}_address() {{ return {name}; }}' for name, _, _ in self.globals
        ]
        code = "\n".join(
            [
                '#include "launch.h"',
                *self.definitions,
                *heads,
                *functions,
                *launches,
                *addresses,
                "",
            ]
        )
        kernels = {
            f.name: Kernel(
                f.name,
                symbol("launch_", f.name),
                f.parameters,
                f.threads,
                f.cluster,
                self.static_shared[f.name],
            )
            for f in present
            if f.entry
        }
        return Program(
            code,
            kernels,
            tuple(self.globals),
            tuple(self.classes),
            self.sources,
            self.module.target,
            self.atomics,
        )


def _literal(text: str) -> str:
    if text[:2].lower() == "0f":
        return f"bits_as<f32>(0x{text[2:]}u)"
    if text[:2].lower() == "0d":
        return f"bits_as<f64>((u64)0x{text[2:]}ull)"
    return text


def translate(module: Module) -> Program:
    """Translate all kernels and functions of a module.

    Raises:
        UnsupportedInstruction: an instruction is not implemented; names it and its line.
        PtxError: a declaration is not supported.
    """
    return _Translator(module).program()
