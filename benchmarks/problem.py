"""What a benchmark times: an op on inputs of one size, in featkd's form and in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["forward", "backward", "both"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "both")
AUTOCAST = {"autocast-bf16": torch.bfloat16, "autocast-fp16": torch.float16}
"""Pairs of dtypes: what is learnt is float32, products and a teacher's outputs are in this one."""
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    **dict.fromkeys(AUTOCAST, torch.float32),
}
"""Dtype of what is learnt."""

Tensors = dict[str, Tensor]
Normal = Callable[..., Tensor]
"""Draws normal(*shape, scale=1, mean=0) in the case's dtype on its device."""


@dataclass(frozen=True)
class Problem:
    """An op on inputs of one size; `eager` and `featkd` compute the same from the same tensors."""

    op: str
    """Its name in featkd.functional."""
    form: str
    """Which use of the op this is, for instance "mse-lift"."""
    shape: str
    """The sizes, for instance "32x196x192to384"."""
    batch: int
    """Images."""
    differentiable: tuple[str, ...]
    """Names of the tensors that get a gradient."""
    multiply_adds: int
    """Of the forward pass's matrix products; the gradients take twice as many."""
    tensors: Callable[[Normal], Tensors]
    """Fresh inputs by name."""
    eager: Callable[[Tensors], tuple[Tensor, ...]]
    """The outputs as a user of plain torch would write them."""
    featkd: Callable[[Tensors], tuple[Tensor, ...]]
    """The same through featkd's public function."""


@dataclass(frozen=True)
class Maps:
    """Sizes of a pair of feature maps: images, patch grid, student's and teacher's channels."""

    batch: int
    grid: tuple[int, int]
    student: int
    teacher: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def multiply_adds(self) -> int:
        """Of the projection."""
        return self.rows * self.student * self.teacher

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.student}to{self.teacher}"


@dataclass(frozen=True)
class Case:
    """A problem in one dtype, or pair of dtypes, and one direction: what is timed.

    "forward" runs without gradients, as in evaluation; "both" is a training step's forward and
    backward; "backward" is the latter's second half alone.
    """

    problem: Problem
    dtype: str
    direction: Direction

    @property
    def name(self) -> str:
        p = self.problem
        return f"{p.op}/{p.form}/{p.shape}/{self.dtype}/{self.direction}"

    def inputs(self, device: torch.device, seed: int = 0) -> Tensors:
        """The same tensors at every call; those that the direction differentiates are leaves."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1, mean: float = 0) -> Tensor:
            drawn = mean + scale * torch.randn(shape, generator=generator)
            return drawn.to(device, DTYPES[self.dtype])

        tensors = self.problem.tensors(normal)
        if self.dtype in AUTOCAST:
            for name, x in tensors.items():
                if x.is_floating_point() and name not in self.problem.differentiable:
                    tensors[name] = x.to(AUTOCAST[self.dtype])
        if self.direction != "forward":
            for name in self.problem.differentiable:
                tensors[name].requires_grad_()
        return tensors

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Autocast where the pair of dtypes asks for it; for a forward pass."""
        if self.dtype not in AUTOCAST:
            return nullcontext()
        return torch.autocast(device.type, AUTOCAST[self.dtype])
