"""Files that are either whole or not there: write aside, flush to disk, rename.

Behind a URL (`featkd.runtime.remote`) it is: collect in memory, upload aside, move.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from featkd.runtime.remote import Location, RemotePath


def user_cache() -> Path:
    """$XDG_CACHE_HOME/featkd, by default below ~/.cache; it may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featkd"


@contextmanager
def atomic_write(path: Location, also: Sequence[Location] = ()) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes `path`'s place only when the block ends without error.

    On any error, a full disk included, the temporary file is removed and what was at `path`
    before is untouched. (Behind a URL see `RemotePath.replace_with`.)

    Args:
        path: the file.
        also: further names of it, in the same folder. They are given one after the other and
            before `path` itself: whoever finds the new file at `path` finds it at all of them.
    """
    if isinstance(path, RemotePath):
        content = io.BytesIO()
        yield content
        path.replace_with(content.getvalue(), [n for n in also if isinstance(n, RemotePath)])
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        for name in also:
            atomic_link(temporary, name)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_csv(
    path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]], digits: int | None = None
) -> None:
    """Write a CSV file whole.

    Args:
        path: the file.
        columns: the header.
        rows: values in the columns' order.
        digits: significant digits of floats; None for all.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        short = digits is not None
        writer.writerow([f"{v:.{digits}g}" if short and isinstance(v, float) else v for v in row])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def atomic_link(source: Location, path: Location) -> None:
    """Give the whole file `source` a second name `path`, replacing what was there.

    A hard link where the file system has them, else a copy; within a store a copy on its side.
    """
    if isinstance(source, RemotePath) and isinstance(path, RemotePath) and source.fs == path.fs:
        source.copy_to(path)
        return
    if isinstance(source, Path) and isinstance(path, Path) and _hard_link(source, path):
        return
    with atomic_write(path) as file:
        file.write(source.read_bytes())


def _hard_link(source: Path, path: Path) -> bool:
    """Whether the file system could do that."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        return False
    os.replace(temporary, path)
    sync_folder(path.parent)
    return True


def remove_leftovers(folder: Location) -> None:
    """Remove the temporary files that processes which no longer run left in a local `folder`.

    Behind a URL there is at most one for each file, whose place the next write takes.
    """
    if isinstance(folder, RemotePath):
        return
    for leftover in folder.glob(".*.tmp"):
        name = re.fullmatch(r"\..+\.(\d+)\.tmp", leftover.name)
        if name and not _runs(int(name[1])):
            leftover.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
