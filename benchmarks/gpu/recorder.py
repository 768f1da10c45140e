"""How a part tells what it did: a line of JSON as each item begins, and one as it ends."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# (variant, metric, unit, value) of the JSON form; the item is the name
Figure = tuple[str, str, str, float]
BROKEN = 3  # exit code of a process whose CUDA context can't be used any more: start another


class NotHere(Exception):
    """This machine can't run the item; says why."""


class Cut(Exception):
    """The time limit of an item ended it: it has neither passed nor failed."""


class Failed(Exception):
    """An item failed; `figures` are those that there are all the same."""

    def __init__(self, message: str, figures: Sequence[Figure]) -> None:
        super().__init__(message)
        self.figures = figures


@dataclass(frozen=True)
class Item:
    """One check or one measurement."""

    name: str
    status: str
    """passed, failed, skipped, cut (by its time limit), or begun (and never ended)."""
    seconds: float
    message: str
    figures: tuple[Figure, ...]


class Recorder:
    """Runs items and writes what came of them; those that an earlier process began are left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = {item.name for item in read(path)}

    def run(self, name: str, work: Callable[[], Sequence[Figure] | None]) -> None:
        """An item; its failure is written down and does not end the process."""
        if name in self._begun:
            return
        self._write({"name": name, "status": "begun"})
        started = time.monotonic()
        figures: Sequence[Figure] = ()
        status, message, broken = "passed", "", False
        try:
            figures = work() or ()
        except Exception as error:
            without_result = {NotHere: "skipped", Cut: "cut"}
            status = without_result.get(type(error), "failed")
            message, figures = str(error), getattr(error, "figures", ())
            if status == "failed":
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(frame.filename).name}:{frame.lineno}"
                message = f"{type(error).__name__}: {message or frame.line} ({place})"[:2000]
                traceback.print_exc()
                broken = "CUDA error" in message or "CUDA driver error" in message
        seconds = time.monotonic() - started
        self._write(
            {
                "name": name,
                "status": status,
                "seconds": round(seconds, 3),
                "message": message,
                "figures": list(figures),
            }
        )
        print(f"{status:8} {seconds:7.2f} s  {name}  {message[:200]}", flush=True)
        if broken:
            sys.exit(BROKEN)

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[Item]:
    """The items of a file, in the order in which they began."""
    found: dict[str, Item] = {}
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:  # the process was ended as it wrote
            continue
        figures = tuple(
            (str(v), str(m), str(u), float(x)) for v, m, u, x in line.get("figures", ())
        )
        found[line["name"]] = Item(
            line["name"], line["status"], line.get("seconds", 0.0), line.get("message", ""), figures
        )
    return list(found.values())
