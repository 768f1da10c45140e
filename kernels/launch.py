"""How kernels are launched: on the tensors' GPU, or where a test or a report redirects them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

# (kernel, grid, arguments by name, compiler's options) -> None
Launcher = Callable[[Any, tuple[int, ...], dict[str, Any], dict[str, Any]], None]

_redirected: Launcher | None = None
_redirected_arch = 80


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int = 2,
) -> None:
    """Run a `triton.jit` function on the device of its first tensor argument."""
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        # a product fused into the first step of a sum across lanes rounds each lane's copy of the
        # sum differently, and which copy is kept is the hardware's choice
        "enable_fp_fusion": False,
    }
    if _redirected is not None:
        _redirected(kernel, grid, arguments, options)
        return
    device = next(a.device for a in arguments.values() if isinstance(a, torch.Tensor))
    # the current device may be another one
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, **options)


@contextmanager
def redirect(launcher: Launcher, arch: int = 80) -> Iterator[None]:
    """Hand every launch to `launcher` while the block runs: emulators, recorders, counters.

    `arch` is the compute capability, times ten, that launch configurations are chosen for.
    """
    global _redirected, _redirected_arch
    before = _redirected, _redirected_arch
    _redirected, _redirected_arch = launcher, arch
    try:
        yield
    finally:
        _redirected, _redirected_arch = before


def architecture(device: torch.device) -> int:
    """Compute capability, times ten, of the GPU that a launch would run on: 80, 86, 90, 100, ..."""
    if _redirected is not None or device.type != "cuda":
        return _redirected_arch
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def can_run_on(device: torch.device) -> bool:
    """Whether kernels can run on tensors of this device."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    return device.type == "cuda" or _redirected is not None or interpreted
