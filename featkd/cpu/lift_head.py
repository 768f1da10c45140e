"""lift_head on CPU tensors: chunks of rows, each in the cache from its product to its gradient.

W_c is W less its mean over the output channels: LN(f W^T) = LN(f W_c^T), whose rows have mean 0, so
that their norms alone give rstd, and sums over the tokens commute with the product. Equations as
in `featkd.kernels.lift_head`.

With a teacher the upstream gradients of the loss and of the pooled map meet in dz, and one sweep
takes it to df and dW; the product f W^T is kept for it where that is of the features' dtype, as
forming it again would be a quarter of the whole, and else formed again. Without a teacher, with
G = W_c^T W_c and g, m the gradient gamma dpooled / N and its mean(g x_hat), the backward pass is
square in the student's channels:

    df = rstd W_c^T g - rstd^2 m G f        dW_c = sum g (rstd f)^T - W_c sum rstd^2 m f f^T
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from featkd.cpu.chunks import (
    TeacherMap,
    add_product,
    keeps_product,
    product_dtype,
    put_product,
    row_chunks,
)
from featkd.cpu.rows import distance
from featkd.reference import accumulation_dtype

# of a chunk: eight images of 14 x 14 patches, and sixteen where they are multiplied in bf16, in
# which a product takes less time than its call. Sums over tokens, a product a chunk, lose digits in
# longer ones
_ROWS = 1568


def _rows(products: torch.dtype) -> int:
    return 2 * _ROWS if products == torch.bfloat16 else _ROWS


class Forward(NamedTuple):
    """The outcome of `forward`."""

    pooled: Tensor  # (B, Ct): the mean of x_hat over each image's tokens
    means: Tensor  # (B, Cs): that of rstd f
    rstd: Tensor  # (B, N)
    energy: Tensor  # sum(E H), 0 without a teacher
    product: Tensor  # f W^T (B, N, Ct) for `backward_with_loss`, or empty


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
    need_gradient: bool,
    right: Tensor | None = None,
) -> Forward:
    """One pass over the rows: what the pooled map is made of, and the loss.

    Args:
        features, teacher: (B, N, Cs), and (B, N, Ct) or None, any strides.
        weight, gamma, beta: (Ct, Cs), (Ct,), (Ct,).
        width: columns of the patch grid for the spectral metric, 0 for the mse.
        compute: type to which the product's operands are rounded (autocast).
        need_gradient: whether a backward pass may come.
        right: (B, Ct, k) where the teacher's map comes in factors, and `teacher` is (B, N, k).
    """
    dtype = accumulation_dtype(features.dtype)
    batch, tokens, channels = features.shape
    rstd = torch.empty(batch, tokens, dtype=dtype)
    means = torch.zeros(batch, channels, dtype=dtype)
    total = torch.zeros((), dtype=torch.float64)
    keep = teacher is not None and need_gradient and keeps_product(features)
    shape = (batch, tokens, len(weight)) if keep else 0
    product = torch.empty(shape, dtype=features.dtype if keep else dtype)
    exact = weight.detach().to(compute).to(dtype).contiguous()
    centred = exact - exact.mean(0)
    used = centred if teacher is None else exact
    norm = (gamma.detach().to(dtype).contiguous(), beta.detach().to(dtype).contiguous())
    buffer: Tensor | None = None
    targets = None if teacher is None else TeacherMap(teacher, right, dtype)
    products = product_dtype(features)
    factor = used.to(products).t()
    for at in row_chunks(batch, tokens, _rows(products), width or 1):
        rows = features[at].to(compute).to(products).contiguous()
        scales = rstd[at]
        flat = rows.view(-1, channels)
        if keep:
            place = product[at].view(len(flat), -1)
        else:  # the first chunk is the largest
            if buffer is None:
                buffer = torch.empty(len(flat), len(weight), dtype=products)
            place = buffer[: len(flat)]
        p = torch.mm(flat, factor, out=place).view(*scales.shape, -1)
        given = None if targets is None else targets[at]
        rest = (None, None, None, scales, total, None, None, None)
        distance(p, given, None, *norm, eps, width if given is not None else 0, *rest)
        means[at[0]] += torch.bmm(scales.unsqueeze(1), rows.to(dtype)).squeeze(1)
    means /= tokens
    return Forward(means @ centred.t(), means, rstd, total.to(dtype), product)


def backward_with_loss(
    features: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    teacher: Tensor,
    product: Tensor,
    d_pooled: Tensor | None,
    d_loss: Tensor | None,
    *,
    eps: float,
    width: int,
    compute: torch.dtype,
    need_features: bool,
    need_parameters: bool,
    right: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of both outputs, where there is a teacher.

    Args:
        teacher, right: as in `forward`.
        product: as `forward` left it.
        d_pooled: (B, Ct) contiguous, or None.
        d_loss: of energy / 2, a scalar, or None.

    Returns:
        df in the features' dtype, or empty; dW, dgamma and dbeta, or none of them.
    """
    dtype = accumulation_dtype(features.dtype)
    batch, tokens, channels = features.shape
    w = weight.detach().to(compute).to(dtype).contiguous()
    vectors = (None, gamma.detach().to(dtype).contiguous(), beta.detach().to(dtype).contiguous())
    sums = [torch.zeros(p.shape, dtype=dtype) for p in (w, gamma, beta) if need_parameters]
    d_weight = sums[0] if need_parameters else None
    others = (None, *sums[1:]) if need_parameters else (None, None, None)
    result = torch.empty(features.shape if need_features else 0, dtype=features.dtype)
    added = None if d_pooled is None else d_pooled / tokens
    scale = None if d_loss is None else d_loss.to(dtype)
    width = 0 if d_loss is None else width
    products = product_dtype(features)
    factor = w.to(products)
    buffer: Tensor | None = None
    targets = TeacherMap(teacher, right, dtype)
    for at in row_chunks(batch, tokens, _rows(products), width or 1):
        target = None if scale is None else targets[at]
        f = features[at].to(compute).to(products).reshape(-1, channels).contiguous()
        if buffer is None:  # the first chunk is the largest
            buffer = torch.empty(len(f), len(w), dtype=products)
        slope = buffer[: len(f)]
        p = product[at] if product.numel() else torch.mm(f, factor.t(), out=slope)
        dz = None if added is None else added[at[0]]
        shape = (*features[at].shape[:2], len(w))
        rest = (scale, dz, slope.view(shape), None, None, *others)
        distance(p.view(shape), target, *vectors, eps, width, *rest)
        if d_weight is not None:
            add_product(d_weight, slope.t(), f)
        if need_features:
            put_product(slope, factor, result[at].view(f.shape))
    return result, sums


