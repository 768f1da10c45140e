"""Lock of an output folder: one process at a time writes to it.

A local folder is locked by the operating system, which releases the lock when its owner ends,
however it ends. Some shared file systems lock per host only, others not at all, and behind a URL
there are no locks. The owner therefore also writes its host and process into `.lock`, with a number
that grows every 20 seconds. An owner on another host has ended if the number stays for a minute.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from featkd.runtime.processes import machine, start_time
from featkd.runtime.remote import Location

NAME = ".lock"

_BEAT_SECONDS = 20.0
_WATCH_SECONDS = 60.0
_CONFIRM_SECONDS = 1.0  # behind a URL, until a record of a simultaneous start is visible
_MOST_BYTES = 4096
_HELD = (errno.EACCES, errno.EAGAIN)
_held: set[tuple[int, int, int]] = set()  # process, device and inode of each `.lock`
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FolderInUse(RuntimeError):
    """Another process writes to the folder; names its host and process."""


@dataclass(frozen=True)
class _Owner:
    """Content of `.lock`; an empty file has no owner."""

    host: str
    pid: int
    machine: str
    """Identifies the kernel and the process namespace that `pid` belongs to."""
    started: str
    """Start time of the process, which tells it from a later one with the same number."""
    token: str
    beat: int = 0

    def encode(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @staticmethod
    def decode(record: bytes) -> _Owner | None:
        """Returns the owner; None if there is none, or the record is not readable."""
        try:
            owner = _Owner(**json.loads(record))
        except (ValueError, TypeError, RecursionError):
            return None
        return owner if isinstance(owner.pid, int) else None


@contextmanager
def output_folder(folder: Path, error: type[Exception]) -> Iterator[None]:
    """Creates a local output folder if it is missing, and locks it.

    Args:
        folder: the folder that `out` names.
        error: type of the errors.

    Raises:
        error: the path is a file, or another process writes to the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as cause:
        raise error(f"out: {folder} is a file, expected a folder") from cause
    with ExitStack() as lock:
        try:
            lock.enter_context(locked(folder))
        except FolderInUse as cause:
            raise error(f"out: {cause}") from cause
        yield


@contextmanager
def locked(folder: Location) -> Iterator[None]:
    """Locks an existing folder, local or behind a URL, for this process.

    The lock of a process that was killed is taken over: immediately if it ran on this machine,
    otherwise after a minute without a sign of life.

    Raises:
        FolderInUse: another process has locked it.
        OSError: `.lock` can't be written.
    """
    path = folder / NAME
    own = _Owner(
        socket.gethostname(),
        os.getpid(),
        machine(),
        start_time(os.getpid()),
        uuid.uuid4().hex,
    )
    write: Callable[[bytes], None]
    if isinstance(path, Path):
        descriptor = _take_file(path, own)

        def write_file(record: bytes) -> None:
            os.pwrite(descriptor, record, 0)
            os.ftruncate(descriptor, len(record))
            os.fdatasync(descriptor)

        write = write_file
    else:
        descriptor = -1
        write = path.replace_with
        _wait_for_owner(path, lambda: path.read_bytes() if path.is_file() else b"")
    ended = threading.Event()
    beats = threading.Thread(
        target=_beat, args=(write, own, ended), daemon=True, name="featkd-lock"
    )
    held = _file_id(os.fstat(descriptor)) if descriptor >= 0 else None
    try:
        if held is not None:
            _held.add(held)
        write(own.encode())
        if not isinstance(path, Path):
            time.sleep(_CONFIRM_SECONDS)
            if (found := path.read_bytes()) != own.encode():
                raise _in_use(path, found)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join()
            with suppress(OSError):  # a lock without a sign of life is taken over
                write(b"")
    finally:
        if held is not None:
            _held.discard(held)
            os.close(descriptor)


def _take_file(path: Path, own: _Owner) -> int:
    """Locks a local file; returns its descriptor, which holds the lock until it is closed.

    Closing any descriptor of the file gives up the process's lock, so the file is not opened again.
    """
    if path.exists() and _file_id(path.stat()) in _held:  # the system lets a process lock it twice
        raise _in_use(path, own.encode())
    descriptor = _lock_file(path)
    owner = _Owner.decode(os.pread(descriptor, _MOST_BYTES, 0))
    if owner is None or owner.machine == machine():
        return descriptor
    # The file system may lock per host only.
    os.close(descriptor)
    _wait_for_owner(path, lambda: _read_file(path))
    return _lock_file(path)


def _lock_file(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        # lockf, not flock: the lock is not inherited by the loader's forked workers, which
        # outlive a killed process for a moment.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        try:
            if error.errno in _HELD:
                raise _in_use(path, os.pread(descriptor, _MOST_BYTES, 0)) from error
            if error.errno not in _UNSUPPORTED:
                raise
            _wait_for_owner(path, lambda: os.pread(descriptor, _MOST_BYTES, 0))
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MOST_BYTES)


def _wait_for_owner(path: Location, read: Callable[[], bytes]) -> None:
    """Returns when the owner in the record has ended.

    Raises:
        FolderInUse: it has not.
    """
    record = read()
    owner = _Owner.decode(record)
    if owner is None:
        return
    if owner.machine == machine():
        if start_time(owner.pid) == owner.started:
            raise _in_use(path, record)
        return
    print(
        f"featkd: {path} belongs to process {owner.pid} on host {owner.host}; waiting up to "
        f"{_WATCH_SECONDS:g} s for a sign that it is running",
        file=sys.stderr,
    )
    deadline = time.monotonic() + _WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_WATCH_SECONDS / 60)
        if (now := read()) != record:
            if not now:
                return
            raise _in_use(path, now)


def _file_id(status: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), status.st_dev, status.st_ino


def _in_use(path: Location, record: bytes) -> FolderInUse:
    owner = _Owner.decode(record)
    who = "another process" if owner is None else f"process {owner.pid} on host {owner.host}"
    return FolderInUse(
        f"{str(path)[: -len(NAME) - 1]} is in use by {who}; wait until it ends, stop it, or choose "
        "another folder"
    )


def _beat(write: Callable[[bytes], None], owner: _Owner, ended: threading.Event) -> None:
    """Writes a growing number into the record until `ended` is set."""
    while not ended.wait(_BEAT_SECONDS):
        owner = replace(owner, beat=owner.beat + 1)
        with suppress(OSError):  # the next one may succeed
            write(owner.encode())
