"""Problems for projected_feature_kd, and a float64 evaluation by autograd to compare with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("loss", "student", "weight", "bias", "norm_weight", "norm_bias")


@dataclass(frozen=True)
class Problem:
    """Sizes and which of the parameters there are; `width` 0 is the mse."""

    batch: int
    tokens: int
    student: int
    teacher: int
    width: int = 0
    projector: bool = True
    bias: bool = False
    norm: str = "both"  # none, weight, both

    def __str__(self) -> str:
        parts = [f"{self.batch}x{self.tokens}x{self.student}to{self.teacher}", f"w{self.width}"]
        parts += [self.norm, *["plain"] * (not self.projector), *["bias"] * self.bias]
        return "-".join(parts)

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> list[Tensor | None]:
        """Student, teacher, weight, bias, norm_weight, norm_bias."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1, mean: float = 0) -> Tensor:
            return (mean + scale * torch.randn(shape, generator=generator)).to(dtype)

        ct = self.teacher
        return [
            normal(self.batch, self.tokens, self.student),
            normal(self.batch, self.tokens, ct),
            normal(ct, self.student, scale=self.student**-0.5) if self.projector else None,
            normal(ct) if self.bias else None,
            normal(ct, scale=0.1, mean=1) if self.norm != "none" else None,
            normal(ct) if self.norm == "both" else None,
        ]


def evaluate(
    tensors: list[Tensor | None], width: int, dtype: torch.dtype, eps: float = 1e-5
) -> dict[str, Tensor]:
    """The loss and its gradients by plain torch and autograd in `dtype`, the spectrum by FFT."""
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
    student, teacher, weight, bias, gamma, beta = leaves
    output = student if weight is None else F.linear(student, weight, bias)
    if gamma is not None:
        output = F.layer_norm(output, gamma.shape, gamma, beta, eps)
    error = output - teacher.detach()
    if width:
        batch, tokens, channels = error.shape
        maps = error.transpose(1, 2).reshape(batch, channels, tokens // width, width)
        wide = maps.double() if dtype == torch.float64 else maps.float()
        spectrum = torch.view_as_real(torch.fft.rfft2(wide, norm="ortho"))
        loss = spectrum.square().mean()
    else:
        loss = error.square().mean()
    named = dict(zip(NAMES[1:], [student, *leaves[2:]], strict=True))
    there = {name: x for name, x in named.items() if x is not None}
    gradients = torch.autograd.grad(loss, list(there.values()))
    return {"loss": loss.detach(), **dict(zip(there, gradients, strict=True))}


def relative(got: Tensor, want: Tensor) -> float:
    """Relative L2 error."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def assert_as_exact_as_eager(
    got: dict[str, Tensor], tensors: list[Tensor | None], width: int, half_loss: float = 1e-5
) -> None:
    """Errors against float64 of at most twice those of plain torch in the same dtype."""
    dtype = tensors[0].dtype
    exact = evaluate(tensors, width, torch.float64)
    eager = evaluate(tensors, width, dtype)
    assert set(got) == set(exact)
    for name, want in exact.items():
        allowed = 2 * relative(eager[name], want) + 8 * torch.finfo(torch.float32).eps
        if name == "loss" and dtype in (torch.bfloat16, torch.float16):
            allowed = half_loss  # ours is summed in float32
        if dtype == torch.float64:
            allowed = 1e-12
        error = relative(got[name], want)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
