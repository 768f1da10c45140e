"""lift_head on CPU tensors: row chunks, of which no product with W outlives its chunk.

W_c is W less its mean over the output channels: LN(f W^T) = LN(f W_c^T), whose rows have mean 0, so
that their norms alone give rstd, and sums over the tokens commute with the product. Equations as
in `featkd.kernels.lift_head`; with G = W_c^T W_c and g, m the gradient gamma dpooled / N and its
mean(g x_hat), the pooled map's part of the backward pass is square in the student's channels:

    df = rstd W_c^T g - rstd^2 m G f        dW_c = sum g (rstd f)^T - W_c sum rstd^2 m f f^T
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from featkd.cpu.chunks import row_chunks
from featkd.cpu.projected_feature_kd import ROWS, sweep
from featkd.reference import accumulation_dtype


class Forward(NamedTuple):
    """The outcome of `forward`; gradients that are not needed are empty."""

    pooled: Tensor  # (B, Ct): the mean of x_hat over each image's tokens
    means: Tensor  # (B, Cs): that of rstd f
    rstd: Tensor  # (B, N)
    energy: Tensor  # sum(E H), 0 without a teacher
    d_features: Tensor  # (B, N, Cs), of energy / 2
    d_parameters: Tensor  # dW, dgamma, dbeta of energy / 2, flat; empty without a teacher


def forward(
    features: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    teacher: Tensor | None,
    *,
    eps: float,
    width: int,
    compute: torch.dtype,
    need_features: bool,
    need_parameters: bool,
) -> Forward:
    """One pass over the rows: what the pooled map is made of, the loss, the loss's gradients.

    Arguments as in `featkd.cpu.projected_feature_kd.sweep`.
    """
    dtype = accumulation_dtype(features.dtype)
    batch, tokens, channels = features.shape
    rstd = torch.empty(batch, tokens, dtype=dtype)
    means = torch.zeros(batch, channels, dtype=dtype)

    def observe(images: slice, part: slice, rows: Tensor, scales: Tensor) -> None:
        place = rstd[images, part]
        place.copy_(scales.view_as(place))
        rows = rows.view(*place.shape, channels)
        means[images] += torch.bmm(place.unsqueeze(1), rows).squeeze(1)

    centred = centre(weight, compute, dtype)
    if teacher is not None:
        energy, d_features, d_parameters = sweep(
            *(features, teacher, weight, None, gamma, beta),
            eps=eps,
            width=width,
            compute=compute,
            need_student=need_features,
            need_parameters=need_parameters,
            observe=observe,
        )
    else:
        energy = torch.zeros((), dtype=dtype)
        d_features, d_parameters = features.new_empty(0), energy.new_empty(0)
        for images, part in row_chunks(batch, tokens, ROWS):
            rows = features[images, part].to(compute).to(dtype).reshape(-1, channels).contiguous()
            norms = torch.linalg.vector_norm(rows @ centred.t(), dim=1)
            observe(images, part, rows, norms.square_().div_(len(weight)).add_(eps).rsqrt_())
    means /= tokens
    return Forward(means @ centred.t(), means, rstd, energy, d_features, d_parameters)


def centre(weight: Tensor, compute: torch.dtype, dtype: torch.dtype) -> Tensor:
    """W_c of W as the products see it."""
    exact = weight.detach().to(compute).to(dtype)
    return exact - exact.mean(0)


def backward(
    features: Tensor,
    weight: Tensor,
    gamma: Tensor,
    rstd: Tensor,
    means: Tensor,
    d_pooled: Tensor | None,
    d_loss: Tensor | None,
    d_features: Tensor,
    d_parameters: Tensor,
    *,
    compute: torch.dtype,
    need_features: bool,
    need_parameters: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of both outputs.

    Args:
        rstd, means, d_features, d_parameters: as `forward` left them.
        d_pooled: (B, Ct), or None.
        d_loss: of energy / 2, a scalar, or None.

    Returns:
        df in the features' dtype, or empty; dW, dgamma and dbeta, or none of them.
    """
    sums: list[Tensor] = []
    if need_parameters and d_loss is not None:
        sizes = [weight.numel(), len(weight), len(weight)]
        sums = [x * d_loss for x in torch.split(d_parameters, sizes)]
        sums[0] = sums[0].view(weight.shape)
    if d_pooled is None:
        assert d_loss is not None
        # a scalar would be rounded to a half type, where it may be 0
        scaled = torch.mul(d_features, d_loss.view(1, 1, 1)) if need_features else d_features
        return scaled.to(features.dtype) if need_features else features.new_empty(0), sums
    dtype = rstd.dtype
    batch, tokens, channels = features.shape
    centred = centre(weight, compute, dtype)
    g = d_pooled * (gamma.detach().to(dtype) / tokens)
    g -= g.mean(1, keepdim=True)
    v = g @ centred
    square = centred.t() @ centred
    result = torch.empty(features.shape if need_features else 0, dtype=features.dtype)
    outer = torch.zeros_like(square)
    for images, part in row_chunks(batch, tokens, ROWS):
        f = features[images, part].to(compute).to(dtype).contiguous()
        r = rstd[images, part].unsqueeze(2)
        # rstd^2 m, with m = rstd f.v / Ct
        weights = torch.bmm(f, v[images].unsqueeze(2)).mul_(r.pow(3)).div_(len(weight))
        rows = f.reshape(-1, channels)
        if need_features:
            df = (rows @ square).view_as(f).mul_(-weights)
            df.addcmul_(r, v[images].unsqueeze(1))
            if d_loss is not None:
                df.addcmul_(d_features[images, part].to(dtype), d_loss)
            result[images, part] = df
        if need_parameters:
            outer.addmm_((f * weights).view_as(rows).t(), rows)
    if not need_parameters:
        return result, []
    d_weight = torch.mm(g.t(), means * tokens).addmm_(centred, outer, alpha=-1)
    d_gamma = (d_pooled * (means @ centred.t())).sum(0)
    pooled = [d_weight, d_gamma, d_pooled.sum(0)]
    return result, [x.add_(y) for x, y in zip(pooled, sums, strict=True)] if sums else pooled
