"""Test problems for projected_feature_kd and lift_head, with references in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.functional import lift_head, projected_feature_kd
from tests.ops.comparing import Comparable, Tensors, normal

EPS = 1e-2  # large, so that an error in its use shows


@dataclass(frozen=True)
class Problem(Comparable):
    """Sizes and optional arguments.

    Attributes:
        width: of the patch grid for the spectral metric; 0 selects mse.
        student: channels of the student; 0 for no projector.
        pooled: call lift_head, which also returns the mean over the tokens.
    """

    constant: ClassVar[tuple[str, ...]] = ("teacher",)

    batch: int
    tokens: int
    channels: int
    width: int = 0
    student: int = 0
    bias: bool = False
    norm: str = "both"  # none, weight, both
    teacher: bool = True
    pooled: bool = False

    def __str__(self) -> str:
        kind = f"w{self.width}" if self.teacher else "alone"
        sizes = f"{self.batch}x{self.tokens}x{self.student}to{self.channels}"
        parts = [sizes, kind, self.norm, *["bias"] * self.bias, *["pooled"] * self.pooled]
        return "-".join(parts)

    def inputs(self, rows: torch.dtype, parameters: torch.dtype | None = None) -> Tensors:
        """Arguments: maps in `rows`, parameters of the norm in `parameters` (default: `rows`)."""
        g = torch.Generator().manual_seed(0)
        of_norm, ct, cs = parameters or rows, self.channels, self.student
        tensors = {
            "student": normal(g, self.batch, self.tokens, cs or ct, mean=0.5).to(rows),
            "teacher": normal(g, self.batch, self.tokens, ct).to(rows),
            "weight": normal(g, ct, cs or 1, scale=(cs or 1) ** -0.5, mean=0.1).to(rows),
            "bias": normal(g, ct).to(rows),
            "norm_weight": normal(g, ct, scale=0.3, mean=1).to(of_norm),
            "norm_bias": normal(g, ct).to(of_norm),
        }
        absent = {
            "teacher": not self.teacher,
            "weight": not cs,
            "bias": not self.bias,
            "norm_weight": self.norm == "none",
            "norm_bias": self.norm != "both",
        }
        return {name: x for name, x in tensors.items() if not absent.get(name)}

    def upstream(self, inputs: Tensors) -> Tensors:
        """Gradients of the outputs, scaled so that both matter in the student's gradient."""
        g, size = torch.Generator().manual_seed(1), 1 / (self.batch * self.channels)
        pooled = normal(g, self.batch, self.channels, scale=size)
        given = {"pooled": pooled, "loss": torch.tensor(3.0)}
        with torch.no_grad():
            return {n: given[n].to(x.dtype) for n, x in self.plain(**inputs).items()}

    def grid(self) -> tuple[int, int] | None:
        return (self.tokens // self.width, self.width) if self.width else None

    def fused(self, student: Tensor, **others: Tensor) -> Tensors:
        """Outputs by featkd."""
        options = {"eps": EPS, "metric": "spectral" if self.width else "mse", "grid": self.grid()}
        if not self.pooled:
            return {"loss": projected_feature_kd(student, **others, **options)}
        pooled, loss = lift_head(student, **others, **options)
        return {"pooled": pooled} if loss is None else {"pooled": pooled, "loss": loss}

    def plain(self, student: Tensor, **others: Tensor) -> Tensors:
        """Outputs by plain torch: linear layer in the student's dtype, the rest in a wider one."""
        rows = student
        if "weight" in others:
            rows = F.linear(student, others["weight"], others.get("bias"))
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if "norm_weight" in others:
            norm = [x.to(rows.dtype) for n, x in others.items() if n.startswith("norm_")]
            rows = F.layer_norm(rows, (self.channels,), *norm, eps=EPS)
        found = {"pooled": rows.mean(1).to(student.dtype)} if self.pooled else {}
        if "teacher" in others:
            error = rows - others["teacher"].to(rows.dtype)
            if self.width:
                maps = error.mT.reshape(self.batch, self.channels, *self.grid())
                error = torch.view_as_real(torch.fft.rfft2(maps, norm="ortho"))
            found["loss"] = error.square().mean()
        return found
