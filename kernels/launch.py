"""Kernel launches: on the tensors' GPU, or redirected by a test or a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

# (kernel, grid, arguments by name, compiler options) -> None
Launcher = Callable[[Any, tuple[int, ...], dict[str, Any], dict[str, Any]], None]

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_H100_PROCESSORS = 132  # for tensors that are not on a GPU

_redirected: Launcher | None = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    *,
    num_warps: int,
    threads: int = 384,
) -> None:
    """Runs a `triton.jit` function on the device of its first tensor argument.

    Args:
        threads: least number of threads that a multiprocessor must hold at once. It bounds the
            registers per thread. Without a bound, ptxas spills a few registers to fit one more
            block.
    """
    # a multiply-add fused into the first step of a sum across lanes would round each lane's copy
    # of the sum differently, and the hardware chooses the copy that is stored
    options = {
        "num_warps": num_warps,
        "num_stages": 1,
        "enable_fp_fusion": False,
        "maxnreg": min(255, 65536 // max(threads, 32 * num_warps) // 8 * 8),
    }
    if _redirected is not None:
        _redirected(kernel, grid, arguments, options)
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    values = [arguments[name] for name in kernel.arg_names]  # Triton binds keywords more slowly
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*values, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*values, **options)


@contextmanager
def redirect(launcher: Launcher) -> Iterator[None]:
    """Passes every launch to `launcher` while the block runs: emulators, recorders, counters."""
    global _redirected
    before, _redirected = _redirected, launcher
    try:
        yield
    finally:
        _redirected = before


def can_run_on(device: torch.device) -> bool:
    """Checks whether kernels can run on tensors on this device."""
    if device.type == "cuda" or _redirected is not None:
        return True
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Returns the number of streaming multiprocessors of a GPU; an H100's for other devices."""
    if device.type != "cuda":
        return _H100_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def triton_type(dtype: torch.dtype) -> Any:
    """Returns the Triton type of a floating dtype."""
    return _TYPES[dtype]


def channels_adjacent(x: Tensor) -> Tensor:
    """Returns `x`, or a copy if its last dimension is not contiguous: kernels load rows."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
