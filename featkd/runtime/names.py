"""Names, numbers and tables in messages."""

from __future__ import annotations

from collections.abc import Sequence


def printable(name: object) -> str:
    r"""Returns a name with escapes in place of the characters that a terminal would act on.

    Line breaks and the bytes of names that are not UTF-8 are escaped too.

    Examples:
        >>> print(printable("a\x1b[2Jb\n"))
        a\x1b[2Jb\x0a
    """
    text = str(name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that os.fsdecode could not decode
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def printable_lines(text: str) -> str:
    """Applies `printable` to each line of a message."""
    return "\n".join(map(printable, text.split("\n")))


def plural(count: int, word: str) -> str:
    """Returns a number and a noun, for example "1 class" or "2 classes"."""
    ending = "" if count == 1 else "es" if word.endswith("s") else "s"
    return f"{count} {word}{ending}"


def listed(names: Sequence[object], most: int = 10, separator: str = ", ") -> str:
    """Joins the printable forms of names; of more than `most`, the others are only counted.

    Examples:
        >>> listed(["a", "b", "c"], 1), listed(["a", "b", "c"])
        ('a, and 2 more', 'a, b, c')
    """
    parts = [printable(name) for name in names[:most]]
    if len(names) > most:
        parts.append(f"and {len(names) - most} more")
    return separator.join(parts)


def aligned(
    header: Sequence[str], lines: Sequence[Sequence[object]], *, numbers: bool = False
) -> str:
    """Returns a text table; with `numbers` all columns but the first are right-aligned."""
    table = [list(header), *([str(cell) for cell in line] for line in lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if numbers and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )
