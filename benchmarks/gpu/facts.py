"""Facts about this machine: torch, GPU, versions, missing packages; and the build of csrc."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LINKS = ("benchmarks", "kernels", "recipes")
# module -> (wheel to bring, parts that are left out without it)
NEEDED = {
    "torch": ("torch", "everything"),
    "triton": ("triton, which comes with torch", "the fused ops on a GPU"),
    "numpy": ("numpy", "everything"),
    "timm": ("timm", "updates, tools"),
    "torchvision": ("torchvision", "updates, tools"),
    "PIL": ("pillow", "updates, tools"),
    "yaml": ("pyyaml", "updates, tools"),
    "fsspec": ("fsspec", "updates, tools"),
    "safetensors": ("safetensors", "updates, tools"),
    "tqdm": ("tqdm", "updates, tools"),
    "tensorboard": ("tensorboard", "updates, tools"),
    "google.protobuf": ("protobuf", "updates, tools"),
    "jinja2": ("jinja2", "the report of `featkd diagnose`"),
    "matplotlib": ("matplotlib", "the figures of `featkd diagnose`"),
    "setuptools": ("setuptools, 77 or newer", "the build of csrc, and with it linalg"),
    "ninja": ("ninja (or a ninja on the path)", "the build of csrc, and with it linalg"),
    "jsonargparse": (
        "jsonargparse with typeshed-client, importlib-resources, typing-extensions and "
        "docstring-parser",
        "the command line, which this run does not use",
    ),
    "pytest": ("pytest, iniconfig, pluggy, packaging, pygments", "`pytest tests/gpu` only"),
    "nvidia.dali": ("nvidia-dali-cuda130", "the DALI loader; timm's is used"),
}
_SETUPTOOLS = 77  # pyproject.toml's
_LOOK = """
import importlib.metadata, importlib.util, json, platform, sys
found = {"python": platform.python_version(), "missing": [], "gpus": []}
for name in json.loads(sys.argv[1]):
    try:
        there = importlib.util.find_spec(name) is not None
    except ImportError:
        there = False
    if not there:
        found["missing"].append(name)
for name in ("triton", "timm", "numpy", "torchvision", "setuptools"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = "none"
try:
    import torch
    found["torch"], found["cuda"] = str(torch.__version__), str(torch.version.cuda)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found["gpus"].append([p.name, p.total_memory, p.major, p.minor])
except Exception as error:
    found["torch_error"] = str(error)[:500]
print("FACTS" + json.dumps(found))
"""


def look() -> dict[str, Any]:
    """Returns versions, GPUs and missing packages of this Python, found in another process."""
    command = [sys.executable, "-c", _LOOK, json.dumps(list(NEEDED))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
        line = next(x for x in done.stdout.splitlines() if x.startswith("FACTS"))
        found: dict[str, Any] = json.loads(line.removeprefix("FACTS"))
    except (subprocess.TimeoutExpired, StopIteration, ValueError) as error:
        found = {"missing": [], "gpus": [], "torch_error": f"{type(error).__name__}: {error}"}
    setuptools = found.get("setuptools", "none").partition(".")[0]
    if setuptools.isdigit() and int(setuptools) < _SETUPTOOLS:
        found["missing"].append("setuptools")
    if "ninja" in found["missing"] and shutil.which("ninja"):
        found["missing"].remove("ninja")
    driver = _output(
        "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"
    )
    found["driver"] = driver.splitlines()[0] if driver else "unknown"
    found["nvcc"] = (_output(cuda_tool("nvcc") or "nvcc", "--version").splitlines() or ["none"])[-1]
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    found["commit"] = (commit or "unknown") + ("+changes" if changed else "")
    found["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return found


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cuda_tool(name: str) -> str | None:
    """Returns the path of a CUDA tool on the path or in CUDA_HOME."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")


def carry(missing: list[str]) -> list[str]:
    """Returns a line for each wheel to bring."""
    return [f"{NEEDED[name][0]}: needed for {NEEDED[name][1]}" for name in missing]


def link() -> str:
    """Makes the checkout importable; returns why that is not possible, or "".

    An installation maps the folders beside featkd/ to featkd.kernels and so on. Here links do,
    which git ignores.
    """
    for name in LINKS:
        place = ROOT / "featkd" / name
        try:
            if not place.exists():
                place.symlink_to(Path("..") / name, target_is_directory=True)
        except OSError as error:
            return f"{place}: cannot link to ../{name}: {error}"
    return ""


def build_environment(gpus: list[Any]) -> dict[str, str]:
    """Returns the environment that builds for this GPU alone, in a third of the time."""
    known = {**os.environ}
    if gpus:
        _, _, major, minor = gpus[0]
        known["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
        known["FEATKD_CUDA"] = "1"
    return known
