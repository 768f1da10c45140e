"""Kernels on CPU tensors: every launch is compiled, and its PTX executed with all checks."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from featkd.kernels.launch import redirect
from ptx_emulator import run_triton

# tensor arguments that a kernel writes: poisoned before the launch, and to be filled by it
WRITTEN = {
    "distance_forward": ("loss_partial", "pooled_partial", "statistics"),
    "distance_backward": ("d_feature", "norm_partial"),
    "sum_partials": ("out", "loss"),
    "two_norms_forward": ("residual", "normed"),
    "two_norms_backward": ("d_h", "norm_partial"),
    "soft_kd_rows": ("losses", "gradient"),
}
_NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which the mmap module names from Python 3.13 on


@pytest.fixture(scope="session", autouse=True)
def cache(compiled_kernels):
    """All share the test run's own cache folder."""


@contextmanager
def executing(arch: int = 80, check: bool = True) -> Iterator[list[str]]:
    """Launches run on the emulator, compiled for `arch`; the names of the kernels that ran.

    Each launch shuffles its threads in another order, so that a second run may not repeat a first.
    Checks keep 24 bytes of their own for each of a tensor, and of what lies between its elements.
    """
    ran: list[str] = []

    def run(kernel, grid, arguments, options):
        name = kernel.fn.__name__
        if name == "distance_forward" and arguments["teacher"] is None:
            kept = arguments["statistics"]  # the other half is of the loss
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
    """A map of one image (1, N, C), as a view whose tokens are 2^30 elements apart.

    Of the memory between them none is touched, and the system gives none. It goes as far before
    the first token: an offset that 32 bits have wrapped finds zeros, and no fault.
    """
    stride, (_, tokens, channels) = 2**30, x.shape
    first = (tokens - 1) * stride
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    memory = mmap.mmap(-1, (2 * first + channels) * x.itemsize, flags=flags)
    whole = torch.frombuffer(memory, dtype=x.dtype)
    return whole[first:].as_strided(x.shape, (channels, stride, 1), first).copy_(x)


@pytest.fixture
def executed():
    """The names of the kernels that the test has run, as compiled for sm_80."""
    with executing() as ran:
        yield ran


@pytest.fixture
def few_programs(monkeypatch):
    """A GPU of one processor, so that each program has several images and tiles to go through."""
    for module in ("feature_distance", "two_layer_norms"):
        monkeypatch.setattr(f"featkd.kernels.{module}.processors", lambda device: 1)
