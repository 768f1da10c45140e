"""The feature losses' kernels where the teacher's map comes in two factors.

cuBLAS restores the map of a chunk of images, the kernels take it from L2, and the next chunk's is
written over it: no map of all images exists. A tile of rows crosses images, each with a right
factor of its own, so that a product inside of the kernels would have to be cut at image borders.
Restored in the accumulators' dtype: a product in float16 overflows at massive activations.
Gradients of parameters are summed over the chunks in that dtype and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from featkd.kernels import lift_head, projected_feature_kd
from featkd.reference import accumulation_dtype

# of a chunk: 83 images of 14 x 14 patches by 384 channels are 24 MiB in float32, half of an H100's
# L2. Not measured.
_ROWS = 1 << 14


def _chunks(left: Tensor, right: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the images, and their restored maps, good until the next ones."""
    batch, tokens, _ = left.shape
    images = max(1, min(batch, _ROWS // tokens))
    place = left.new_empty(images, tokens, right.shape[1], dtype=dtype)
    for first in range(0, batch, images):
        at = slice(first, first + images)
        factors = left[at].to(dtype), right[at].to(dtype).mT
        yield at, torch.bmm(*factors, out=place[: len(factors[0])])


def projected_forward(
    student: Tensor,
    left: Tensor,
    right: Tensor,
    parameters: projected_feature_kd.Parameters,
    *,
    eps: float,
    width: int,
    compute: torch.dtype,
    need_student: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`projected_feature_kd.forward` with the teacher as left (B, N, k) and right (B, Ct, k)."""
    totals, gradients, statistics = [], [], []
    for images, teacher in _chunks(left, right, accumulation_dtype(student.dtype)):
        total, gradient, kept = projected_feature_kd.forward(
            *(student[images], teacher, parameters),
            eps=eps,
            width=width,
            compute=compute,
            need_student=need_student,
            need_parameters=need_parameters,
        )
        totals.append(total)
        gradients.append(gradient)
        statistics.append(kept)
    return torch.stack(totals).sum(), _joined(gradients), _joined(statistics)


def projected_backward(
    student: Tensor,
    left: Tensor,
    right: Tensor,
    parameters: projected_feature_kd.Parameters,
    statistics: Tensor | None,
    factor: Tensor,
    *,
    width: int,
    compute: torch.dtype,
) -> list[Tensor | None]:
    """`projected_feature_kd.backward` with the teacher in its factors."""
    tokens = student.shape[1]
    sums: list[Tensor | None] = [None] * len(parameters)
    for images, teacher in _chunks(left, right, accumulation_dtype(student.dtype)):
        rows = slice(images.start * tokens, images.stop * tokens)
        gradients = projected_feature_kd.backward(
            *(student[images], teacher, parameters),
            None if statistics is None else statistics[rows],
            factor,
            width=width,
            compute=compute,
            exact=True,
        )
        sums = [
            g if s is None or g is None else s + g for s, g in zip(sums, gradients, strict=True)
        ]
    return [
        None if s is None or p is None else s.to(p.dtype)
        for s, p in zip(sums, parameters, strict=True)
    ]


def lift_forward(
    features: Tensor,
    head: lift_head.Head,
    left: Tensor,
    right: Tensor,
    *,
    eps: float,
    width: int,
    compute: torch.dtype,
    need_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`lift_head.forward` with the teacher as left (B, N, k) and right (B, Ct, k)."""
    pooled, totals, statistics = [], [], []
    for images, teacher in _chunks(left, right, accumulation_dtype(features.dtype)):
        mean, total, kept = lift_head.forward(
            *(features[images], head, teacher),
            eps=eps,
            width=width,
            compute=compute,
            need_statistics=need_statistics,
        )
        assert total is not None
        pooled.append(mean)
        totals.append(total)
        statistics.append(kept)
    return torch.cat(pooled), torch.stack(totals).sum(), _joined(statistics)


def lift_backward(
    features: Tensor,
    head: lift_head.Head,
    left: Tensor,
    right: Tensor,
    statistics: Tensor,
    d_loss: Tensor,
    d_pooled: Tensor | None,
    *,
    width: int,
    compute: torch.dtype,
    need_features: bool,
    need_parameters: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """`lift_head.backward` with the teacher in its factors."""
    tokens = features.shape[1]
    gradients, sums = [], []
    for images, teacher in _chunks(left, right, accumulation_dtype(features.dtype)):
        gradient, parts = lift_head.backward(
            *(features[images], head, teacher),
            statistics[images.start * tokens : images.stop * tokens],
            d_loss,
            None if d_pooled is None else d_pooled[images],
            width=width,
            compute=compute,
            need_features=need_features,
            need_parameters=need_parameters,
            exact=True,
        )
        gradients.append(gradient)
        sums = [s + p for s, p in zip(sums, parts, strict=True)] if sums else parts
    return _joined(gradients), [s.to(p.dtype) for s, p in zip(sums, head, strict=need_parameters)]


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    there = [x for x in parts if x is not None]
    if len(there) < 2:
        return there[0] if there else None
    return torch.cat(there)
