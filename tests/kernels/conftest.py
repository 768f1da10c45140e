"""Kernels on CPU tensors: every launch is compiled for sm_80 and its PTX executed, with checks."""

from __future__ import annotations

import pytest

from featkd.kernels.launch import redirect
from featkd.ptx import run_triton

# tensor arguments that a kernel writes: poisoned before the launch, and to be filled by it
WRITTEN = {
    "loss_and_student_gradient": ("gradient", "statistics", "partial"),
    "parameter_gradients": ("weight_partial", "vector_partial"),
    "loss_and_logit_gradient": ("gradient", "losses"),
    "scale": ("scaled",),
}


@pytest.fixture(scope="session", autouse=True)
def cache(compiled_kernels):
    """All share the test run's own cache folder."""


@pytest.fixture
def executed():
    """Launches run on the emulator while the test does; the names of the kernels that ran."""
    ran: list[str] = []

    def run(kernel, grid, arguments, options):
        name = kernel.fn.__name__
        outputs = [x for x in WRITTEN[name] if arguments[x] is not None]
        launch = run_triton(kernel, grid, outputs=outputs, seed=5, **arguments, **options)
        assert launch.reports == (), "\n".join(map(str, launch.reports))
        ran.append(name)

    with redirect(run):
        yield ran
