"""Parser of PTX: text to declarations, labels and instructions with their lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# bytes of each PTX type; "pred" is not stored in memory
SIZES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    "f16": 2,
    "bf16": 2,
    "f32": 4,
    "f64": 8,
    "tf32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "b128": 16,
}
_SPACES = ("reg", "param", "shared", "local", "global", "const")
_ADDRESS = re.compile(r"(.*?)\s*(?:\+\s*(-?\w+))?$", re.S)
_VARIABLE = re.compile(
    r"(?P<attributes>(?:\.[\w:]+\s+(?:\d+\s+)?)*)(?P<name>[\w$%]+)(?P<count><\d+>)?"
    r"\s*(?P<dims>(?:\[[^\]]*\]\s*)*)(?:=\s*(?P<init>.*))?$",
    re.S,
)


class PtxError(ValueError):
    """PTX text that cannot be parsed or translated."""


@dataclass(frozen=True)
class Source:
    """A line of the source, from a `.loc` directive."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Register:
    """A name in an operand: register, special register, variable or label; `!p` is negated."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A literal: its bits, and its notation: "int", "f32" or "f64"."""

    bits: int
    kind: str


@dataclass(frozen=True)
class Vector:
    """`{a, b}`: the elements of a vector."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """`p|q`: two destinations."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; the base of a literal address is None."""

    base: str | None
    offset: int


@dataclass(frozen=True)
class TensorAddress:
    """`[map, {x, y}]`: a tensor map and the coordinates of a box's first element."""

    map: Address
    at: tuple[Operand, ...]


@dataclass(frozen=True)
class Group:
    """`(a, b)`: results or arguments of a call."""

    items: tuple[Operand, ...]


Operand = Register | Immediate | Vector | Pair | Address | TensorAddress | Group


@dataclass(frozen=True)
class Variable:
    """A declaration of `count` elements in a state space; the count of an unsized array is -1."""

    space: str
    type: str
    name: str
    count: int
    align: int
    line: int
    init: str | None = None
    pointer: bool = False

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return SIZES[self.type] * max(self.count, 0)


@dataclass(frozen=True)
class Label:
    """A label; `targets` are the labels of a `.branchtargets` list."""

    name: str
    line: int
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Brace:
    """The brace that opens or closes a scope."""

    text: str
    line: int


@dataclass(frozen=True)
class Instruction:
    """An instruction; `parts` is the opcode split at its dots."""

    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    line: int
    source: Source | None

    @property
    def opcode(self) -> str:
        """The opcode with all modifiers."""
        return ".".join(self.parts)


Statement = Variable | Label | Brace | Instruction


@dataclass
class Function:
    """A kernel (`.entry`) or a function (`.func`)."""

    name: str
    entry: bool
    parameters: tuple[Variable, ...]
    results: tuple[Variable, ...]
    line: int
    body: list[Statement] = field(default_factory=list)
    declared_only: bool = False
    threads: tuple[int, ...] | None = None  # .reqntid
    cluster: tuple[int, ...] | None = None  # .reqnctapercluster


@dataclass
class Module:
    """A PTX file."""

    version: str
    target: str
    variables: list[Variable]
    functions: list[Function]


def split_list(text: str) -> list[str]:
    """Splits at the commas outside of brackets."""
    items, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            items.append(text[start:at].strip())
            start = at + 1
    return [*items, text[start:].strip()] if text.strip() else []


def parse_integer(text: str) -> int:
    """Parses a decimal, hexadecimal or octal integer."""
    digits = text.rstrip("U")
    octal = re.fullmatch(r"-?0\d+", digits)
    return int(digits, 8 if octal else 0)


