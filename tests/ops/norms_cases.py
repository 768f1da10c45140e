"""Test problems for widelast_projection, with references in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.functional import widelast_projection
from tests.ops.comparing import Comparable, Tensors, normal

EPS = 1e-2  # large, so that an error in its use shows
NORMS = ("proj_norm_weight", "proj_norm_bias", "norm1_weight", "norm1_bias")


@dataclass(frozen=True)
class Problem(Comparable):
    """Sizes, and the outputs that are used."""

    batch: int
    tokens: int
    student: int
    channels: int
    used: tuple[str, ...] = ("residual", "normed")

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.tokens}x{self.student}to{self.channels}"
        return "-".join((sizes, *self.used))

    def inputs(self, rows: torch.dtype, parameters: torch.dtype | None = None) -> Tensors:
        """Arguments: x and the weight in `rows`, the norms in `parameters` (default: `rows`)."""
        g, ct = torch.Generator().manual_seed(0), self.channels
        norms = [normal(g, ct, scale=0.3, mean=m).to(parameters or rows) for m in (1, 0, 1, 0)]
        return {
            "x": normal(g, self.batch, self.tokens, self.student, mean=0.5).to(rows),
            "weight": normal(g, ct, self.student, scale=self.student**-0.5, mean=0.1).to(rows),
            **dict(zip(NORMS, norms, strict=True)),
        }

    def upstream(self, inputs: Tensors) -> Tensors:
        """Gradients of the used outputs, in x's dtype."""
        g, dtype = torch.Generator().manual_seed(1), inputs["x"].dtype
        shape = (self.batch, self.tokens, self.channels)
        both = {n: normal(g, *shape, mean=0.5).to(dtype) for n in ("residual", "normed")}
        return {n: both[n] for n in self.used}

    def fused(self, **inputs: Tensor) -> Tensors:
        """Outputs by featkd."""
        residual, normed = widelast_projection(**inputs, eps=EPS)
        return {"residual": residual, "normed": normed}

    def plain(self, x: Tensor, weight: Tensor, **norms: Tensor) -> Tensors:
        """Outputs by plain torch: linear layer in x's dtype, norms in float32 or float64."""
        rows = F.linear(x, weight)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        p = [norms[n].to(rows.dtype) for n in NORMS]
        residual = F.layer_norm(rows, (self.channels,), p[0], p[1], EPS)
        normed = F.layer_norm(residual, (self.channels,), p[2], p[3], EPS)
        return {"residual": residual.to(x.dtype), "normed": normed.to(x.dtype)}
