"""An op on inputs of one size, as featkd and as plain torch compute it."""

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
"""Dtype of products and of the teacher's outputs; students and parameters are float32."""
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    **dict.fromkeys(AUTOCAST, torch.float32),
}
"""Dtype of students and parameters."""

Tensors = dict[str, Tensor]
Normal = Callable[..., Tensor]
"""Draws normal(*shape, scale=1, mean=0) in the case's dtype on its device."""
Function = Callable[[Tensors], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """An op on inputs of one size; `eager` and `featkd` compute the same from the same tensors."""

    op: str
    """Name in featkd.functional."""
    form: str
    """Use of the op, for example "mse-lift"."""
    shape: str
    """Sizes, for example "32x196x192to384"; the first is the number of images."""
    differentiable: tuple[str, ...]
    """Names of the tensors that get a gradient."""
    tensors: Callable[[Normal], Tensors]
    """Draws the inputs by name."""
    eager: Function
    """Outputs in plain torch, written for speed."""
    featkd: Function
    """Outputs of featkd's public function."""
    multiply_adds: int = 0
    """Multiply-adds of the forward pass; the gradients take twice as many."""

    @property
    def batch(self) -> int:
        """Number of images."""
        return int(self.shape.partition("x")[0])


@dataclass(frozen=True)
class Case:
    """A problem in one dtype and one direction.

    "forward" runs without gradients, as in evaluation; "both" is the forward and backward pass of
    a training step; "backward" is the backward pass alone.
    """

    problem: Problem
    dtype: str
    direction: Direction

    @property
    def title(self) -> str:
        """Name without the direction."""
        p = self.problem
        return f"{p.op}/{p.form}/{p.shape}/{self.dtype}"

    @property
    def name(self) -> str:
        return f"{self.title}/{self.direction}"

    def inputs(self, device: torch.device) -> Tensors:
        """Draws the inputs, equal in every call; the differentiated ones are leaves."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1, mean: float = 0) -> Tensor:
            drawn = mean + scale * torch.randn(shape, generator=generator, device=device)
            return drawn.to(DTYPES[self.dtype])

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
        """Returns the autocast context of the forward pass."""
        if self.dtype not in AUTOCAST:
            return nullcontext()
        return torch.autocast(device.type, AUTOCAST[self.dtype])
