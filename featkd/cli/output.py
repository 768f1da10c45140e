"""Standard streams and JSON files of the command line."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, TextIO, cast

from featkd.runtime.names import printable


class PrintableStream:
    r"""Text stream on which no name of a class or file can control the terminal.

    Everything that a command prints passes through it: results, messages, warnings, progress bars
    and tracebacks. Line breaks and tabs are kept; other characters are written as `printable`
    returns them. Carriage returns at either end of a text are kept too, for progress bars.

    Args:
        stream: receives the text.

    Examples:
        >>> _ = PrintableStream(sys.stdout).write("class \x1b[2J\n")
        class \x1b[2J
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        body = text.strip("\r")
        start = len(text) - len(text.lstrip("\r"))
        escaped = "".join(x if x in "\n\t" else printable(x) for x in body)
        self._stream.write(f"{text[:start]}{escaped}{text[start + len(body) :]}")
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_streams(*, restore: bool) -> Iterator[None]:
    """Escapes what is written to stdout and stderr (see `PrintableStream`).

    Args:
        restore: restore the streams at the end. Otherwise the traceback of an error that leaves
            this context is escaped too.
    """
    os.environ.setdefault("PYTHON_COLORS", "0")  # from Python 3.13 on, tracebacks have escapes
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        cast(TextIO, stream and PrintableStream(stream))  # None if the descriptor is closed
        for stream in streams
    )
    try:
        yield
    finally:
        if restore:
            sys.stdout, sys.stderr = streams


def warn(message: str) -> None:
    """Prints a line to stderr that begins with featkd's name."""
    print(f"featkd: {message}", file=sys.stderr)


def write_json(path: str | None, content: object, indent: int | None = 2) -> None:
    """Writes the file of `--json`, if it is given."""
    if path is not None:
        from featkd.runtime.files import atomic_write

        with atomic_write(Path(path)) as file:
            file.write(json.dumps(content, indent=indent).encode() + b"\n")


def results_unless(quiet: bool) -> AbstractContextManager[object]:
    """Discards what is written to stdout if `quiet` is set."""
    return redirect_stdout(io.StringIO()) if quiet else nullcontext()
