"""`projected_feature_kd` with projector and norm (Lift), without (WideLast), and on eight pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.functional import Metric, projected_feature_kd
from featkd.losses import pool_channels

from .problem import Normal, Problem, Tensors
from .sizes import Maps, Sizes

_OP = "projected_feature_kd"
_METRICS: tuple[Metric, ...] = ("mse", "spectral")


def problems(sizes: Sizes) -> list[Problem]:
    """Returns the op's problems."""
    found = []
    for maps in sizes.maps:
        found += [_lift(maps, metric) for metric in _METRICS] + [_eight_pairs(maps)]
    # WideLast's last block has the teacher's width, whatever the student's other widths
    widths = {(maps.batch, maps.teacher): maps for maps in sizes.maps}
    return found + [_widelast(m, metric) for m in widths.values() for metric in _METRICS]


def _lift(maps: Maps, metric: Metric) -> Problem:
    """Distance of LN(S W^T) from T."""
    grid = maps.grid if metric == "spectral" else None

    def eager(x: Tensors) -> tuple[Tensor, ...]:
        y = F.linear(x["student"], x["weight"])
        y = F.layer_norm(y, (maps.teacher,), x["norm_weight"], x["norm_bias"], 1e-5)
        return (distance(y, x["teacher"], metric, maps.grid),)

    def ours(x: Tensors) -> tuple[Tensor, ...]:
        parameters = (x["weight"], None, x["norm_weight"], x["norm_bias"])
        loss = projected_feature_kd(
            x["student"], x["teacher"], *parameters, metric=metric, grid=grid
        )
        return (loss,)

    return Problem(
        op=_OP,
        form=f"{metric}-lift",
        shape=str(maps),
        batch=maps.batch,
        differentiable=LIFT_PARAMETERS,
        multiply_adds=maps.multiply_adds,
        tensors=lambda normal: lift_tensors(maps, normal),
        eager=eager,
        featkd=ours,
    )


def _widelast(maps: Maps, metric: Metric) -> Problem:
    """Distance of two equally wide maps."""
    grid = maps.grid if metric == "spectral" else None
    shape = (maps.batch, maps.tokens, maps.teacher)

    def ours(x: Tensors) -> tuple[Tensor, ...]:
        return (projected_feature_kd(x["student"], x["teacher"], metric=metric, grid=grid),)

    return Problem(
        op=_OP,
        form=f"{metric}-widelast",
        shape=str(Maps(maps.batch, maps.grid, maps.teacher, maps.teacher)),
        batch=maps.batch,
        differentiable=("student",),
        multiply_adds=0,
        tensors=lambda normal: {"student": normal(*shape), "teacher": normal(*shape)},
        eager=lambda x: (distance(x["student"], x["teacher"], metric, maps.grid),),
        featkd=ours,
    )


def _eight_pairs(maps: Maps) -> Problem:
    """Mean spectral distance over eight layer pairs, the teacher average-pooled to the student's
    width (SpectralKD on an unmodified student, [EM26])."""

    def tensors(normal: Normal) -> Tensors:
        drawn = {f"student{i}": normal(maps.batch, maps.tokens, maps.student) for i in range(8)}
        for i in range(8):
            drawn[f"teacher{i}"] = normal(maps.batch, maps.tokens, maps.teacher)
        return drawn

    def eager(x: Tensors) -> tuple[Tensor, ...]:
        terms = []
        for i in range(8):
            teacher = F.adaptive_avg_pool1d(x[f"teacher{i}"], maps.student)
            terms.append(distance(x[f"student{i}"], teacher, "spectral", maps.grid))
        return (torch.stack(terms).mean(),)

    def ours(x: Tensors) -> tuple[Tensor, ...]:
        terms = []
        for i in range(8):
            student, teacher = pool_channels(x[f"student{i}"], x[f"teacher{i}"])
            terms.append(projected_feature_kd(student, teacher, metric="spectral", grid=maps.grid))
        return (torch.stack(terms).mean(),)

    return Problem(
        op=_OP,
        form="spectral-8pairs",
        shape=str(maps),
        batch=maps.batch,
        differentiable=tuple(f"student{i}" for i in range(8)),
        multiply_adds=0,
        tensors=tensors,
        eager=eager,
        featkd=ours,
    )


LIFT_PARAMETERS = ("student", "weight", "norm_weight", "norm_bias")


def lift_tensors(maps: Maps, normal: Normal) -> Tensors:
    """Draws two maps, a projector whose output has unit variance, and LayerNorm parameters."""
    return {
        "student": normal(maps.batch, maps.tokens, maps.student),
        "teacher": normal(maps.batch, maps.tokens, maps.teacher),
        "weight": normal(maps.teacher, maps.student, scale=maps.student**-0.5),
        "norm_weight": normal(maps.teacher, scale=0.1, mean=1),
        "norm_bias": normal(maps.teacher, scale=0.1),
    }


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
