"""Ctrl-C while a command imports, and in the demo's processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A package whose import swallows an exception, or is interrupted within exec.
_SWALLOWED = """
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except BaseException:
    raise ImportError("broken") from None
"""
_WITHIN_EXEC = "exec('os.kill(os.getpid(), signal.SIGINT); time.sleep(10)')"
_CODE = """
import os, signal, sys, time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            exec({action!r}, globals())

sys.meta_path.insert(0, Finder())
from featkd.cli.main import main
sys.exit(main())
"""


@pytest.fixture(autouse=True)
def sigint_is_not_ignored():
    """A shell's background job ignores SIGINT, and so do the processes that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("words", "module", "action"),
    [
        (["distill", "demo"], "torch", _SWALLOWED),
        (["cache", "demo", "--out", "x"], "featkd.train.build_cache", _SWALLOWED),
        (["diagnose", "--out", "x"], "torch", _SWALLOWED),
        (["demo"], "sklearn", _WITHIN_EXEC),  # after the imports, where an exception is raised
    ],
)
def test_ctrl_c_while_a_command_loads_is_one_line(words, module, action, tmp_path):
    code = _CODE.format(module=module, action=action)
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stderr == "featkd: interrupted\n"
    assert done.returncode == 130


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.slow
def test_ctrl_c_while_the_fork_server_imports_is_one_line(tmp_path):
    words = ["-m", "featkd", "demo", "--out", "demo", "--epochs", "1", "--seeds", "1"]
    demo = subprocess.Popen(
        [sys.executable, *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not any(b"forkserver" in _command(pid) for pid in _children(demo.pid)):
        assert demo.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)  # Python itself has started
    os.killpg(demo.pid, signal.SIGINT)
    _, errors = demo.communicate(timeout=120)
    assert errors == "featkd: interrupted\n"
    assert demo.returncode == 130


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""
