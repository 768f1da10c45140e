"""Bytes that the row kernels move, over the floor: every row tensor once.

Counted on their PTX as it runs on the CPU, and, for sizes that are too large for that, added up
from the tensors that each launch is given: it touches all of them, once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import featkd
from featkd.kernels.launch import redirect
from featkd.ops.feature_distance import feature_distance
from featkd.ops.soft_kd import soft_kd
from featkd.ops.two_layer_norms import two_layer_norms
from ptx_emulator import run_triton

from .problem import AUTOCAST, DTYPES

FORMS = ("mse", "spectral", "pooled", "two-norms", "soft_kd")
DIRECTIONS = ("forward", "backward")
# the arguments of the kernels that are tensors of rows; statistics and partial sums are extra
_ROWS = {
    "feature", "teacher", "d_feature", "h", "residual", "normed", "d_residual", "d_normed", "d_h",
    "student", "gradient",
}  # fmt: skip
_LIMITS = {"forward": 1.05, "backward": 1.1}


@dataclass(frozen=True)
class Rows:
    """A row op on one size; (images, classes) of logits for soft_kd.

    `processors` are those of the GPU that is stood in for: the number of partial sums follows them.
    """

    form: str
    dtype: str
    images: int
    grid: tuple[int, int] = (14, 14)
    channels: int = 384
    processors: int = 132

    @property
    def op(self) -> str:
        """Name of the row op."""
        others = {"two-norms": "two_layer_norms", "soft_kd": "soft_kd"}
        return others.get(self.form, "feature_distance")

    @property
    def name(self) -> str:
        tokens = "" if self.form == "soft_kd" else f"x{self.grid[0] * self.grid[1]}"
        return f"{self.op}/{self.form}/{self.images}{tokens}x{self.channels}/{self.dtype}"

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the rows that a product left, and of the parameters."""
        return AUTOCAST.get(self.dtype, DTYPES[self.dtype]), DTYPES[self.dtype]

    def run(self, launcher: Any, make: Callable[..., Tensor]) -> list[int]:
        """Forward and backward pass; returns how many launches each has made.

        Args:
            launcher: as for `redirect`.
            make: torch.randn or torch.empty.
        """
        made = [0]

        def launch(*arguments: Any) -> None:
            made[-1] += 1
            launcher(*arguments)

        with ExitStack() as stack:
            stack.enter_context(featkd.use_backend("triton"))
            stack.enter_context(redirect(launch))
            for module in ("feature_distance", "two_layer_norms"):
                name = f"featkd.kernels.{module}.processors"
                stack.enter_context(patch(name, lambda device: self.processors))
            outputs, leaves = self._forward(make)
            made.append(0)
            torch.autograd.grad(outputs, leaves, [make(x.shape, dtype=x.dtype) for x in outputs])
        return made

    def _forward(self, make: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        half, wide = self.dtypes
        if self.form == "soft_kd":
            student, teacher = (make(self.images, self.channels, dtype=half) for _ in range(2))
            target = torch.zeros(self.images, dtype=torch.int64)
            student.requires_grad_()
            return [soft_kd(student, teacher, target, alpha=0.9, tau=1.0)], [student]
        shape = (self.images, self.grid[0] * self.grid[1], self.channels)
        rows = make(shape, dtype=half).requires_grad_()
        norms = [make(self.channels, dtype=wide).requires_grad_() for _ in range(4)]
        if self.form == "two-norms":
            gamma_p, beta_p, gamma_1, beta_1 = norms
            both = two_layer_norms(
                "widelast_projection", rows, (gamma_p, beta_p, gamma_1, beta_1),
                eps=1e-6, residual_dtype=wide,
            )  # fmt: skip
            return list(both), [rows, *norms]
        loss, pooled = feature_distance(
            "lift_head" if self.form == "pooled" else "projected_feature_kd",
            rows, make(shape, dtype=half), norms[0], norms[1],
            eps=1e-5, grid=self.grid if self.form == "spectral" else None,
            pooled_dtype=half if self.form == "pooled" else None,
        )  # fmt: skip
        return [x for x in (loss, pooled) if x is not None], [rows, *norms[:2]]


@dataclass(frozen=True)
class Traffic:
    """Bytes of all launches of a direction."""

    rows: Rows
    direction: str
    moved: int
    """Different bytes that each launch reads and writes, added up."""
    floor: int
    """Of the row tensors, each once."""
    counted: bool
    """On the executed PTX; otherwise added up from the launches' tensors."""

    @property
    def over_floor(self) -> float:
        """All bytes over the floor."""
        return self.moved / self.floor

    @property
    def broken(self) -> list[str]:
        """The rule of docs/kernels.md that a counted one breaks."""
        limit = _LIMITS[self.direction]
        if not self.counted or self.rows.op == "soft_kd" or self.over_floor <= limit:
            return []
        return [f"moves {self.over_floor:.3f} x the floor, more than {limit}"]


def count(rows: Rows) -> list[Traffic]:
    """Runs the compiled kernels on the CPU and counts their bytes."""
    moved: list[int] = []
    floors: list[int] = []

    def execute(kernel: Any, grid: Any, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        launch = run_triton(
            kernel, grid, check=False, count=True, time_limit=600, **arguments, **options
        )
        counters = launch.counters
        assert counters is not None
        moved.append(counters.distinct_read_bytes + counters.distinct_write_bytes)
        floors.append(sum(_bytes(arguments, _ROWS)))

    return _by_direction(rows, rows.run(execute, torch.randn), moved, floors, counted=True)


def add_up(rows: Rows) -> list[Traffic]:
    """The same from the sizes of the launches' tensors; nothing runs, and no page is touched."""
    moved: list[int] = []
    floors: list[int] = []

    def look(kernel: Any, grid: Any, arguments: dict[str, Any], options: object) -> None:
        moved.append(sum(_bytes(arguments, arguments)))
        floors.append(sum(_bytes(arguments, _ROWS)))

    return _by_direction(rows, rows.run(look, torch.empty), moved, floors, counted=False)


def _bytes(arguments: dict[str, Any], names: Any) -> list[int]:
    return [x.nbytes for k, x in arguments.items() if isinstance(x, Tensor) and k in names]


def _by_direction(
    rows: Rows, made: list[int], moved: list[int], floors: list[int], *, counted: bool
) -> list[Traffic]:
    first = made[0]
    parts = {"forward": slice(0, first), "backward": slice(first, None)}
    return [
        Traffic(rows, direction, sum(moved[part]), sum(floors[part]), counted)
        for direction, part in parts.items()
    ]
