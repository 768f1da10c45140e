"""C++ to shared libraries: compiled once, kept in the user's cache folder."""

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

from featkd.runtime.files import user_cache

RUNTIME = Path(__file__).parent / "runtime"
FLAGS = (
    *("-std=c++17", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-w", "-fPIC", "-pthread"),
)
# characters of C++ where -O0 is better: 1.1 million take 13 s to compile at -O1, 4 s at -O0;
# and most of a launch is spent in the engine, which is compiled once, at -O2
_LARGE = 300_000


class CompilerError(RuntimeError):
    """No C++ compiler, or one that could not compile the translated kernel."""


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/featkd/ptx, by default below ~/.cache; made where it is missing."""
    folder = user_cache() / "ptx"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_compiler() -> str:
    """The C++ compiler: $CXX, or g++ or clang++ on the path.

    Raises:
        CompilerError: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise CompilerError(
        "featkd.ptx compiles kernels with a C++ compiler, and none was found: "
        "install g++ or clang++, or name one in CXX"
    )


def _machine() -> str:
    """What -march=native depends on, so that a cache shared by machines stays right."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({x for x in lines if x.startswith(("flags", "model name"))}))
    except OSError:
        return platform.processor()


def build(code: str, check: bool, count: bool) -> Path:
    """Compile translated C++, link it with the engine; returns the shared library's path.

    The library's name is a hash of the code, the runtime, the flags, the compiler and the
    machine. It is compiled aside and renamed, so that processes building at once are safe.

    Raises:
        CompilerError: there is no compiler, or it fails.
    """
    flags = [*FLAGS, f"-DFEATKD_CHECK={int(check)}", f"-DFEATKD_COUNT={int(count)}"]
    engine = _compiled('#include "engine.cpp"\n', [*flags, "-O2"], ".o")
    level = "-O0" if len(code) > _LARGE else "-O1"
    return _compiled(code, [*flags, level], ".so", [engine])


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def _compiled(code: str, flags: list[str], suffix: str, objects: Sequence[Path] = ()) -> Path:
    """An object or a shared library in the cache folder, made where it is missing."""
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
        # the engine first: of functions that both hold, its faster ones are kept
        given = [*map(str, objects), str(source), "-shared" if suffix == ".so" else "-c"]
        command = [compiler, *flags, f"-I{RUNTIME}", *given, "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise CompilerError(
                f"{compiler} could not compile the translated kernel:\n{result.stderr[:4000]}"
            )
        os.replace(target, made)
    return made
