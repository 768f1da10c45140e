"""Compilation of C++ to shared libraries, which are kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

RUNTIME = Path(__file__).parent / "runtime"
FLAGS = (
    *("-std=c++17", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-w", "-fPIC", "-pthread"),
)
# Characters of C++ from which a kernel is compiled at -O0: -O1 takes three times as long, and most
# of a launch is spent in the engine, which is always compiled at -O2.
_LARGE = 300_000
_ENGINE_LEVEL = "-O2"


class CompilerError(RuntimeError):
    """There is no C++ compiler, or it failed."""


def cache_folder() -> Path:
    """Returns $XDG_CACHE_HOME/ptx_emulator (by default below ~/.cache), and creates it."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "ptx_emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_compiler() -> str:
    """Returns the path of the C++ compiler: $CXX, else g++ or clang++.

    Raises:
        CompilerError: there is no compiler.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise CompilerError(
        "ptx_emulator compiles kernels with a C++ compiler, and none was found: "
        "install g++ or clang++, or set CXX to a compiler"
    )


def _machine() -> str:
    """Returns the CPU's model and features, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({x for x in lines if x.startswith(("flags", "model name"))}))
    except OSError:
        return platform.processor()


def build(code: str, check: bool, count: bool) -> Path:
    """Compiles translated C++ and links it with the engine.

    Args:
        code: C++ of the kernels.
        check: compile the checks.
        count: compile the counters.

    Returns:
        Path of the shared library in the cache folder.

    Raises:
        CompilerError: there is no compiler, or it fails.
    """
    flags = [*FLAGS, f"-DPTX_EMULATOR_CHECK={int(check)}", f"-DPTX_EMULATOR_COUNT={int(count)}"]
    engine = _compiled('#include "engine.cpp"\n', [*flags, _ENGINE_LEVEL], ".o")
    level = "-O0" if len(code) > _LARGE else "-O1"
    return _compiled(code, [*flags, level], ".so", [engine])


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def _compiled(code: str, flags: list[str], suffix: str, objects: Sequence[Path] = ()) -> Path:
    """Returns the path of an object or a shared library, compiled if it is not in the cache.

    Its name is a hash of everything that it depends on: code, runtime, flags, compiler, CPU. It is
    compiled in a temporary folder and renamed, so that processes may build it at the same time.
    """
    compiler = find_compiler()
    version = _version(compiler)
    digest = hashlib.sha256()
    sources = [source.read_text() for source in sorted(RUNTIME.iterdir()) if source.is_file()]
    for text in (code, *sources, *flags, *(x.name for x in objects), compiler, version, _machine()):
        digest.update(text.encode() + b"\0")
    made = cache_folder() / f"{digest.hexdigest()[:32]}{suffix}"
    if made.exists():
        return made
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        source, target = Path(folder) / "kernel.cpp", Path(folder) / made.name
        source.write_text(code)
        # The engine comes first: the linker keeps its -O2 version of functions that both define.
        given = [*map(str, objects), str(source), "-shared" if suffix == ".so" else "-c"]
        command = [compiler, *flags, f"-I{RUNTIME}", *given, "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise CompilerError(
                f"{compiler} could not compile the translated kernel:\n{result.stderr[:4000]}"
            )
        os.replace(target, made)
    return made
