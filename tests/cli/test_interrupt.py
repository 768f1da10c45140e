"""Ctrl-C while a command imports, and in the demo's processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.forking import Server

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

# the process is forked from one that has imported the commands
forgotten = ("featkd", "torch") if {module!r} == "torch" else {module!r}
for name in [name for name in sys.modules if name.startswith(forgotten)]:
    del sys.modules[name]
sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job
from featkd.cli.main import main
sys.exit(main())
"""
_DEMO = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from featkd.cli.main import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("words", "module", "action"),
    [
        (["distill", "demo"], "torch", _SWALLOWED),
        (["cache", "demo", "--out", "x"], "featkd.train.build_cache", _SWALLOWED),
        (["diagnose", "--out", "x"], "torch", _SWALLOWED),
        (["demo"], "sklearn", _WITHIN_EXEC),  # after the imports, where an exception is raised
    ],
)
def test_ctrl_c_while_a_command_loads_is_one_line(words, module, action, server: Server):
    done = server.call(*words, script=_CODE.format(module=module, action=action))
    assert done.stderr == "featkd: interrupted\n"
    assert done.returncode == 130


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_ctrl_c_while_the_fork_server_imports_is_one_line(server: Server, tmp_path):
    words = ("demo", "--out", tmp_path, "--epochs", 1, "--seeds", 1)
    demo = server.start(*words, script=_DEMO)
    demo.wait_until(lambda: any(b"forkserver" in _command(pid) for pid in _children(demo.pid)), 300)
    time.sleep(0.3)  # Python itself has started
    os.killpg(demo.pid, signal.SIGINT)
    assert demo.wait() == 130
    assert demo.stderr == "featkd: interrupted\n"


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""
