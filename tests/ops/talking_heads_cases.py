"""Test problems for talking_heads_attention, with references."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.ops.comparing import relative

NAMES = ("q", "k", "v", "pre_weight", "pre_bias", "post_weight", "post_bias")


@dataclass(frozen=True)
class Problem:
    """Sizes. Queries, keys and values are views of one tensor, as in timm."""

    batch: int
    heads: int
    tokens: int
    dim: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads}x{self.tokens}x{self.dim}"

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """Arguments by name."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        heads = self.heads
        qkv = normal(self.batch, self.tokens, 3, heads, self.dim).to(dtype)
        tensors = qkv.permute(2, 0, 3, 1, 4).unbind()
        mixes = [normal(heads, heads) / heads**0.5 + torch.eye(heads) for _ in range(2)]
        biases = [0.3 * normal(heads) for _ in range(2)]
        parameters = (x.to(dtype) for x in (mixes[0], biases[0], mixes[1], biases[1]))
        return dict(zip(NAMES, (*tensors, *parameters), strict=True))


def as_timm(x: dict[str, Tensor], scale: float) -> Tensor:
    """The operations of timm's TalkingHeadAttn between qkv and proj, in the tensors' dtype."""
    scores = (x["q"] * scale) @ x["k"].transpose(-2, -1)
    mixed = linear(scores.permute(0, 2, 3, 1), x["pre_weight"], x["pre_bias"])
    shares = mixed.permute(0, 3, 1, 2).softmax(-1)
    mixed = linear(shares.permute(0, 2, 3, 1), x["post_weight"], x["post_bias"])
    return mixed.permute(0, 3, 1, 2) @ x["v"]


def exact(x: dict[str, Tensor], scale: float) -> Tensor:
    return as_timm({name: value.double() for name, value in x.items()}, scale)


def assert_as_exact_as_eager(got: Tensor, x: dict[str, Tensor], scale: float) -> None:
    """Checks that the error against float64 is at most twice that of timm's operations."""
    want, eager = exact(x, scale), as_timm(x, scale)
    assert got.dtype == x["q"].dtype
    tiny = 1e-14 if got.dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
    allowed = 2 * relative(eager, want) + tiny
    error = relative(got, want)
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
