"""Atomic writes: a file is either complete or absent.

A local file is written under a temporary name, flushed to disk and renamed. A file behind a URL
(`featkd.runtime.remote`) is collected in memory, uploaded under a temporary name and moved.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import SpecialFileError
from typing import IO

from featkd.runtime.remote import Location, RemotePath


def open_regular(path: str | Path) -> IO[bytes]:
    """Opens a regular file for reading.

    Opening a FIFO would wait for a writer, and reading a device may never end.

    Raises:
        SpecialFileError: the path is a FIFO, a device or another special file.
        OSError: the file cannot be opened.
    """
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115  the caller closes it
    if not stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode):
        file.close()
        kind = "a FIFO" if stat.S_ISFIFO(mode) else "a device or another special file"
        raise SpecialFileError(f"{kind}, not a regular file")
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_regular(path: Path, most: int) -> bytes:
    """Reads a regular file of at most `most` bytes.

    Raises:
        OSError: it can't be opened (see `open_regular`), or is larger.
    """
    with open_regular(path) as file:
        content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most} bytes", str(path))
    return content


@contextmanager
def atomic_write(path: Location, also: Sequence[Location] = ()) -> Iterator[IO[bytes]]:
    """Opens a file for writing that replaces `path` when the block ends without an error.

    On any error, including a full disk, the temporary file is removed and `path` keeps its old
    content. For a URL see `RemotePath.replace_with`.

    Args:
        path: the file.
        also: further names of the file, in the same folder. They are replaced before `path`, so if
            `path` has the new content, they have it too.
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
    path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]], digits: int
) -> None:
    """Writes a CSV file atomically.

    Args:
        path: the file.
        columns: the header.
        rows: values in the order of the columns; file names as os.fsdecode returns them keep
            their bytes.
        digits: significant digits of floats.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([f"{x:.{digits}g}" if isinstance(x, float) else x for x in row])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))


def atomic_link(source: Location, path: Location) -> None:
    """Makes `path` a second name of the file `source`; replaces an existing file.

    Uses a hard link if the file system supports it, otherwise a copy. Within one remote store the
    store makes the copy.
    """
    if isinstance(source, RemotePath) and isinstance(path, RemotePath) and source.fs == path.fs:
        source.copy_to(path)
        return
    if isinstance(source, Path) and isinstance(path, Path) and _hard_link(source, path):
        return
    with atomic_write(path) as file:
        file.write(source.read_bytes())


def _hard_link(source: Path, path: Path) -> bool:
    """Makes a hard link; returns False if the file system does not support it."""
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
    """Removes temporary files of processes that have ended from a local folder.

    A remote folder has at most one temporary file per file, and the next write replaces it.
    """
    if isinstance(folder, RemotePath):
        return
    for leftover in folder.glob(".*.tmp"):
        match = re.fullmatch(r"\..+\.(\d+)\.tmp", leftover.name)
        if match and not _is_running(int(match[1])):
            leftover.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:  # another user's process can't be signalled
        return not isinstance(error, ProcessLookupError)
    return True


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
