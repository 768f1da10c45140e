"""The op behind `functional.projected_feature_kd`: schema, autograd, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from featkd import backends, reference
from featkd.factors import LowRank
from featkd.ops import support
from featkd.reference import accumulation_dtype

NAME = "projected_feature_kd"


def projected_feature_kd(
    student: Tensor,
    teacher: Tensor | LowRank,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float,
    metric: str,
    grid: tuple[int, int] | None,
) -> Tensor:
    """The loss by the chosen backend; arguments as in `featkd.reference`, taken as valid."""
    width = 0 if grid is None else grid[1]
    left, right = support.factors(teacher)
    others = (left, right, weight, bias, norm_weight, norm_bias)

    def unsupported(backend: str) -> str:
        why = support.unsupported(backend, student, student.shape[0] * student.shape[1], others)
        if not why and backend == "triton" and width > support.MOST_COLUMNS:
            return f"a patch grid of {width} columns, more than {support.MOST_COLUMNS}"
        return why

    backend = backends.choose(NAME, student.device, unsupported)
    if backend == "reference":
        backends.record(NAME, backend)
        return reference.projected_feature_kd(
            *(student, teacher, weight, bias, norm_weight, norm_bias),
            eps=eps,
            metric=metric,
            grid=grid,
        )
    parameters = (weight, bias, norm_weight, norm_bias)
    grad = torch.is_grad_enabled()
    compute = student.dtype if weight is None else support.operand_dtype(backend, student)
    outputs: tuple[Tensor, ...] = _forward(
        *(student, left, *parameters),
        eps,
        width,
        compute,
        grad and student.requires_grad,
        grad and any(p is not None and p.requires_grad for p in parameters),
        backend,
        right,
    )
    return outputs[0]


def _gradient_with_loss(
    backend: str, weight: Tensor | None, norm_weight: Tensor | None, right: Tensor | None
) -> bool:
    """Whether dS is formed in the forward pass."""
    return backend != "cpu" or any(x is not None for x in (weight, norm_weight, right))


@torch.library.custom_op("featkd::projected_feature_kd", mutates_args=())
def _forward(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    width: int,
    compute: torch.dtype,
    need_student: bool,
    need_parameters: bool,
    backend: str,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, dS without the loss's scale, and what `_backward` needs for the parameters.

    With `right` (B, Ct, k) the teacher is the left factor of its map, (B, N, k).

    The last is all their gradients, flat, from the CPU path, and from Triton the (B N, 4)
    statistics of the norm. What is not needed is empty.
    """
    backends.record(NAME, backend)
    factor = support.distance_factor(teacher, width, right)
    if backend == "cpu":
        from featkd.cpu.projected_feature_kd import sweep

        need_student = need_student and _gradient_with_loss(backend, weight, norm_weight, right)
        with support.no_autocast(student):
            total, d_student, d_parameters = sweep(
                *(student, teacher, weight, bias, norm_weight, norm_bias),
                eps=eps,
                width=width,
                compute=compute,
                need_student=need_student,
                need_parameters=need_parameters,
                right=right,
            )
        return total * factor, d_student, d_parameters
    from featkd.kernels import projected_feature_kd as kernels
    from featkd.kernels import restored

    parameters = kernels.Parameters(weight, bias, norm_weight, norm_bias)
    options = {
        "eps": eps,
        "width": width,
        "compute": compute,
        "need_student": need_student,
        "need_parameters": need_parameters,
    }
    if right is None:
        total, gradient, statistics = kernels.forward(student, teacher, parameters, **options)
    else:
        with support.no_autocast(student):
            total, gradient, statistics = restored.projected_forward(
                student, teacher, right, parameters, **options
            )
    empty = student.new_empty(0)
    return (
        total * factor,
        empty if gradient is None else gradient,
        total.new_empty(0) if statistics is None else statistics,
    )


