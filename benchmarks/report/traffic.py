"""Bytes that the row kernels move, against the floor: every row tensor once.

Small sizes are counted: the kernels' PTX runs on the CPU. For large sizes the bytes of the tensors
in each launch are added up, because a launch reads or writes each of them once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from ..problem import AUTOCAST, DTYPES
from ..results import Measured

FORMS = {
    "mse": "projected_feature_kd",
    "spectral": "projected_feature_kd",
    "pooled": "lift_head",
    "two-norms": "widelast_projection",
    "soft_kd": "soft_kd",
}
"""Public function by form of the row op."""
# kernel arguments that are tensors of rows; statistics and partial sums are not in the floor
_ROWS = {
    "feature", "teacher", "d_feature", "h", "residual", "normed", "d_residual", "d_normed", "d_h",
    "student", "gradient",
}  # fmt: skip
_LIMITS = {"forward": 1.05, "backward": 1.1}


@dataclass(frozen=True)
class Rows:
    """A row op on one size; for soft_kd the channels are classes.

    `processors` is the GPU's number of multiprocessors, which determines the number of partial
    sums.
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
        size = f"{self.images}{tokens}x{self.channels}"
        return f"{self.op}/{self.form}/{size}/{self.dtype}/{self.processors} processors"

    def forward(self, make: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Runs the forward pass on tensors of `make`; returns its outputs and the leaves."""
        wide = DTYPES[self.dtype]  # of the parameters
        half = AUTOCAST.get(self.dtype, wide)  # of the rows, which are results of a product
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
            FORMS[self.form], rows, make(shape, dtype=half), norms[0], norms[1],
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
    """Sum over the launches of the distinct bytes that each reads and writes."""
    floor: int
    """Bytes of the row tensors, each once."""
    counted: bool
    """True if counted on executed PTX; False if added up from the launches' tensors."""

    @property
    def name(self) -> str:
        return f"{self.rows.name}/{self.direction}"

    @property
    def over_floor(self) -> float:
        """Moved bytes / floor."""
        return self.moved / self.floor

    @property
    def broken(self) -> list[str]:
        """Rules of docs/kernels.md that counted traffic breaks."""
        limit = _LIMITS[self.direction]
        if not self.counted or self.rows.op == "soft_kd" or self.over_floor <= limit:
            return []
        return [f"moves {self.over_floor:.3f} x the floor, more than {limit}"]

    def figures(self) -> list[Measured]:
        """Returns the figures in the JSON form."""
        how = "sm_80 counted" if self.counted else "added up"
        return [
            (self.name, how, "moved", "bytes", self.moved),
            (self.name, how, "over_floor", "ratio", self.over_floor),
        ]


def count(rows: Rows) -> list[Traffic]:
    """Counts the bytes of the compiled kernels, which run on the CPU."""

    def execute(kernel: Any, grid: Any, arguments: dict[str, Any], options: dict[str, Any]) -> int:
        launch = run_triton(
            kernel, grid, check=False, count=True, time_limit=600, **arguments, **options
        )
        counters = launch.counters
        assert counters is not None
        return counters.distinct_read_bytes + counters.distinct_write_bytes

    return _by_direction(rows, execute, torch.randn, counted=True)


def add_up(rows: Rows) -> list[Traffic]:
    """Adds up the bytes of the launches' tensors; nothing runs, and no memory is touched."""

    def look(kernel: Any, grid: Any, arguments: dict[str, Any], options: object) -> int:
        return _bytes(arguments, arguments)

    return _by_direction(rows, look, torch.empty, counted=False)


def _by_direction(
    rows: Rows, launcher: Callable[..., int], make: Callable[..., Tensor], *, counted: bool
) -> list[Traffic]:
    """Runs both passes; `launcher` receives every launch and returns its bytes."""
    moved: list[int] = []
    floors: list[int] = []

    def launch(kernel: Any, grid: Any, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        moved.append(launcher(kernel, grid, arguments, options))
        floors.append(_bytes(arguments, _ROWS))

    with ExitStack() as stack:
        stack.enter_context(featkd.use_backend("triton"))
        stack.enter_context(redirect(launch))
        for module in ("feature_distance", "two_layer_norms"):
            name = f"featkd.kernels.{module}.processors"
            stack.enter_context(patch(name, lambda device: rows.processors))
        outputs, leaves = rows.forward(make)
        first = len(moved)
        torch.autograd.grad(outputs, leaves, [make(x.shape, dtype=x.dtype) for x in outputs])
    parts = {"forward": slice(0, first), "backward": slice(first, None)}
    return [
        Traffic(rows, direction, sum(moved[part]), sum(floors[part]), counted)
        for direction, part in parts.items()
    ]


def moved(ops: Sequence[str]) -> list[Traffic]:
    """Counts the traffic of the ops' forms on 8 images, and adds it up for 32 and 256.

    The emulated GPU has 4 multiprocessors for 8 images, so that each program has as many rows as
    with 256 images on 132 multiprocessors.
    """
    found: list[Traffic] = []
    for form in [form for form, op in FORMS.items() if op in ops]:
        channels = 1000 if form == "soft_kd" else 384
        found += count(Rows(form, "bf16", 8, channels=channels, processors=4))
        for dtype in ("bf16", "fp32"):
            for images in (32, 256):
                found += add_up(Rows(form, dtype, images, channels=channels))
    return found


def _bytes(arguments: dict[str, Any], names: Any) -> int:
    return sum(x.nbytes for k, x in arguments.items() if isinstance(x, Tensor) and k in names)
