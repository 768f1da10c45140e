"""Kernels on CPU tensors: every launch is compiled for sm_80 and its PTX executed, with checks."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from featkd.kernels.launch import redirect
from featkd.ptx import run_triton

# tensor arguments that a kernel writes: poisoned before the launch, and to be filled by it
WRITTEN = {
    "features_gradient": ("totals", "gradient"),
    "head_gradients": ("weight_partial", "vector_partial"),
    "loss_and_student_gradient": ("gradient", "statistics", "partial"),
    "parameter_gradients": ("weight_partial", "vector_partial"),
    "loss_and_logit_gradient": ("gradient", "losses"),
    "scale": ("scaled",),
    "sum_and_scale": ("scaled",),
    "project_and_normalise": ("residual", "normed", "statistics"),
    "input_gradient": ("means", "gradient"),
    "attend": ("out",),
    "pool_and_distance": ("pooled_partial", "statistics", "energy_partial"),
}
_NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which the mmap module names from Python 3.13 on


@pytest.fixture(scope="session", autouse=True)
def cache(compiled_kernels):
    """All share the test run's own cache folder."""


@contextmanager
def executing(arch: int, check: bool = True) -> Iterator[list[str]]:
    """Launches run on the emulator, compiled for `arch`; the names of the kernels that ran.

    Checks keep 24 bytes of their own for each of a tensor, and of what lies between its elements.
    """
    ran: list[str] = []

    def run(kernel, grid, arguments, options):
        name = kernel.fn.__name__
        outputs = [x for x in WRITTEN[name] if arguments[x] is not None]
        launch = run_triton(
            kernel, grid, outputs=outputs, seed=5, arch=arch, check=check, **arguments, **options
        )
        assert launch.reports == (), "\n".join(map(str, launch.reports))
        ran.append(name)

    with redirect(run, arch):
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
    with executing(80) as ran:
        yield ran


@pytest.fixture
def executed_unchecked():
    """The same without checks, for tensors with gigabytes between their elements."""
    with executing(80, check=False) as ran:
        yield ran


@pytest.fixture
def executed_on_hopper():
    """The same for sm_90, whose larger tiles multiply by wgmma."""
    with executing(90) as ran:
        yield ran
