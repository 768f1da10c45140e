"""Problems for widelast_projection, and a float64 evaluation by autograd to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.feature_kd_cases import relative

EPS = 1e-2  # large enough for a slip in it to be seen
PARAMETERS = (
    "weight",
    "proj_norm_weight",
    "proj_norm_bias",
    "norm1_weight",
    "norm1_bias",
)
NAMES = ("residual", "normed", "x", *PARAMETERS)


@dataclass(frozen=True)
class Problem:
    """Sizes, and which of the outputs are used."""

    batch: int
    tokens: int
    student: int
    teacher: int
    used: str = "both"  # residual, normed, both

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.student}to{self.teacher}-{self.used}"

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """x, weight, the norms' parameters, and the upstream gradients of r and u."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1, mean: float = 0) -> Tensor:
            return (mean + scale * torch.randn(shape, generator=generator)).to(dtype)

        shape, ct = (self.batch, self.tokens), self.teacher
        return [
            normal(*shape, self.student),
            normal(ct, self.student, scale=self.student**-0.5, mean=0.1),
            normal(ct, scale=0.3, mean=1),
            normal(ct),
            normal(ct, scale=0.3, mean=1),
            normal(ct),
            normal(*shape, ct, mean=0.5),
            normal(*shape, ct, mean=-0.5),
        ]


def eager(x: Tensor, weight: Tensor, *norms: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """r and u by plain torch in the tensors' own dtype."""
    shape = weight.shape[:1]
    r = F.layer_norm(F.linear(x, weight), shape, norms[0], norms[1], eps)
    return r, F.layer_norm(r, shape, norms[2], norms[3], eps)


def evaluate(
    tensors: Sequence[Tensor],
    used: str,
    dtype: torch.dtype,
    function: Callable[..., Any] = eager,
) -> dict[str, Tensor]:
    """Both outputs and, through those used, the gradients of all inputs, in `dtype`."""
    *inputs, d_residual, d_normed = (x.detach().to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in inputs]
    outputs = function(*leaves)
    pairs = zip(("residual", "normed"), outputs, (d_residual, d_normed), strict=True)
    chosen = [(y, dy) for name, y, dy in pairs if used in ("both", name)]
    gradients = torch.autograd.grad(
        [y for y, _ in chosen], leaves, [dy for _, dy in chosen], allow_unused=True
    )
    found = (x.detach() for x in outputs), gradients
    named = zip(NAMES, (*found[0], *found[1]), strict=True)
    return {name: x for name, x in named if x is not None and not _is_unused(name, used)}


def _is_unused(name: str, used: str) -> bool:
    """LN_1's parameters have no gradient, or zeros, where only the residual is used."""
    return used == "residual" and name.startswith("norm1")


def assert_as_exact_as_eager(got: dict[str, Tensor], tensors: Sequence[Tensor], used: str) -> None:
    """Errors against float64 of at most twice those of plain torch in the same dtype."""
    dtype = tensors[0].dtype
    exact, plain = evaluate(tensors, used, torch.float64), evaluate(tensors, used, dtype)
    assert set(got) == set(exact)
    for name, want in exact.items():
        allowed = 2 * relative(plain[name], want) + 8 * torch.finfo(torch.float32).eps
        if dtype == torch.float64:
            allowed = 1e-12
        error = relative(got[name], want)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
