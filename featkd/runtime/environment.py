"""Versions and hardware behind a result."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
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
    source = Path(featkd.__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


def has_changes() -> bool:
    """Checks whether tracked source files differ from `commit()`; False outside a checkout."""
    source = Path(featkd.__file__).resolve().parent.parent
    words = ["git", "-C", str(source), "diff", "--quiet", "HEAD", "--", "*.py", "*.cu", "*.cpp"]
    try:
        return subprocess.run(words, capture_output=True, timeout=10).returncode == 1
    except (OSError, subprocess.SubprocessError):
        return False


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
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


@functools.cache
def has_fast_bf16(device: torch.device) -> bool:
    """Checks whether matrix products in bf16 are at least as fast on `device` as in float32.

    On a CPU without bf16 vector instructions torch uses plain loops, several times slower.
    """
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
