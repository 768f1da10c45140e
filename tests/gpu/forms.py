"""Forms of the ops: inputs, the equation in plain torch, and the public function.

The plain form is as a user writes it, with `torch.fft.rfft2` for the spectral metric. In float64 it
is the exact result; in a case's own dtype its error determines the allowed error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd import functional

Tensors = dict[str, Tensor]
Metric = Literal["mse", "spectral"]
NORM = ("norm_weight", "norm_bias")
NORMS = ("proj_norm_weight", "proj_norm_bias", "norm1_weight", "norm1_bias")


@dataclass(frozen=True)
class Sizes:
    """Images, patch grid, student's and teacher's channels; for logits, images and classes."""

    batch: int
    grid: tuple[int, int]
    student: int
    teacher: int

    def __str__(self) -> str:
        height, width = self.grid
        return f"{self.batch}x{height}x{width}x{self.student}to{self.teacher}"


@dataclass(frozen=True)
class Draw:
    """Draws normal numbers in the dtype of the student and the parameters, or of the teacher."""

    generator: torch.Generator
    device: torch.device
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype

    def student(self, *shape: int, scale: float = 1, mean: float = 0) -> Tensor:
        drawn = mean + scale * torch.randn(shape, generator=self.generator)
        return drawn.to(self.device, self.student_dtype)

    def teacher(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.teacher_dtype)


@dataclass(frozen=True)
class Form:
    """A use of an op."""

    op: str
    """Name in featkd.functional."""
    name: str
    inputs: Callable[[Sizes, Draw], Tensors]
    plain: Callable[[Tensors, Sizes], tuple[Tensor, ...]]
    ours: Callable[[Tensors, Sizes], tuple[Tensor, ...]]
    constant: tuple[str, ...] = ("teacher", "target")
    """Names of the inputs without a gradient."""

    def __str__(self) -> str:
        return f"{self.op}/{self.name}"


def distance(y: Tensor, teacher: Tensor, metric: Metric, grid: tuple[int, int]) -> Tensor:
    """Returns the mean square of the difference, or of its half spectrum on the grid."""
    if metric == "mse":
        return F.mse_loss(y, teacher.to(y.dtype))
    difference = y - teacher
    maps = difference.transpose(1, 2).reshape(y.shape[0], y.shape[2], *grid)
    wide = maps if maps.dtype == torch.float64 else maps.float()
    return torch.view_as_real(torch.fft.rfft2(wide, norm="ortho")).square().mean()


def _feature_kd(metric: Metric, *, projector: bool, norm: bool, bias: bool = False) -> Form:
    def inputs(sizes: Sizes, draw: Draw) -> Tensors:
        width, tokens = sizes.teacher, sizes.grid[0] * sizes.grid[1]
        channels = sizes.student if projector else width
        found = {"student": draw.student(sizes.batch, tokens, channels)}
        found["teacher"] = draw.teacher(sizes.batch, tokens, width)
        if projector:
            found["weight"] = draw.student(width, channels, scale=channels**-0.5)
        if bias:
            found["bias"] = draw.student(width, scale=0.5)
        if norm:
            found["norm_weight"] = draw.student(width, scale=0.1, mean=1)
            found["norm_bias"] = draw.student(width, scale=0.5)
        return found

    def plain(x: Tensors, sizes: Sizes) -> tuple[Tensor, ...]:
        y = x["student"]
        if projector:
            y = F.linear(y, x["weight"], x.get("bias"))
        if norm:
            y = F.layer_norm(y, (sizes.teacher,), x["norm_weight"], x["norm_bias"], 1e-5)
        return (distance(y, x["teacher"], metric, sizes.grid),)

    def ours(x: Tensors, sizes: Sizes) -> tuple[Tensor, ...]:
        grid = sizes.grid if metric == "spectral" else None
        return (functional.projected_feature_kd(**x, metric=metric, grid=grid),)

    parts = ["projector"] * projector + ["bias"] * bias + ["norm"] * norm
    name = "-".join([metric, *(parts or ["as-wide"])])
    return Form("projected_feature_kd", name, inputs, plain, ours)


def _lift_head(metric: Metric | None) -> Form:
    def inputs(sizes: Sizes, draw: Draw) -> Tensors:
        width, tokens = sizes.teacher, sizes.grid[0] * sizes.grid[1]
        found = {
            "features": draw.student(sizes.batch, tokens, sizes.student),
            "weight": draw.student(width, sizes.student, scale=sizes.student**-0.5),
            "norm_weight": draw.student(width, scale=0.1, mean=1),
            "norm_bias": draw.student(width, scale=0.5),
        }
        if metric is not None:
            found["teacher"] = draw.teacher(sizes.batch, tokens, width)
        return found

    def plain(x: Tensors, sizes: Sizes) -> tuple[Tensor, ...]:
        z = F.linear(x["features"], x["weight"])
        z = F.layer_norm(z, (sizes.teacher,), x["norm_weight"], x["norm_bias"], 1e-5)
        if metric is None:
            return (z.mean(1),)
        return z.mean(1), distance(z, x["teacher"], metric, sizes.grid)

    def ours(x: Tensors, sizes: Sizes) -> tuple[Tensor, ...]:
        grid = sizes.grid if metric == "spectral" else None
        pooled, loss = functional.lift_head(**x, metric=metric or "mse", grid=grid)
        return (pooled,) if loss is None else (pooled, loss)

    return Form("lift_head", metric or "pool", inputs, plain, ours)


def _widelast() -> Form:
    def inputs(sizes: Sizes, draw: Draw) -> Tensors:
        width, tokens = sizes.teacher, sizes.grid[0] * sizes.grid[1]
        found = {
            "x": draw.student(sizes.batch, tokens, sizes.student),
            "weight": draw.student(width, sizes.student, scale=sizes.student**-0.5),
        }
        for name in NORMS:
            mean = 1 if name.endswith("weight") else 0
            found[name] = draw.student(width, scale=0.1, mean=mean)
        return found

    def plain(x: Tensors, sizes: Sizes) -> tuple[Tensor, ...]:
        width = (sizes.teacher,)
        h = F.linear(x["x"], x["weight"])
        r = F.layer_norm(h, width, x["proj_norm_weight"], x["proj_norm_bias"], 1e-6)
        return r, F.layer_norm(r, width, x["norm1_weight"], x["norm1_bias"], 1e-6)

    def ours(x: Tensors, sizes: Sizes) -> tuple[Tensor, ...]:
        return functional.widelast_projection(**x)

    return Form("widelast_projection", "two-norms", inputs, plain, ours)


def _soft_kd(name: str, *, alpha: float, tau: float, soft: bool) -> Form:
    def inputs(sizes: Sizes, draw: Draw) -> Tensors:
        batch, classes = sizes.batch, sizes.teacher
        target = torch.arange(batch, device=draw.device) * 7 % classes
        if soft:
            target = F.softmax(3 * draw.teacher(batch, classes).float(), 1)
        student, teacher = draw.student(batch, classes), draw.teacher(batch, classes)
        return {"student": student, "teacher": teacher, "target": target}

    def plain(x: Tensors, sizes: Sizes) -> tuple[Tensor, ...]:
        log_s, log_t = (F.log_softmax(x[k] / tau, 1) for k in ("student", "teacher"))
        divergence = F.kl_div(log_s, log_t.to(log_s.dtype), reduction="batchmean", log_target=True)
        target = x["target"].to(log_s.dtype) if soft else x["target"]
        hard = F.cross_entropy(x["student"].to(log_s.dtype), target)
        return ((1 - alpha) * hard + alpha * tau**2 * divergence,)

    def ours(x: Tensors, sizes: Sizes) -> tuple[Tensor, ...]:
        return (functional.soft_kd(x["student"], x["teacher"], x["target"], alpha=alpha, tau=tau),)

    return Form("soft_kd", name, inputs, plain, ours)


FORMS = {
    str(form): form
    for form in (
        _feature_kd("mse", projector=True, norm=True),
        _feature_kd("mse", projector=True, norm=False, bias=True),
        _feature_kd("mse", projector=False, norm=False),
        _feature_kd("spectral", projector=True, norm=True),
        _feature_kd("spectral", projector=False, norm=False),
        _lift_head("mse"),
        _lift_head("spectral"),
        _lift_head(None),
        _widelast(),
        _soft_kd("indices", alpha=0.9, tau=1.0, soft=False),
        _soft_kd("labels-tau", alpha=0.5, tau=4.0, soft=True),
    )
}
# forms for checks that do not depend on the equation
MAIN = (
    "projected_feature_kd/mse-projector-norm",
    "projected_feature_kd/spectral-as-wide",
    "lift_head/spectral",
    "widelast_projection/two-norms",
    "soft_kd/indices",
)
