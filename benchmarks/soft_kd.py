"""`soft_kd` with class indices and with soft labels, at the published weights."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.functional import soft_kd
from featkd.losses import smooth_labels

from .problem import Normal, Problem, Tensors
from .sizes import Sizes

Form = Literal["indices", "soft"]
_FORMS: tuple[Form, ...] = ("indices", "soft")
_ALPHA, _TAU = 0.9, 1.0  # [EM26]
_SMOOTHING = 0.1


def problems(sizes: Sizes) -> list[Problem]:
    """Returns the op's problems."""
    return [_loss(*size, form) for size in sizes.logits for form in _FORMS]


def _loss(batch: int, classes: int, form: Form) -> Problem:
    """(1 - alpha) CE + alpha tau^2 KL."""

    def tensors(normal: Normal) -> Tensors:
        student, teacher = normal(batch, classes), normal(batch, classes)
        target = torch.arange(batch, device=student.device) * 7 % classes
        if form == "soft":
            target = smooth_labels(target, classes, _SMOOTHING).to(student.dtype)
        return {"student": student, "teacher": teacher, "target": target}

    def eager(x: Tensors) -> tuple[Tensor, ...]:
        log_s = F.log_softmax(x["student"] / _TAU, 1)
        log_t = F.log_softmax(x["teacher"] / _TAU, 1)
        divergence = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
        hard = F.cross_entropy(x["student"], x["target"])
        return ((1 - _ALPHA) * hard + _ALPHA * _TAU**2 * divergence,)

    def ours(x: Tensors) -> tuple[Tensor, ...]:
        return (soft_kd(x["student"], x["teacher"], x["target"], alpha=_ALPHA, tau=_TAU),)

    return Problem(
        "soft_kd",
        form,
        f"{batch}x{classes}",
        differentiable=("student",),
        tensors=tensors,
        eager=eager,
        featkd=ours,
    )