def backward(
    features: Tensor,
    weight: Tensor,
    gamma: Tensor,
    rstd: Tensor,
    means: Tensor,
    d_pooled: Tensor,
    *,
    compute: torch.dtype,
    need_features: bool,
    need_parameters: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of the pooled map, where there is no teacher.

    Args:
        rstd, means: as `forward` left them.
        d_pooled: (B, Ct) contiguous.

    Returns:
        df in the features' dtype, or empty; dW, dgamma and dbeta, or none of them.
    """
    dtype = rstd.dtype
    batch, tokens, channels = features.shape
    exact = weight.detach().to(compute).to(dtype)
    centred = exact - exact.mean(0)
    g = d_pooled * (gamma.detach().to(dtype) / tokens)
    g -= g.mean(1, keepdim=True)
    v = g @ centred
    square = centred.t() @ centred
    result = torch.empty(features.shape if need_features else 0, dtype=features.dtype)
    outer = torch.zeros_like(square)
    products = product_dtype(features)
    factor, slopes = square.to(products), v.to(products)
    for images, part in row_chunks(batch, tokens, _rows(products)):
        f = features[images, part].to(compute).to(products).contiguous()
        r = rstd[images, part].unsqueeze(2)
        # rstd^2 m, with m = rstd f.v / Ct
        product = torch.bmm(f, slopes[images].unsqueeze(2)).to(dtype)
        weights = product.mul_(r.pow(3)).div_(len(weight))
        rows = f.reshape(-1, channels)
        if need_features:
            df = (rows @ factor).view_as(f).to(dtype).mul_(-weights)
            df.addcmul_(r, v[images].unsqueeze(1))
            result[images, part] = df
        if need_parameters:
            add_product(outer, (f * weights).to(products).view_as(rows).t(), rows)
    if not need_parameters:
        return result, []
    d_weight = torch.mm(g.t(), means * tokens).addmm_(centred, outer, alpha=-1)
    d_gamma = (d_pooled * (means @ centred.t())).sum(0)
    return result, [d_weight, d_gamma, d_pooled.sum(0)]