@_forward.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    width: int,
    compute: torch.dtype,
    need_student: bool,
    need_parameters: bool,
    backend: str,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(student.dtype)
    need_student = need_student and _gradient_with_loss(backend, weight, norm_weight, right)
    d_student = student.new_empty(student.shape if need_student else (0,))
    if backend == "cpu":
        parameters = (weight, bias, norm_weight, norm_bias)
        count = sum(p.numel() for p in parameters if p is not None) if need_parameters else 0
        kept = student.new_empty(count, dtype=dtype)
    else:
        normed = need_parameters and norm_weight is not None
        shape = (student.shape[0] * student.shape[1], 4) if normed else (0,)
        kept = student.new_empty(shape, dtype=dtype)
    return student.new_empty((), dtype=dtype), d_student, kept


@torch.library.custom_op("featkd::projected_feature_kd_backward", mutates_args=())
def _backward(
    grad: Tensor,
    d_student: Tensor,
    kept: Tensor,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    width: int,
    compute: torch.dtype,
    need_student: bool,
    need_parameters: bool,
    backend: str,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the student, weight, bias, norm's weight and bias; empty where not needed."""
    # scaled here and not in `_forward`: sums of unscaled gradients keep their bits in half types
    factor = grad * (2 * support.distance_factor(teacher, width, right))
    parameters = (weight, bias, norm_weight, norm_bias)
    empty = [student.new_empty(0) for _ in range(5)]
    if need_student and not _gradient_with_loss(backend, weight, norm_weight, right):
        from featkd.cpu.projected_feature_kd import difference_gradient

        results = [difference_gradient(student, teacher, width, factor)]
    elif not need_student:
        results = [empty[0]]
    elif backend == "cpu":
        results = [d_student * factor]
    else:
        from featkd.kernels.scaled import times

        results = [times(d_student, factor)]
    if not need_parameters:
        return tuple(results + empty[1:])  # type: ignore[return-value]
    gradients: list[Tensor | None]
    if backend == "cpu":
        sums = torch.split(kept, [0 if p is None else p.numel() for p in parameters])
        gradients = [
            None if p is None else (total.view(p.shape) * factor).to(p.dtype)
            for p, total in zip(parameters, sums, strict=True)
        ]
    else:
        from featkd.kernels import projected_feature_kd as kernels
        from featkd.kernels import restored

        statistics = kept if norm_weight is not None else None
        rest = (kernels.Parameters(*parameters), statistics, factor)
        if right is None:
            gradients = kernels.backward(student, teacher, *rest, width=width, compute=compute)
        else:
            with support.no_autocast(student):
                gradients = restored.projected_backward(
                    student, teacher, right, *rest, width=width, compute=compute
                )
    for gradient, nothing in zip(gradients, empty[1:], strict=True):
        results.append(nothing if gradient is None else gradient)
    return tuple(results)  # type: ignore[return-value]


@_backward.register_fake
def _(
    grad: Tensor,
    d_student: Tensor,
    kept: Tensor,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    width: int,
    compute: torch.dtype,
    need_student: bool,
    need_parameters: bool,
    backend: str,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    results = [student.new_empty(student.shape if need_student else (0,))]
    for parameter in (weight, bias, norm_weight, norm_bias):
        like = parameter if need_parameters else None
        results.append(student.new_empty(0) if like is None else like.new_empty(like.shape))
    return tuple(results)  # type: ignore[return-value]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    student, teacher, weight, bias, norm_weight, norm_bias, _, *rest, right = inputs
    _, d_student, kept = output
    tensors = (d_student, kept, student, teacher, weight, bias, norm_weight, norm_bias, right)
    ctx.save_for_backward(*tensors)
    ctx.rest = rest
    ctx.mark_non_differentiable(d_student, kept)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):  # type: ignore[no-untyped-def]
    *saved, right = ctx.saved_tensors
    nothing = (None,) * 13
    if grad is None:
        return nothing
    results = _backward(grad, *saved, *ctx.rest, right)
    needed = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5)]  # 1 is the teacher
    gradients = [r if n else None for r, n in zip(results, needed, strict=True)]
    return (gradients[0], None, *gradients[1:], *nothing[6:])


_forward.register_autograd(_differentiate, setup_context=_setup_context)
