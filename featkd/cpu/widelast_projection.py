"""widelast_projection on CPU tensors: chunks of rows, and no gradient of all rows by Ct channels.

A chunk stays in the cache from the upstream gradients to its share of dx, dW and the norms'. Its h
is kept from the forward pass in float32 and float64, where forming it again costs a fifth of
eager's time; in half precision, which is computed in float32, it is formed again, and neither
pass holds a tensor of all rows besides its results. r is normalised again from h in both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from featkd.cpu.chunks import row_chunks
from featkd.reference import accumulation_dtype

# of a chunk: four images of 14 x 14 patches. A backward pass of (32, 196, 192) -> 384 took 28.6,
# 27.7, 27.9 ms of one core with 392, 784, 1568 (AVX2, 512 KiB of L2)
_ROWS = 784


class Parameters(NamedTuple):
    """The projector's and both LayerNorms'."""

    weight: Tensor  # (Ct, Cs)
    gamma_p: Tensor  # (Ct,)
    beta_p: Tensor  # (Ct,)
    gamma_1: Tensor  # (Ct,)
    beta_1: Tensor  # (Ct,)


def keeps_product(dtype: torch.dtype) -> bool:
    """Whether `forward` leaves h (M, Ct) to `backward` for inputs of this dtype."""
    return accumulation_dtype(dtype) == dtype


def forward(
    x: Tensor, parameters: Parameters, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r and u, and what `backward` needs.

    Args:
        x: (B, N, Cs), any strides.
        parameters: of any floating dtype.
        eps: epsilon of both norms.

    Returns:
        r and u (B, N, Ct) in x's dtype; mean and 1/std of h and of r, (4, B N), in the
        accumulators' dtype; and h (B N, Ct), empty where `keeps_product` says so.
    """
    batch, tokens, channels = x.shape
    dtype = accumulation_dtype(x.dtype)
    weight, *norms = (p.detach().to(dtype).contiguous() for p in parameters)
    width = weight.shape[0]
    shape = (batch, tokens, width)
    if keeps_product(x.dtype):  # nothing to convert: one call a step, as eager
        h = x.detach().reshape(-1, channels).contiguous() @ weight.t()
        r, u, *moments = _norms(h, norms, eps)
        return r.view(shape), u.view(shape), torch.cat([m.view(1, -1) for m in moments]), h
    statistics = torch.empty(4, batch * tokens, dtype=dtype)
    residual, normed = (torch.empty(shape, dtype=x.dtype) for _ in range(2))
    done = 0
    for at in row_chunks(batch, tokens, _ROWS):
        s = x[at].reshape(-1, channels).to(dtype)
        r, u, *moments = _norms(s @ weight.t(), norms, eps)
        for row, m in zip(statistics, moments, strict=True):
            row[done : done + len(s)] = m.view(-1)
        for place, values in ((residual[at], r), (normed[at], u)):
            place.copy_(values.view(place.shape))
        done += len(s)
    return residual, normed, statistics, torch.empty(0, dtype=dtype)


def _norms(h: Tensor, norms: list[Tensor], eps: float) -> tuple[Tensor, ...]:
    """r, u, and mean and 1/std of h and of r, from (rows, Ct)."""
    gamma_p, beta_p, gamma_1, beta_1 = norms
    shape = gamma_p.shape
    r, *of_h = torch.native_layer_norm(h, shape, gamma_p, beta_p, eps)
    u, *of_r = torch.native_layer_norm(r, shape, gamma_1, beta_1, eps)
    return (r, u, *of_h, *of_r)


def backward(
    x: Tensor,
    parameters: Parameters,
    d_residual: Tensor | None,
    d_normed: Tensor | None,
    statistics: Tensor,
    product: Tensor,
    *,
    eps: float,
    need_input: bool,
    need_parameters: bool,
) -> tuple[Tensor, list[Tensor]]:
    """One sweep over the rows.

    Args:
        x, parameters, eps: as in `forward`.
        d_residual, d_normed: (B, N, Ct), any strides; None where that output was not used.
        statistics, product: as `forward` left them.
        need_input, need_parameters: which gradients to form.

    Returns:
        dx, empty where not needed, and the parameters' in the accumulators' dtype, none where
        not needed.
    """
    batch, tokens, channels = x.shape
    dtype = accumulation_dtype(x.dtype)
    weight, gamma_p, beta_p, gamma_1, beta_1 = (
        p.detach().to(dtype).contiguous() for p in parameters
    )
    shape = gamma_p.shape
    sums = [torch.zeros(p.shape, dtype=dtype) for p in parameters] if need_parameters else []
    d_input = torch.empty(x.shape if need_input else 0, dtype=x.dtype)
    wanted = [True, need_parameters, need_parameters]
    norm_backward = torch.ops.aten.native_layer_norm_backward
    done = 0
    for at in row_chunks(batch, tokens, _ROWS):
        s = x[at].reshape(-1, channels).to(dtype).contiguous()
        here = slice(done, done + len(s))
        done += len(s)
        mean_h, rstd_h, mean_r, rstd_r = (row[here].view(-1, 1) for row in statistics)
        h = product[here] if product.numel() else s @ weight.t()
        slope = None if d_residual is None else d_residual[at].reshape(h.shape).to(dtype)
        if d_normed is not None:
            r = torch.native_layer_norm(h, shape, gamma_p, beta_p, eps)[0]
            du = d_normed[at].reshape(h.shape).to(dtype)
            through, *more = norm_backward(du, r, shape, mean_r, rstd_r, gamma_1, beta_1, wanted)
            slope = through if slope is None else through.add_(slope)
            for total, part in zip(sums[3:], more, strict=False):
                total += part
        assert slope is not None
        slope, *more = norm_backward(slope, h, shape, mean_h, rstd_h, gamma_p, beta_p, wanted)
        for total, part in zip(sums[1:3], more, strict=False):
            total += part
        if need_parameters:
            sums[0].addmm_(slope.t(), s)
        if need_input:
            place = d_input[at].view(s.shape)
            if place.dtype == dtype:
                torch.mm(slope, weight, out=place)
            else:
                place.copy_(slope @ weight)
    return d_input, sums
