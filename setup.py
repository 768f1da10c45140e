"""Maps top-level folders to import names and builds csrc/; the rest is in pyproject.toml.

The extension is a plain shared library on torch's stable ABI. torch loads it; Python does not
import it. Building it needs torch's headers and libraries; the result works with any Python 3 and
with later torch versions. The build finds torch in the environment that featkd is installed into,
so an isolated build needs no second torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDERS = ("benchmarks", "kernels", "recipes")
CSRC = Path("csrc")
TORCH_2_10 = "0x020a000000000000"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"),
    # neither changes a result: errno of square roots and floating-point traps are not used
    *("-fno-math-errno", "-fno-trapping-math"),
)
# name: (bytes per vector, rows of A held in registers, vectors of shifts held in registers, flags)
ISAS = {"portable": (16, 2, 4, ())}
if platform.machine() in ("x86_64", "AMD64"):
    wide = ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
    ISAS |= {"avx2": (32, 2, 5, ("-mavx2", "-mfma")), "avx512": (64, 4, 4, wide)}
BYTES_PER_JOB = 2 * 2**30
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"


def torch_folder() -> Path | None:
    """Folder of the torch that this build or the target environment can import, or None."""
    for place in (*sys.path, *(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))):
        folder = Path(place) / "torch"
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            return folder
    return None


def nvcc() -> str | None:
    """Path of nvcc, or None; FEATKD_CUDA=0 disables it, FEATKD_CUDA=1 requires it."""
    setting = os.environ.get("FEATKD_CUDA", "")
    if setting not in ("", "0", "1"):
        raise SystemExit(f"FEATKD_CUDA: expected 0, 1 or nothing, got {setting!r}")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if setting == "1" and not found:
        raise SystemExit("FEATKD_CUDA=1, but there is no nvcc on the path or in CUDA_HOME")
    if setting == "0" or not found:
        why = "FEATKD_CUDA=0" if setting == "0" else "no nvcc found"
        print(f"featkd: the CUDA half of csrc is not built ({why})", file=sys.stderr)
        return None
    return found


def gencodes(archs: str) -> list[str]:
    """nvcc flags for a TORCH_CUDA_ARCH_LIST such as 8.0;9.0a;10.0+PTX."""
    flags = []
    for arch in archs.replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected numbers like 9.0, got {arch!r}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def jobs() -> int:
    """Number of parallel compilers: limited by the cores and by free memory."""
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_JOB))


def cpu_flags(isa: str) -> tuple[str, ...]:
    """Compiler flags of a CPU kernel for one instruction set."""
    size, rows, unroll, flags = ISAS[isa]
    values = (f"ISA={isa}", f"VECTOR_BYTES={size}", f"ROWS={rows}", f"UNROLL={unroll}")
    return (*FLAGS, *flags, *(f"-DFEATKD_{value}" for value in values))


def ninja_file(torch: Path, cuda: str | None, target: Path) -> str:
    """Contents of build.ninja."""
    cxx = os.environ.get("CXX", "c++")
    source = CSRC.absolute()
    lines = [
        "rule cxx\n  command = " + cxx + " $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        # nvcc links its own libraries
        f"rule link\n  command = {cuda or cxx} -shared -o $out $in $libraries",
    ]
    objects = []

    def compiled(file: str, flags: tuple[str, ...], rule: str = "cxx", suffix: str = "") -> None:
        target = f"{Path(file).with_suffix('')}{suffix}.o"
        objects.append(target)
        lines.append(f"build {target}: {rule} {source / file}\n  flags = {' '.join(flags)}")

    for isa in ISAS:
        for file in ("linalg/cpu_isa.cpp", "attention/heads.cpp"):
            compiled(file, cpu_flags(isa), suffix=f"_{isa}")
    for file in ("isa.cpp", "linalg/cpu.cpp"):
        compiled(file, FLAGS)
    headers = f"-isystem {torch / 'include'}"
    with_cuda = ("-DFEATKD_WITH_CUDA",) if cuda else ()
    target_version = f"-DTORCH_TARGET_VERSION={TORCH_2_10}"
    for folder in ("linalg", "attention"):
        compiled(f"{folder}/bindings.cpp", (*FLAGS, headers, target_version, *with_cuda))
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ldl"]
    if cuda:
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
        flags = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v")
        lines.append(f"rule nvcc\n  command = {cuda} $flags -MMD -MF $out.d -c $in -o $out")
        lines.append("  depfile = $out.d\n  deps = gcc")
        compiled("linalg/cuda.cu", (*flags, *gencodes(archs)), "nvcc")
        libraries += ["-cudart=static"]
    lines.append(f"build {target}: link {' '.join(objects)}\n  libraries = {' '.join(libraries)}")
    return "\n".join(lines) + "\n"


class BuildCsrc(build_ext):
    """Compiles csrc/ with ninja into featkd/_csrc.so."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        if torch is None:
            raise SystemExit("csrc: torch disappeared during the build")
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        folder = Path(self.build_temp).absolute()
        for made in (target.parent, folder):
            made.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(torch, nvcc(), target))
        # the ninja package if it is installed, otherwise the system's ninja
        ninja = [sys.executable, "-m", "ninja"] if find_spec("ninja") else ["ninja"]
        command = [*ninja, "-C", str(folder), "-j", str(jobs())]
        if subprocess.run(command).returncode:
            raise SystemExit("csrc: the build failed; the compiler's message is above")


class PlatformWheel(bdist_wheel):
    """Wheel tag for any Python 3: no Python imports the library."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


extensions = [Extension("featkd._csrc", sources=[])]
if torch_folder() is None:
    print("featkd: csrc is not built (no torch here): install torch first", file=sys.stderr)
    extensions = []

setup(
    packages=[
        *find_packages(include=["featkd", "featkd.*"]),
        *(f"featkd.{folder}" for folder in FOLDERS),
    ],
    package_dir={f"featkd.{folder}": folder for folder in FOLDERS},
    package_data={
        "featkd": ["py.typed", "*/templates/*"],
        "featkd.recipes": ["*.yaml"],
    },
    ext_modules=extensions,
    cmdclass={"build_ext": BuildCsrc, **({"bdist_wheel": PlatformWheel} if extensions else {})},
)
