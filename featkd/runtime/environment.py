"""Versions and hardware behind a result."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import featkd

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Returns the versions of featkd, Python and the packages that results depend on."""
    found = {"featkd": featkd.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """Returns the Git commit of featkd's source tree, "unknown" outside a checkout."""
    done = _git("rev-parse", "HEAD")
    return "unknown" if done is None or done.returncode else done.stdout.strip()


def has_changes() -> bool:
    """Checks whether tracked source files differ from `commit()`; False outside a checkout."""
    done = _git("diff", "--quiet", "HEAD", "--", "*.py", "*.cu", "*.cpp")
    return done is not None and done.returncode == 1


def _git(*words: str) -> subprocess.CompletedProcess[str] | None:
    """Runs Git in featkd's source tree; None if it can't be run."""
    folder = str(Path(featkd.__file__).resolve().parent.parent)
    try:
        return subprocess.run(
            ["git", "-C", folder, *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, str]:
    """Returns a description of the processor, its cores and the accelerator."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(len(os.sched_getaffinity(0))),
        "torch_threads": str(torch.get_num_threads()),
        "accelerator": device,
    }


def _processor_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


@functools.cache
def product_speedup(dtype: torch.dtype, device: torch.device) -> float:
    """Measures how many times as fast `device` multiplies matrices in `dtype` as in float32.

    Instruction sets don't tell: a CPU with bf16 vector instructions can multiply faster in float32.
    The weight has the size of a ViT-S layer's. The measurement takes some milliseconds, and up to
    a few tenths of a second for a dtype that the device has no instructions for. Each process
    measures once.
    """
    import torch

    def seconds(rows: torch.Tensor, weight: torch.Tensor) -> float:
        start = time.perf_counter()
        torch.mm(rows, weight.T)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        # on a GPU a small product takes as long as its launch
        rows = 16384 if device.type == "cuda" else 512
        factors = [torch.ones(size, 384, device=device) for size in (rows, 1536)]
        cast = [x.to(dtype) for x in factors]
        # in turns, so that a busy moment slows both; the first turn warms up
        turns = [(seconds(*factors), seconds(*cast))]
        while len(turns) < 3 or (len(turns) < 8 and sum(map(sum, turns)) < 0.1):
            turns.append((seconds(*factors), seconds(*cast)))
    return min(wide for wide, _ in turns[1:]) / min(narrow for _, narrow in turns[1:])


def has_fast_bf16(device: torch.device) -> bool:
    """Checks by `product_speedup` whether products in bf16 are at least as fast as in float32."""
    import torch

    return product_speedup(torch.bfloat16, device) >= 1