def parse_operand(text: str, line: int) -> Operand:
    """Parses an operand.

    Raises:
        PtxError: the text is not an operand.
    """
    if text.startswith("{"):
        return Vector(tuple(parse_operand(x, line) for x in split_list(text[1:-1])))
    if text.startswith("("):
        return Group(tuple(parse_operand(x, line) for x in split_list(text[1:-1])))
    if text.startswith("[") and len(parts := split_list(text[1:-1])) == 2:
        place, at = parse_operand(f"[{parts[0]}]", line), parse_operand(parts[1], line)
        if isinstance(place, Address) and isinstance(at, Vector):
            return TensorAddress(place, at.items)
    if text.startswith("["):
        match = _ADDRESS.match(text[1:-1].strip())
        assert match is not None  # the pattern matches any text
        base, offset = match[1].strip(), parse_integer(match[2]) if match[2] else 0
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", base):
            return Address(None, parse_integer(base) + offset)
        return Address(base, offset)
    if "|" in text:
        return Pair(tuple(parse_operand(x.strip(), line) for x in text.split("|")))
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Immediate(int(match[1], 16), "f32")
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Immediate(int(match[1], 16), "f64")
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Immediate(parse_integer(text) & (2**64 - 1), "int")
    if re.fullmatch(r"!?[%\w$.]+", text):
        return Register(text.lstrip("!"), text.startswith("!"))
    raise PtxError(f"PTX line {line}: cannot parse operand {text!r}")


def parse_variables(text: str, line: int) -> list[Variable]:
    """Parses a declaration without its semicolon: `.reg .b32 %r<5>`, `.shared .b8 s[64]`.

    Raises:
        PtxError: the text is not a declaration.
    """
    variables: list[Variable] = []
    attributes: list[str] = []
    for part in split_list(text):
        match = _VARIABLE.match(part)
        if not match:
            raise PtxError(f"PTX line {line}: cannot parse declaration {part[:80]!r}")
        attributes = match["attributes"].replace(".", " ").split() or attributes
        kind = next((a for a in attributes if a in SIZES or a == "pred"), None)
        space = next((a for a in attributes if a in _SPACES), None)
        if kind is None or space is None:
            raise PtxError(f"PTX line {line}: cannot parse declaration {part[:80]!r}")
        align = int(attributes[attributes.index("align") + 1]) if "align" in attributes else 0
        pointer = "ptr" in attributes
        count, names = 1, [match["name"]]
        for size in re.findall(r"\[([^\]]*)\]", match["dims"]):
            count = count * int(size) if size.strip() else -1
        if match["count"]:
            names = [f"{match['name']}{i}" for i in range(int(match["count"][1:-1]))]
        align = (0 if pointer else align) or SIZES.get(kind, 1)
        variables += [
            Variable(space, kind, name, count, align, line, match["init"], pointer)
            for name in names
        ]
    return variables


def _blank(match: re.Match[str]) -> str:
    """Replaces text by its line ends."""
    return "\n" * match[0].count("\n")


def _statements(text: str, line: int) -> Iterator[tuple[int, str]]:
    """Splits a body into braces, labels, directives and instructions, with their first lines."""
    at = 0
    token = re.compile(
        r"(?P<space>\s+)|(?P<brace>[{}])"
        r"|(?P<targets>[\w$]+\s*:\s*\.branchtargets[^;]*);|(?P<label>[\w$]+\s*:)(?!:)"
        r"|(?P<directive>\.(?:loc|file|pragma)\b[^\n;]*)[\n;]|(?P<statement>[^;]+);"
    )
    while at < len(text):
        match = token.match(text, at)
        if not match:
            raise PtxError(f"PTX line {line}: cannot parse {text[at : at + 60].strip()!r}")
        if match.lastgroup != "space":
            yield line, match[match.lastgroup or 0].strip()
        line += match[0].count("\n")
        at = match.end()


