"""Record of a part: a line of JSON when an item begins, and one when it ends."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# (variant, metric, unit, value) as in the JSON form, whose name is the item's
Figure = tuple[str, str, str, float]
BROKEN = 3  # exit code of a process with a broken CUDA context, to be replaced by another


class NotHere(Exception):
    """Raised if this machine cannot run the item."""


class Cut(Exception):
    """Raised if a time limit ended an item, which has neither passed nor failed."""


class Failed(Exception):
    """Raised if an item failed; `figures` are those that it measured anyway."""

    def __init__(self, message: str, figures: Sequence[Figure]) -> None:
        super().__init__(message)
        self.figures = figures


@dataclass(frozen=True)
class Item:
    """A check or a measurement."""

    name: str
    status: str
    """One of passed, failed, skipped, cut (by its time limit), and begun (which did not end)."""
    seconds: float = 0.0
    message: str = ""
    figures: tuple[Figure, ...] = ()


class Recorder:
    """Runs items and records the results; skips items that an earlier process has begun."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = {item.name for item in read(path)}

    def run(self, name: str, work: Callable[[], Sequence[Figure] | None]) -> None:
        """Runs an item; a failure is recorded and does not end the process."""
        if name in self._begun:
            return
        self._write(Item(name, "begun"))
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
        self._write(Item(name, status, round(seconds, 3), message, tuple(figures)))
        print(f"{status:8} {seconds:7.2f} s  {name}  {message[:200]}", flush=True)
        if broken:
            sys.exit(BROKEN)

    def run_share(
        self, items: Mapping[str, Callable[[], Sequence[Figure] | None]], shard: int, shards: int
    ) -> None:
        """Runs every `shards`-th item."""
        for name in list(items)[shard::shards]:
            self.run(name, items[name])

    def _write(self, item: Item) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(item)) + "\n")


def read(path: Path) -> list[Item]:
    """Returns the items of a file, in the order in which they began."""
    found: dict[str, Item] = {}
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:  # the process was killed while it wrote the line
            continue
        line["figures"] = tuple(map(tuple, line["figures"]))
        found[line["name"]] = Item(**line)
    return list(found.values())
