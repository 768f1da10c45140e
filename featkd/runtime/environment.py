"""The versions and the machine behind a result, and what the machine is good at."""

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
    """Versions of featkd, Python and the packages that results depend on."""
    found = {"featkd": featkd.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """Git commit of the source tree featkd runs from; "unknown" outside a checkout."""
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
    """Whether tracked source files differ from `commit()`; False outside a checkout."""
    source = Path(featkd.__file__).resolve().parent.parent
    words = ["git", "-C", str(source), "diff", "--quiet", "HEAD", "--", "*.py", "*.cu", "*.cpp"]
    try:
        return subprocess.run(words, capture_output=True, timeout=10).returncode == 1
    except (OSError, subprocess.SubprocessError):
        return False


def machine() -> dict[str, str]:
    """Processor, cores and accelerator; asks torch for the latter."""
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
def multiplies_bf16(device: torch.device) -> bool:
    """Whether products of bf16 matrices are at least as fast on `device` as those of float32.

    A CPU without vector instructions for them (AVX2) takes torch's plain loops: 1,568 rows of 384
    to 1,536 took 8 times as long there as in float32, and a CaiT-S24's forward pass 5.6 times.
    """
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
