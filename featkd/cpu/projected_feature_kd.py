"""projected_feature_kd on CPU tensors: loss and all gradients from one sweep over the images.

A chunk of a few hundred rows stays in the cache from its projection to its gradients, and no
tensor of all rows by Ct channels exists. Equations as in `featkd.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featkd.cpu.chunks import TeacherMap, add_product, product_dtype, put_product, row_chunks
from featkd.cpu.rows import distance
from featkd.reference import accumulation_dtype

# of a chunk: eight images of 14 x 14 patches. Loss and gradients of (32, 196, 192) -> 384 took
# 23.5, 21.0, 21.3, 19.2, 18.9, 18.0 ms with 196, 392, 784, 1568, 3136, 6272 (two AVX2 cores, 32 MiB
# of L3)
ROWS = 1568


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
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the rows.

    Args:
        student, teacher: (B, N, Cs) and (B, N, Ct), any strides.
        right: (B, Ct, k) where the teacher's map comes in factors, and `teacher` is (B, N, k).
        weight, bias, norm_weight, norm_bias: (Ct, Cs), (Ct,), (Ct,), (Ct,), or None.
        width: columns of the patch grid for the spectral metric, 0 for the mse.
        compute: type to which the projection's operands are rounded (autocast).
        need_student, need_parameters: which gradients to form; those not needed are empty.

    Returns:
        sum(E H), and gradients of half of it: the student's (B, N, Cs) and the parameters', flat,
        one after another in the order of the arguments. H is E, or E with its row sums.
    """
    dtype = accumulation_dtype(student.dtype)
    w = None if weight is None else weight.detach().to(compute).to(dtype).contiguous()
    vectors = [
        p if p is None else p.detach().to(dtype).contiguous()
        for p in (bias, norm_weight, norm_bias)
    ]
    present = [p for p in (w, *vectors) if p is not None]
    flat = torch.zeros(sum(p.numel() for p in present) if need_parameters else 0, dtype=dtype)
    parts = iter(torch.split(flat, [p.numel() for p in present]) if need_parameters else ())
    sums = [None if p is None else next(parts, None) for p in (w, *vectors)]
    d_student = torch.empty(student.shape if need_student else 0, dtype=student.dtype)
    total = torch.zeros((), dtype=torch.float64)
    if w is None and right is None:
        slope = d_student if need_student else None
        distance(student, teacher, *vectors, eps, width, None, None, slope, None, total, *sums[1:])
        return total.to(dtype), d_student, flat
    targets = TeacherMap(teacher, right, dtype)
    products = product_dtype(student)
    factor = None if w is None else w.to(products)
    projected: Tensor | None = None
    for images, tokens in row_chunks(student.shape[0], student.shape[1], ROWS, width or 1):
        target = targets[images, tokens]
        if factor is None:
            source = student[images, tokens]
            slope = d_student[images, tokens] if need_student else None
            distance(
                source, target, *vectors, eps, width, None, None, slope, None, total, *sums[1:]
            )
            continue
        s = student[images, tokens].reshape(-1, student.shape[2]).to(products).contiguous()
        if projected is None:  # the first chunk is the largest
            projected = torch.empty(len(s), len(factor), dtype=products)
        p = torch.mm(s, factor.t(), out=projected[: len(s)])
        rows = p.view(target.shape)
        slope = rows if need_student or need_parameters else None
        distance(rows, target, *vectors, eps, width, None, None, slope, None, total, *sums[1:])
        if sums[0] is not None:
            add_product(sums[0].view(factor.shape), p.t(), s)
        if need_student:
            put_product(p, factor, d_student[images, tokens].view(s.shape))
    return total.to(dtype), d_student, flat


def difference_gradient(student: Tensor, teacher: Tensor, width: int, factor: Tensor) -> Tensor:
    """The student's gradient where there is neither weight nor norm: factor * H, (B, N, C).

    Formed in the backward pass: S - T costs less than writing it, keeping it and scaling it.
    """
    result = torch.empty(student.shape, dtype=student.dtype)  # contiguous, whatever the maps are
    rest = (None, result, *[None] * 5)
    distance(student, teacher, None, None, None, 0.0, width, factor, *rest)
    return result
