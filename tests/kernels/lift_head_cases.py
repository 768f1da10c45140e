"""Problems for lift_head, and a float64 evaluation by autograd to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.functional import lift_head
from tests.kernels.feature_kd_cases import relative


class Inputs(NamedTuple):
    """Of one call and its backward pass; `teacher` may be None."""

    features: Tensor
    weight: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    teacher: Tensor | None
    direction: Tensor  # (B, Ct): the gradient that arrives at the pooled map
    upstream: float  # the gradient that arrives at the loss

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(x.to(dtype) if isinstance(x, Tensor) else x for x in self))


@dataclass(frozen=True)
class Problem:
    """Sizes; `width` 0 is the mse; without a teacher there is no loss."""

    batch: int
    tokens: int
    student: int
    teacher: int
    width: int = 0
    compare: bool = True

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.tokens}x{self.student}to{self.teacher}-w{self.width}"
        return sizes + "-alone" * (not self.compare)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """Both gradients that arrive have the same size at z."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1, mean: float = 0) -> Tensor:
            return (mean + scale * torch.randn(shape, generator=generator)).to(dtype)

        batch, tokens, ct = self.batch, self.tokens, self.teacher
        return Inputs(
            normal(batch, tokens, self.student, mean=0.5),
            normal(ct, self.student, scale=self.student**-0.5, mean=0.1),
            normal(ct, scale=0.3, mean=1),
            normal(ct),
            normal(batch, tokens, ct) if self.compare else None,
            normal(batch, ct),
            float(batch * ct),
        )


# layouts in which a gradient (B, Ct) may arrive at the pooled map: of a loss on its transpose, of a
# sum over images, over channels or over both, and of a slice
UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda d: d.t().contiguous().t(),
    "one image's": lambda d: d[:1].expand(d.shape),
    "one channel's": lambda d: d[:, :1].expand(d.shape),
    "one number": lambda d: d[:1, :1].expand(d.shape),
    "sliced": lambda d: torch.cat((d, d), 1)[:, 1 : d.shape[1] + 1],
}

NAMES = ("pooled", "loss", "features", "weight", "norm_weight", "norm_bias")


def differentiate(leaves: list[Tensor], x: Inputs, pooled: Tensor, loss: Tensor | None):
    """Outputs and gradients by name; `x.direction` arrives as it is laid out."""
    outputs, upstream = [pooled], [x.direction]
    if loss is not None:
        outputs, upstream = [pooled, loss], [x.direction, loss.new_tensor(x.upstream)]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    found = [pooled.detach(), None if loss is None else loss.detach(), *gradients]
    named = zip(NAMES, found, strict=True)
    return {name: value for name, value in named if value is not None}


def run(x: Inputs, width: int) -> dict[str, Tensor]:
    """Outputs and gradients through the public function."""
    leaves = [p.detach().requires_grad_() for p in x[:4]]
    metric = "spectral" if width else "mse"
    grid = (x.features.shape[1] // width, width) if width else None
    return differentiate(leaves, x, *lift_head(*leaves, x.teacher, metric=metric, grid=grid))


def evaluate(x: Inputs, width: int, eps: float = 1e-5) -> dict[str, Tensor]:
    """The same by plain torch and autograd in the inputs' dtype, the spectrum by FFT."""
    leaves = [p.detach().requires_grad_() for p in x[:4]]
    features, weight, gamma, beta = leaves
    z = F.layer_norm(F.linear(features, weight), gamma.shape, gamma, beta, eps)
    loss = None
    if x.teacher is not None:
        error = z - x.teacher
        if width:
            batch, tokens, channels = error.shape
            maps = error.transpose(1, 2).reshape(batch, channels, tokens // width, width)
            wide = maps if maps.dtype == torch.float64 else maps.float()
            error = torch.view_as_real(torch.fft.rfft2(wide, norm="ortho"))
        loss = error.square().mean()
    return differentiate(leaves, x, z.mean(1), loss)


def assert_as_exact_as_eager(
    got: dict[str, Tensor], x: Inputs, width: int, half_loss: float = 1e-5
) -> None:
    """Errors against float64 of at most twice those of plain torch in the same dtype."""
    dtype = x.features.dtype
    exact, eager = evaluate(x.to(torch.float64), width), evaluate(x, width)
    assert set(got) == set(exact)
    for name, want in exact.items():
        if name != "loss":
            assert got[name].dtype == dtype
        allowed = 2 * relative(eager[name], want) + 8 * torch.finfo(torch.float32).eps
        if name == "loss" and dtype in (torch.bfloat16, torch.float16):
            allowed = half_loss  # ours is summed in float32
        if dtype == torch.float64:
            allowed = 1e-12
        error = relative(got[name], want)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
