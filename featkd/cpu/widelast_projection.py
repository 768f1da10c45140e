"""widelast_projection on CPU tensors: chunks of rows, and no gradient of all rows by Ct channels.

A chunk stays in the cache from the upstream gradients to its share of dx, dW and the norms'. Its h
is kept from the forward pass where it is multiplied in x's dtype: forming it again costs a fifth of
eager's time. Half precision that is multiplied in float32 forms it again, and neither pass then
holds a tensor of all rows besides its results. r is normalised again from h in both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from featkd.cpu.chunks import add_product, keeps_product, product_dtype, put_product, row_chunks
from featkd.cpu.rows import two_norms, two_norms_backward
from featkd.reference import accumulation_dtype

# of a chunk: eight images of 14 x 14 patches (`featkd.cpu.projected_feature_kd.ROWS`)
_ROWS = 1568


class Parameters(NamedTuple):
    """The projector's and both LayerNorms'."""

    weight: Tensor  # (Ct, Cs)
    gamma_p: Tensor  # (Ct,)
    beta_p: Tensor  # (Ct,)
    gamma_1: Tensor  # (Ct,)
    beta_1: Tensor  # (Ct,)


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
        accumulators' dtype; and h (B N, Ct) in x's dtype, empty unless `keeps_product`.
    """
    batch, tokens, channels = x.shape
    dtype = accumulation_dtype(x.dtype)
    weight, norms = _exact(parameters, dtype)
    shape = (batch, tokens, len(weight))
    residual, normed = (torch.empty(shape, dtype=x.dtype) for _ in range(2))
    statistics = torch.empty(4, batch * tokens, dtype=dtype)
    if keeps_product(x):  # one call a step, as eager
        h = x.detach().reshape(-1, channels).contiguous() @ weight.to(x.dtype).t()
        two_norms(h, norms, eps, residual, normed, statistics)
        return residual, normed, statistics, h
    done = 0
    products = product_dtype(x)
    factor = weight.to(products)
    for at in row_chunks(batch, tokens, _ROWS):
        h = x[at].reshape(-1, channels).to(products) @ factor.t()
        here = slice(done, done + len(h))
        two_norms(h, norms, eps, residual[at], normed[at], statistics[:, here])
        done += len(h)
    return residual, normed, statistics, torch.empty(0, dtype=dtype)


def _exact(parameters: Parameters, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W, and the norms' parameters (4, Ct)."""
    weight, *norms = (p.detach().to(dtype) for p in parameters)
    return weight.contiguous(), torch.stack(norms)


def backward(
    x: Tensor,
    parameters: Parameters,
    d_residual: Tensor | None,
    d_normed: Tensor | None,
    statistics: Tensor,
    product: Tensor,
    *,
    need_input: bool,
    need_parameters: bool,
) -> tuple[Tensor, list[Tensor]]:
    """One sweep over the rows.

    Args:
        x, parameters: as in `forward`.
        d_residual, d_normed: (B, N, Ct), any strides; None where that output was not used.
        statistics, product: as `forward` left them.
        need_input, need_parameters: which gradients to form.

    Returns:
        dx, empty where not needed, and the parameters' in the accumulators' dtype, none where
        not needed.
    """
    batch, tokens, channels = x.shape
    dtype = accumulation_dtype(x.dtype)
    weight, norms = _exact(parameters, dtype)
    d_weight = torch.zeros_like(weight) if need_parameters else None
    sums = torch.zeros_like(norms) if need_parameters else None
    d_input = torch.empty(x.shape if need_input else 0, dtype=x.dtype)
    products = product_dtype(x)
    factor = weight.to(products)
    buffer: Tensor | None = None
    done = 0
    for at in row_chunks(batch, tokens, _ROWS):
        s = x[at].reshape(-1, channels).to(products).contiguous()
        if buffer is None:  # the first chunk is the largest
            buffer = torch.empty(len(s), len(weight), dtype=products)
        d_product = buffer[: len(s)]
        here = slice(done, done + len(s))
        done += len(s)
        h = d_product
        if product.numel():
            h = product[here]
        else:
            torch.mm(s, factor.t(), out=d_product)
        dr, du = (None if d is None else d[at] for d in (d_residual, d_normed))
        two_norms_backward(h, norms, statistics[:, here], dr, du, d_product, sums)
        if d_weight is not None:
            add_product(d_weight, d_product.t(), s)
        if need_input:
            put_product(d_product, factor, d_input[at].view(s.shape))
    if d_weight is None or sums is None:
        return d_input, []
    return d_input, [d_weight, *(x.clone() for x in sums)]  # an op's outputs may not share memory
