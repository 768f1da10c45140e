"""`projected_feature_kd` with projector and norm (Lift), without (WideLast), and on eight pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.functional import Metric, projected_feature_kd
from featkd.losses import pool_channels

from .problem import Normal, Problem, Tensors
from .sizes import Maps, Sizes

_OP = "projected_feature_kd"
_METRICS: tuple[Metric, ...] = ("mse", "spectral")
LIFT_PARAMETERS = ("student", "weight", "norm_weight", "norm_bias")


def problems(sizes: Sizes) -> list[Problem]:
    """Returns the op's problems."""
    found = []
    for maps in sizes.maps:
        found += [_lift(maps, metric) for metric in _METRICS] + [_eight_pairs(maps)]
    # WideLast's last block has the teacher's width, whatever the student's other widths
    widths = {(m.batch, m.teacher): Maps(m.batch, m.grid, m.teacher, m.teacher) for m in sizes.maps}
    return found + [_widelast(maps, metric) for maps in widths.values() for metric in _METRICS]


def _lift(maps: Maps, metric: Metric) -> Problem:
    """Distance of LN(S W^T) from T."""

    def ours(x: Tensors) -> tuple[Tensor, ...]:
        parameters = (x["weight"], None, x["norm_weight"], x["norm_bias"])
        return (
            projected_feature_kd(
                x["student"], x["teacher"], *parameters, metric=metric, grid=maps.grid
            ),
        )

    return Problem(
        _OP,
        f"{metric}-lift",
        str(maps),
        differentiable=LIFT_PARAMETERS,
        multiply_adds=maps.multiply_adds,
        tensors=lambda normal: lift_tensors(maps, normal),
        eager=lambda x: (distance(projected(x), x["teacher"], metric, maps.grid),),
        featkd=ours,
    )


def _widelast(maps: Maps, metric: Metric) -> Problem:
    """Distance of two equally wide maps."""
    shape = (maps.batch, maps.tokens, maps.teacher)

    def ours(x: Tensors) -> tuple[Tensor, ...]:
        return (projected_feature_kd(x["student"], x["teacher"], metric=metric, grid=maps.grid),)

    return Problem(
        _OP,
        f"{metric}-widelast",
        str(maps),
        differentiable=("student",),
        tensors=lambda normal: {"student": normal(*shape), "teacher": normal(*shape)},
        eager=lambda x: (distance(x["student"], x["teacher"], metric, maps.grid),),
        featkd=ours,
    )


def _eight_pairs(maps: Maps) -> Problem:
    """Mean spectral distance over eight layer pairs, the teacher average-pooled to the student's
    width (SpectralKD on an unmodified student, [EM26])."""
    students, teachers = ([f"{name}{i}" for i in range(8)] for name in ("student", "teacher"))

    def tensors(normal: Normal) -> Tensors:
        widths = dict.fromkeys(students, maps.student) | dict.fromkeys(teachers, maps.teacher)
        return {name: normal(maps.batch, maps.tokens, width) for name, width in widths.items()}

    def mean(x: Tensors, term: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        terms = [term(x[s], x[t]) for s, t in zip(students, teachers, strict=True)]
        return (torch.stack(terms).mean(),)

    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        return distance(
            student, F.adaptive_avg_pool1d(teacher, maps.student), "spectral", maps.grid
        )

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        pair = pool_channels(student, teacher)
        return projected_feature_kd(*pair, metric="spectral", grid=maps.grid)

    return Problem(
        _OP,
        "spectral-8pairs",
        str(maps),
        differentiable=tuple(students),
        tensors=tensors,
        eager=lambda x: mean(x, plain),
        featkd=lambda x: mean(x, ours),
    )


def lift_tensors(maps: Maps, normal: Normal) -> Tensors:
    """Draws two maps, a projector whose output has unit variance, and LayerNorm parameters."""
    return {
        "student": normal(maps.batch, maps.tokens, maps.student),
        "teacher": normal(maps.batch, maps.tokens, maps.teacher),
        "weight": normal(maps.teacher, maps.student, scale=maps.student**-0.5),
        "norm_weight": normal(maps.teacher, scale=0.1, mean=1),
        "norm_bias": normal(maps.teacher, scale=0.1),
    }


def projected(x: Tensors) -> Tensor:
    """Computes LN(S W^T) in plain torch."""
    y = F.linear(x["student"], x["weight"])
    return F.layer_norm(y, y.shape[-1:], x["norm_weight"], x["norm_bias"], 1e-5)


def distance(y: Tensor, teacher: Tensor, metric: Metric, grid: tuple[int, int]) -> Tensor:
    """Computes the feature distance in plain torch, written for speed.

    `F.mse_loss` is faster than (y - t).square().mean(), and one FFT of the difference than two of
    the maps: both make the comparison harder for featkd.
    """
    if metric == "mse":
        return F.mse_loss(y, teacher)
    difference = (y - teacher).transpose(1, 2)
    difference = difference.reshape(*difference.shape[:2], *grid)
    # neither the CPU's FFT nor, on a 14 x 14 grid, cuFFT takes half precision
    wide = difference if difference.dtype == torch.float64 else difference.float()
    spectrum = torch.fft.rfft2(wide, norm="ortho")
    return torch.view_as_real(spectrum).square().mean()
