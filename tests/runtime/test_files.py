"""Atomic writes: errors and kills leave the old content."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from featkd.runtime.files import atomic_link, remove_leftovers


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from featkd.runtime.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as f:\n"
        "    f.write(b'half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(target)])
    assert result.returncode == -9
    assert target.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2  # the temporary file remains
    (tmp_path / ".mine.tmp").touch()
    (tmp_path / f".other.{os.getpid()}.tmp").touch()  # of a running process
    remove_leftovers(tmp_path)
    kept = {"file", ".mine.tmp", f".other.{os.getpid()}.tmp"}
    assert {p.name for p in tmp_path.iterdir()} == kept


def test_link_copies_if_the_file_system_has_no_links(tmp_path: Path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    last, best = tmp_path / "last", tmp_path / "best"
    last.write_bytes(b"one")
    atomic_link(last, best)
    assert best.read_bytes() == b"one"
    assert best.stat().st_ino != last.stat().st_ino
    assert len(list(tmp_path.iterdir())) == 2
