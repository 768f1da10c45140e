"""projected_feature_kd on CPU tensors: loss and all gradients from one sweep over the images.

A chunk of a few hundred rows stays in the cache from its projection to its gradients, and no
tensor of all rows by Ct channels exists. Equations as in `featkd.reference`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featkd.cpu.chunks import row_chunks
from featkd.reference import accumulation_dtype

# of a chunk: four images of 14 x 14 patches. Loss and gradients of (32, 196, 192) -> 384 took 30.0,
# 24.9, 22.7, 22.7, 27.0 ms with 196, 392, 784, 1568, 3136 (two AVX2 cores of 512 KiB L2 each)
ROWS = 784


def sweep(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float,
    width: int,
    compute: torch.dtype,
    need_student: bool,
    need_parameters: bool,
    observe: Callable[[slice, slice, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the rows.

    Args:
        student, teacher: (B, N, Cs) and (B, N, Ct), any strides.
        weight, bias, norm_weight, norm_bias: (Ct, Cs), (Ct,), (Ct,), (Ct,), or None.
        width: columns of the patch grid for the spectral metric, 0 for the mse.
        compute: type to which the projection's operands are rounded (autocast).
        need_student, need_parameters: which gradients to form; those not needed are empty.
        observe: called with each chunk's slices of images and tokens, its rows of the student, and
            the norm's 1 / standard deviation of each; only with a norm.

    Returns:
        sum(E H), and gradients of half of it: the student's (B, N, Cs) and the parameters', flat,
        one after another in the order of the arguments. H is E, or E with its row sums.
    """
    dtype = accumulation_dtype(student.dtype)

    def exact(x: Tensor) -> Tensor:
        return x.to(compute).to(dtype)

    w = None if weight is None else exact(weight.detach()).contiguous()
    b, gamma, beta = (
        p if p is None else p.detach().to(dtype) for p in (bias, norm_weight, norm_bias)
    )
    channels = teacher.shape[2]
    present = [p for p in (w, b, gamma, beta) if p is not None]
    flat = torch.zeros(sum(p.numel() for p in present) if need_parameters else 0, dtype=dtype)
    parts = iter(torch.split(flat, [p.numel() for p in present]) if need_parameters else ())
    d_weight, d_bias, d_gamma, d_beta = (
        next(parts).view(p.shape) if need_parameters and p is not None else None
        for p in (w, b, gamma, beta)
    )
    d_student = torch.empty(student.shape if need_student else 0, dtype=student.dtype)
    total = torch.zeros((), dtype=dtype)
    for images, tokens in row_chunks(student.shape[0], student.shape[1], ROWS, width or 1):
        s = student[images, tokens].reshape(-1, student.shape[2]).contiguous()
        s = s.to(dtype) if w is None else exact(s)
        target = teacher[images, tokens].reshape(-1, channels).contiguous()
        p = s if w is None else s @ w.t() if b is None else torch.addmm(b, s, w.t())
        if gamma is None:
            error = p - target if w is None else p.sub_(target)
        else:
            error, mean, rstd = torch.native_layer_norm(p, (channels,), gamma, beta, eps)
            error.sub_(target)
            if observe is not None:
                observe(images, tokens, s, rstd)
        half = with_row_sums(error, width) if width else error
        total += torch.dot(error.view(-1), half.view(-1))
        if not (need_student or need_parameters):
            continue
        slope = half
        if gamma is not None:
            wanted = [True, d_gamma is not None, d_beta is not None]
            slope, *vectors = torch.ops.aten.native_layer_norm_backward(
                half, p, (channels,), mean, rstd, gamma, beta, wanted
            )
            for kept, more in zip((d_gamma, d_beta), vectors, strict=True):
                if kept is not None:
                    kept += more
        if d_weight is not None:
            d_weight.addmm_(slope.t(), s)
        if d_bias is not None:
            d_bias += slope.sum(0)
        if need_student:
            place = d_student[images, tokens].view(slope.shape[0], -1)
            if w is None or place.dtype != dtype:
                place.copy_(slope if w is None else slope @ w)
            else:
                torch.mm(slope, w, out=place)
    return total, d_student, flat


def difference_gradient(student: Tensor, teacher: Tensor, width: int, factor: Tensor) -> Tensor:
    """The student's gradient where there is neither weight nor norm: factor * H, (B, N, C).

    Formed in the backward pass: S - T costs less than writing it, keeping it and scaling it.
    """
    dtype = accumulation_dtype(student.dtype)
    result = torch.empty(student.shape, dtype=student.dtype)  # contiguous, whatever the maps are
    if not width and student.dtype == teacher.dtype == dtype:
        return torch.sub(student, teacher, out=result).mul_(factor)
    for images, tokens in row_chunks(student.shape[0], student.shape[1], ROWS, width or 1):
        place, s = result[images, tokens], student[images, tokens]
        error = (s.to(dtype) - teacher[images, tokens]).contiguous()
        half = with_row_sums(error.view(-1, s.shape[2]), width) if width else error
        place.copy_(half.view(s.shape).mul_(factor))
    return result


def with_row_sums(error: Tensor, width: int) -> Tensor:
    """H of the spectral metric: e + 1/W sum_w e, and where W is even the alternating sums too."""
    rows = error.view(-1, width, error.shape[1])
    half = rows + rows.sum(1, keepdim=True) / width
    if width % 2 == 0:
        even, odd = (rows[:, start::2].sum(1, keepdim=True) for start in (0, 1))
        alternating = (even - odd) / width
        half[:, 0::2] += alternating
        half[:, 1::2] -= alternating
    return half.view_as(error)
