"""Fixtures that record kernel launches without running them, and check the arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

import featkd
from featkd.kernels.launch import redirect
from tests.kernels.conftest import WRITTEN, cache, executed  # noqa: F401

# tensor arguments with strides; only their last dimension must be contiguous
STRIDED = ("feature", "teacher", "d_pooled", "d_residual", "d_normed", "student", "target")


@pytest.fixture
def launched() -> Iterator[list[str]]:
    """Names of launched kernels; checks the strides of their arguments and zeroes their outputs."""
    names: list[str] = []

    def write_zeros(kernel: Any, grid: Any, arguments: dict[str, Any], options: Any) -> None:
        names.append(kernel.fn.__name__)
        for name, x in arguments.items():
            if isinstance(x, Tensor):
                whole = x[(0,) * (x.dim() - 1)] if name in STRIDED and x.dim() > 1 else x
                readable = whole.is_contiguous() or (name in STRIDED and x.dim() == 1)
                assert readable, f"{names[-1]}: {name} has strides {x.stride()}"
        for name in WRITTEN[names[-1]]:
            if arguments[name] is not None:
                arguments[name].zero_()

    with redirect(write_zeros):
        yield names


@pytest.fixture
def recorded() -> Iterator[list[str]]:
    """Names of launched kernels, which do not run."""
    names: list[str] = []
    with redirect(lambda kernel, *_: names.append(kernel.fn.__name__)):
        yield names


@pytest.fixture
def triton() -> Iterator[None]:
    with featkd.use_backend("triton"):
        yield