class _Parser:
    def __init__(self, text: str) -> None:
        files = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)
        self.files = {int(number): name for number, name in files}
        text = re.sub(r"/\*.*?\*/", _blank, text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        self.text = re.sub(r"\.section\s+\.\w+\s*\{[^}]*\}", _blank, text)

    def instruction(self, text: str, line: int, source: Source | None) -> Instruction:
        guard = None
        if match := re.match(r"@(!?)(%?[\w$]+)\s+", text):
            guard, text = Register(match[2], bool(match[1])), text[match.end() :]
        match = re.match(r"([a-z][\w.:]*)\s*(.*)$", text, re.S)
        if not match:
            raise PtxError(f"PTX line {line}: cannot parse instruction {text[:80]!r}")
        operands = tuple(parse_operand(x, line) for x in split_list(match[2]) if x)
        return Instruction(tuple(match[1].split(".")), operands, guard, line, source)

    def body(self, text: str, line: int) -> list[Statement]:
        found: list[Statement] = []
        source: Source | None = None
        for at, piece in _statements(text, line):
            if piece in "{}":
                found.append(Brace(piece, at))
            elif match := re.match(r"([\w$]+)\s*:\s*\.branchtargets\s+(.*)$", piece, re.S):
                found.append(Label(match[1], at, tuple(split_list(match[2]))))
            elif piece.endswith(":"):
                found.append(Label(piece[:-1].strip(), at))
            elif match := re.match(r"\.loc\s+(\d+)\s+(\d+)", piece):
                file = self.files.get(int(match[1]), f"file {match[1]}")
                source = Source(file, int(match[2]))
            elif re.match(r"\.(file|pragma)\b", piece):
                continue
            elif piece.startswith("."):
                found += parse_variables(piece, at)
            else:
                found.append(self.instruction(piece, at, source))
        return found

    def function(self, head: str, line: int) -> Function:
        pattern = r"\.(entry|func)\s*(\([^)]*\))?\s*([\w$]+)\s*(\([^)]*\))?(.*)$"
        match = re.search(pattern, head, re.S)
        if not match:
            raise PtxError(f"PTX line {line}: cannot parse function head {head[:80]!r}")

        def variables(text: str | None) -> tuple[Variable, ...]:
            parts = split_list(text[1:-1]) if text else []
            return tuple(v for part in parts for v in parse_variables(part, line))

        def sizes(directive: str) -> tuple[int, ...] | None:
            found = re.search(rf"\.{directive}\s+([\d,\s]+)", match[5])
            return tuple(int(x) for x in split_list(found[1])) if found else None

        return Function(
            match[3],
            match[1] == "entry",
            variables(match[4]),
            variables(match[2]),
            line,
            threads=sizes("reqntid"),
            cluster=sizes("reqnctapercluster"),
        )

    def body_end(self, start: int, function: Function) -> int:
        """Returns the position after the closing brace of a body that begins at `start`."""
        depth = 1
        for match in re.compile(r"[{}]").finditer(self.text, start):
            depth += 1 if match[0] == "{" else -1
            if depth == 0:
                return match.end()
        raise PtxError(f"PTX line {function.line}: function {function.name} has no closing brace")

    def module(self) -> Module:
        text, at = self.text, 0
        version, target = (
            re.search(rf"^\s*\.{word}\s+(\S+)", text, re.M) for word in ("version", "target")
        )
        if not version or not target:
            raise PtxError("the text is not PTX: .version or .target is missing")
        module = Module(version[1], target[1].split(",")[0], [], [])
        skip = re.compile(r"\s*\.(?:version|target|address_size|file)\b[^\n]*(?:\n|$)|\s+")
        while at < len(text):
            if match := skip.match(text, at):
                at = match.end()
                continue
            line = text.count("\n", 0, at) + 1
            end = re.compile(r"[;{]").search(text, at)
            if not end:
                raise PtxError(f"PTX line {line}: cannot parse {text[at : at + 60].strip()!r}")
            head = text[at : end.start()]
            if re.search(r"\.(entry|func)\b", head):
                function = self.function(head, line)
                at = end.end()
                if end[0] == ";":
                    function.declared_only = True
                else:
                    start, at = at, self.body_end(at, function)
                    function.body = self.body(text[start : at - 1], text.count("\n", 0, start) + 1)
                module.functions.append(function)
            else:
                stop = text.find(";", at)
                if stop < 0:
                    raise PtxError(f"PTX line {line}: cannot parse {head.strip()[:80]!r}")
                module.variables += parse_variables(text[at:stop].strip(), line)
                at = stop + 1
        return module


def parse(text: str) -> Module:
    """Parses PTX as nvcc and Triton write it.

    Args:
        text: a whole PTX file.

    Raises:
        PtxError: the text cannot be parsed; names the line.
    """
    return _Parser(text).module()
