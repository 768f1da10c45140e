"""Fixtures that compile each kernel launch and execute its PTX on the CPU, with all checks."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from featkd.kernels.launch import redirect
from ptx_emulator import run_triton

# tensor arguments that a kernel writes; they are poisoned before the launch
WRITTEN = {
    "distance_forward": ("loss_partial", "pooled_partial", "statistics"),
    "distance_backward": ("d_feature", "norm_partial"),
    "sum_partials": ("out", "loss"),
    "two_norms_forward": ("residual", "normed"),
    "two_norms_backward": ("d_h", "norm_partial"),
    "soft_kd_rows": ("losses", "gradient"),
}
_NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE; the mmap module has it from Python 3.13 on


@pytest.fixture(scope="session", autouse=True)
def cache(compiled_kernels):
    """Uses the cache folder of the test run."""


@contextmanager
def executing(arch: int = 80, check: bool = True) -> Iterator[list[str]]:
    """Runs launches on the emulator, compiled for `arch`; yields the names of the kernels.

    Each launch has another order of threads, which shows results that depend on the order.
    Checks need 24 bytes per byte of a tensor, including the gaps between its elements.
    """
    ran: list[str] = []

    def run(kernel, grid, arguments, options):
        name = kernel.fn.__name__
        if name == "distance_forward" and arguments["teacher"] is None:
            kept = arguments["statistics"]  # the second half is used only by the loss
            arguments = arguments | {"statistics": None if kept is None else kept[:2]}
        outputs = [x for x in WRITTEN[name] if arguments[x] is not None]
        seed = len(ran)
        launch = run_triton(
            kernel, grid, outputs=outputs, seed=seed, arch=arch, check=check, **arguments, **options
        )
        assert launch.reports == (), "\n".join(map(str, launch.reports))
        ran.append(name)

    with redirect(run):
        yield ran


def tokens_far_apart(x: Tensor) -> Tensor:
    """Copies a map of one image (1, N, C) into a view whose tokens are 2^30 elements apart.

    The memory between them is never accessed, so the system allocates none. As much address space
    lies before the first token: an offset that overflows 32 bits reads zeros instead of crashing.
    """
    stride, (_, tokens, channels) = 2**30, x.shape
    first = (tokens - 1) * stride
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    memory = mmap.mmap(-1, (2 * first + channels) * x.itemsize, flags=flags)
    whole = torch.frombuffer(memory, dtype=x.dtype)
    return whole[first:].as_strided(x.shape, (channels, stride, 1), first).copy_(x)


@pytest.fixture
def executed():
    """Names of the kernels that the test has run, compiled for sm_80."""
    with executing() as ran:
        yield ran


@pytest.fixture
def few_programs(monkeypatch):
    """Pretends a GPU with one multiprocessor, so that a program has several images and tiles."""
    for module in ("feature_distance", "two_layer_norms"):
        monkeypatch.setattr(f"featkd.kernels.{module}.processors", lambda device: 1)
