"""projected_feature_kd: with Lift's projector and norm, without (WideLast), over eight pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.functional import Metric, projected_feature_kd
from featkd.losses import pool_channels

from . import sizes
from .problem import Maps, Normal, Problem, Tensors

_OP = "projected_feature_kd"
_METRICS: tuple[Metric, ...] = ("mse", "spectral")


def problems(shapes: str) -> list[Problem]:
    """The op's problems of a set of sizes."""
    found = []
    for maps in sizes.MAPS[shapes]:
        found += [_lift(maps, metric) for metric in _METRICS] + [_eight_pairs(maps)]
    # one for all students of a teacher: there the student has the teacher's width
    widths = {(maps.batch, maps.teacher): maps for maps in sizes.MAPS[shapes]}
    return found + [_widelast(m, metric) for m in widths.values() for metric in _METRICS]


def _lift(maps: Maps, metric: Metric) -> Problem:
    """mean((LN(S W^T) - T)^2), or its spectral form."""
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
    """mean((S - T)^2) of equally wide maps, or its spectral form."""
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
    """SpectralKD's eight layer pairs on an unchanged student.

    The teacher's maps are average-pooled to the student's width; the loss is the mean over the
    pairs of the spectral distance ([EM26], SpectralKD).
    """

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
    """A pair of maps, a projector whose output has unit variance, and a norm's parameters."""
    return {
        "student": normal(maps.batch, maps.tokens, maps.student),
        "teacher": normal(maps.batch, maps.tokens, maps.teacher),
        "weight": normal(maps.teacher, maps.student, scale=maps.student**-0.5),
        "norm_weight": normal(maps.teacher, scale=0.1, mean=1),
        "norm_bias": normal(maps.teacher, scale=0.1),
    }


def distance(y: Tensor, teacher: Tensor, metric: Metric, grid: tuple[int, int]) -> Tensor:
    """The feature distance in plain torch, written for speed: one fused call, or one FFT.

    `F.mse_loss` takes a third of the time of (y - t).square().mean() on a CPU in fp32, and the FFT
    of the difference half of that of two maps: the harder ones to beat.
    """
    if metric == "mse":
        return F.mse_loss(y, teacher)
    difference = (y - teacher).transpose(1, 2)
    difference = difference.reshape(*difference.shape[:2], *grid)
    # neither the CPU's FFT nor, on a 14 x 14 grid, cuFFT takes half precision
    wide = difference if difference.dtype == torch.float64 else difference.float()
    spectrum = torch.fft.rfft2(wide, norm="ortho")
    return torch.view_as_real(spectrum).square().mean()
