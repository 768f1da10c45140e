"""Launches that no kernel runs for: shapes, dtypes, strides and their number, not results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

import featkd
from featkd.kernels.launch import redirect
from tests.kernels.conftest import WRITTEN, cache, executed  # noqa: F401

# tensor arguments that kernels read by strides, their channels apart
STRIDED = ("feature", "teacher", "d_pooled", "d_residual", "d_normed", "student", "target")


@pytest.fixture
def launched() -> Iterator[list[str]]:
    """The names of the kernels that a test would have launched, with tensors that they can read."""
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
def triton() -> Iterator[None]:
    with featkd.use_backend("triton"):
        yield
