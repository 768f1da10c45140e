"""Kernels on CPU tensors: every launch is compiled for sm_80 and its PTX executed, with checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

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


@pytest.fixture(scope="session", autouse=True)
def cache(compiled_kernels):
    """All share the test run's own cache folder."""


@contextmanager
def executing(arch: int) -> Iterator[list[str]]:
    """Launches run on the emulator, compiled for `arch`; the names of the kernels that ran."""
    ran: list[str] = []

    def run(kernel, grid, arguments, options):
        name = kernel.fn.__name__
        outputs = [x for x in WRITTEN[name] if arguments[x] is not None]
        launch = run_triton(
            kernel, grid, outputs=outputs, seed=5, arch=arch, **arguments, **options
        )
        assert launch.reports == (), "\n".join(map(str, launch.reports))
        ran.append(name)

    with redirect(run, arch):
        yield ran


@pytest.fixture
def executed():
    """The names of the kernels that the test has run, as compiled for sm_80."""
    with executing(80) as ran:
        yield ran


@pytest.fixture
def executed_on_hopper():
    """The same for sm_90, whose larger tiles multiply by wgmma."""
    with executing(90) as ran:
        yield ran
