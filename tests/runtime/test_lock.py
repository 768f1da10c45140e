"""One process at a time writes to a folder: owners that run, were killed, or are elsewhere."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from featkd.runtime import lock
from featkd.runtime.lock import FolderInUse, locked
from featkd.runtime.remote import Location, locate

HOLD = """\
import sys
from pathlib import Path
from featkd.runtime import lock
lock._BEAT_SECONDS = 0.05
if sys.argv[2:]:
    lock.machine = lambda: sys.argv[2]
with lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that holds the lock of `tmp_path`."""
    started = []

    def hold(*machine: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", HOLD, str(tmp_path), *machine]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert line(process.stdout) == b"held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def line(stream: IO[bytes] | None) -> bytes:
    assert stream is not None
    return stream.readline()


@pytest.fixture(params=["disk", "store"])
def place(request, tmp_path, monkeypatch) -> Iterator[Location]:
    monkeypatch.setattr(lock, "_CONFIRM_SECONDS", 0.01)
    yield tmp_path if request.param == "disk" else locate("memory://run")
    MemoryFileSystem.store.clear()


def record(place: Location) -> bytes:
    return (place / lock.NAME).read_bytes()


def refused(place: Location, message: str) -> None:
    with pytest.raises(FolderInUse, match=message), locked(place):
        pass


def test_a_lock_is_taken_again_after_its_release(place):
    for _ in range(2):
        with locked(place):
            assert f'"pid": {os.getpid()}'.encode() in record(place)
        assert record(place) == b""


def test_the_error_names_the_owner(tmp_path, start):
    owner = start()
    message = f"{tmp_path} is in use by process {owner.pid} on host {socket.gethostname()}; wait"
    refused(tmp_path, message)
    assert owner.poll() is None
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    began = time.monotonic()
    with locked(tmp_path):
        pass
    assert time.monotonic() - began < 5


def unsupported(*_: object) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("locks", [True, False])
def test_a_suspended_owner_on_this_host_keeps_its_lock(tmp_path, start, monkeypatch, locks):
    """However long it is suspended: it shows no sign of life meanwhile."""
    monkeypatch.setattr(lock, "_WATCH_SECONDS", 0.2)
    owner = start()
    owner.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, owner.pid, os.WSTOPPED)
    if not locks:
        monkeypatch.setattr(fcntl, "lockf", unsupported)
    refused(tmp_path, f"in use by process {owner.pid} on")


def test_two_runs_of_one_process_do_not_share_a_folder(place, tmp_path):
    """The refused one does not give up the lock of the other, seen from another process."""
    other = place
    if isinstance(place, Path):
        other = tmp_path.parent / "link"
        other.symlink_to(tmp_path)
    with locked(place):
        for _ in range(2):
            message = f"in use by process {os.getpid()} on host"
            refused(other, message)
        if isinstance(place, Path):
            found = subprocess.run([sys.executable, "-c", HOLD, str(place)], capture_output=True)
            assert f"in use by process {os.getpid()} on".encode() in found.stderr
    with locked(other):
        pass


@pytest.mark.parametrize("locks", [True, False], ids=["locks per host", "no locks"])
def test_an_owner_on_another_host_keeps_its_lock_while_it_runs(
    tmp_path, start, monkeypatch, capsys, locks
):
    """Without the file system's help: it lets both hosts lock, or neither."""
    monkeypatch.setattr(lock, "_WATCH_SECONDS", 3.0)
    owner = start("elsewhere")
    monkeypatch.setattr(fcntl, "lockf", (lambda *_: None) if locks else unsupported)
    refused(tmp_path, f"in use by process {owner.pid}")
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    monkeypatch.setattr(lock, "_WATCH_SECONDS", 0.6)
    with locked(tmp_path):
        assert f'"pid": {os.getpid()}'.encode() in record(tmp_path)
    assert f"belongs to process {owner.pid} on host" in capsys.readouterr().err


def test_a_store_is_locked_by_the_record_alone(place, monkeypatch):
    """Held by this process, by a killed one, and by one on another host."""
    if isinstance(place, Path):
        monkeypatch.setattr(fcntl, "lockf", unsupported)
    with locked(place):
        refused(place, f"in use by process {os.getpid()} on host")
    owner = lock._Owner("node7", 2**22 - 1, lock.machine(), "1", "token")
    for left in (owner.encode(), b"not a record", b"[" * 4000, b'{"pid": "1"}'):
        path = place / lock.NAME
        path.write_bytes(left) if isinstance(path, Path) else path.replace_with(left)
        with locked(place):
            assert record(place) != left


def test_of_two_simultaneous_starts_behind_a_url_one_ends(monkeypatch):
    place = locate("memory://run")
    other = lock._Owner("node7", 17, "elsewhere", "1", "token").encode()
    monkeypatch.setattr(time, "sleep", lambda _: (place / lock.NAME).replace_with(other))
    message = "memory://run is in use by process 17 on host node7"
    refused(place, message)
    MemoryFileSystem.store.clear()
