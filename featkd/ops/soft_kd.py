"""Row op of `soft_kd`: cross-entropy and softened KL divergence of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featkd.ops import reference, support
from featkd.runtime.dtypes import accumulation_dtype

NAME = "soft_kd"


def soft_kd(
    student: Tensor, teacher: Tensor | None, target: Tensor | None, *, alpha: float, tau: float
) -> Tensor:
    """Computes the loss on the chosen backend; `featkd.functional` checks the arguments."""
    # a term of weight zero is omitted, whatever its tensor holds
    softened = teacher if alpha > 0 else None
    labels = target if alpha < 1 else None

    def why_not() -> str:
        learnt = labels is not None and labels.requires_grad and torch.is_grad_enabled()
        return "a target that requires grad" if learnt else ""

    if support.choose(NAME, (student, softened, labels), why_not) == "reference":
        return reference.soft_kd(student, teacher, target, alpha=alpha, tau=tau)
    loss: Tensor = _forward(student, softened, labels, alpha, tau)
    return loss


def _fake(student: Tensor, *_: Any) -> Tensor:
    return student.new_empty((), dtype=accumulation_dtype(student.dtype))


def _fake_backward(upstream: Tensor, student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.alpha, ctx.tau = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, upstream: Tensor) -> Any:
    gradient = _backward(upstream, *ctx.saved_tensors, ctx.alpha, ctx.tau)
    return gradient, None, None, None, None


_TENSORS = "Tensor student, Tensor? teacher, Tensor? target, float alpha, float tau"
_forward = support.define(
    f"soft_kd({_TENSORS}) -> Tensor",
    "soft_kd:forward",
    _fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
_backward = support.define(
    f"soft_kd_backward(Tensor upstream, {_TENSORS}) -> Tensor", "soft_kd:backward", _fake_backward
)
