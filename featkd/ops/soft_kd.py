"""The op behind `functional.soft_kd`: schema, autograd, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from featkd import backends, reference
from featkd.ops import support
from featkd.reference import accumulation_dtype

NAME = "soft_kd"


def soft_kd(
    student: Tensor, teacher: Tensor | None, target: Tensor, *, alpha: float, tau: float
) -> Tensor:
    """The loss by the chosen backend; arguments as in `featkd.reference`, taken as valid."""
    # a term of weight zero is left out, whatever its tensor holds
    softened = teacher if alpha > 0 else None
    labels = target if alpha < 1 else None

    def unsupported(backend: str) -> str:
        if torch.is_grad_enabled() and labels is not None and labels.requires_grad:
            return "a target that requires grad"
        for x in (student, softened, labels):
            if x is not None and x.is_floating_point() and x.dtype not in support.DTYPES:
                return f"logits or labels in {x.dtype}"
        return support.unsupported(backend, student, student.shape[0])

    backend = backends.choose(NAME, student.device, unsupported)
    if backend == "reference":
        backends.record(NAME, backend)
        return reference.soft_kd(student, teacher, target, alpha=alpha, tau=tau)
    need = torch.is_grad_enabled() and student.requires_grad
    loss: Tensor = _forward(student, softened, labels, alpha, tau, need, backend)[0]
    return loss


@torch.library.custom_op("featkd::soft_kd", mutates_args=())
def _forward(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    alpha: float,
    tau: float,
    need_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of the rows' losses, not divided by B; empty if not needed."""
    backends.record(NAME, backend)
    if backend == "cpu":
        from featkd.cpu.soft_kd import sweep

        losses, gradient = sweep(
            student, teacher, target, alpha=alpha, tau=tau, need_gradient=need_gradient
        )
        return losses.mean(), gradient
    from featkd.kernels import soft_kd as kernels

    losses, slope = kernels.forward(
        student, teacher, target, alpha=alpha, tau=tau, need_gradient=need_gradient
    )
    return losses.mean(), student.new_empty(0) if slope is None else slope


@_forward.register_fake
def _(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    alpha: float,
    tau: float,
    need_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    gradient = student.new_empty(student.shape if need_gradient else (0,))
    return student.new_empty((), dtype=accumulation_dtype(student.dtype)), gradient


@torch.library.custom_op("featkd::soft_kd_backward", mutates_args=())
def _backward(grad: Tensor, gradient: Tensor, student: Tensor, backend: str) -> Tensor:
    """`_forward`'s gradient times upstream's over B: a half type holds the one, not both.

    The student is taken so that differentiating the result again is an error, not zero.
    """
    if backend == "cpu":
        return gradient * (grad / gradient.shape[0])
    from featkd.kernels import soft_kd as kernels

    result: Tensor = kernels.backward(gradient, grad)
    return result


@_backward.register_fake
def _(grad: Tensor, gradient: Tensor, student: Tensor, backend: str) -> Tensor:
    return torch.empty_like(gradient)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, gradient = output
    ctx.save_for_backward(gradient, inputs[0])
    ctx.backend = inputs[-1]
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):  # type: ignore[no-untyped-def]
    result = None if grad is None else _backward(grad, *ctx.saved_tensors, ctx.backend)
    return (result, *(None,) * 6)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
