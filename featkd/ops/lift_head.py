"""The op behind `functional.lift_head`: schema, autograd, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from featkd import backends, reference
from featkd.cpu.chunks import keeps_product
from featkd.factors import LowRank
from featkd.ops import support
from featkd.reference import accumulation_dtype

NAME = "lift_head"


def lift_head(
    features: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    teacher: Tensor | LowRank | None,
    *,
    eps: float,
    metric: str,
    grid: tuple[int, int] | None,
) -> tuple[Tensor, Tensor | None]:
    """Pooled map and loss by the chosen backend; arguments as in `featkd.reference`."""
    width = 0 if grid is None else grid[1]
    parameters = (weight, norm_weight, norm_bias)
    left, right = (None, None) if teacher is None else support.factors(teacher)

    def unsupported(backend: str) -> str:
        rows = features.shape[0] * features.shape[1]
        why = support.unsupported(backend, features, rows, (*parameters, left, right))
        if not why and not weight.numel():
            return "no channels"
        if not why and backend == "triton" and width > support.MOST_COLUMNS:
            return f"a patch grid of {width} columns, more than {support.MOST_COLUMNS}"
        return why

    exported = support.is_being_exported()
    backend = "reference" if exported else backends.choose(NAME, features.device, unsupported)
    if backend == "reference":
        if not exported:
            backends.record(NAME, backend)
        return reference.lift_head(
            features, *parameters, teacher, eps=eps, metric=metric, grid=grid
        )
    grad = torch.is_grad_enabled()
    outputs: tuple[Tensor, ...] = _forward(
        *(features, *parameters, left),
        eps,
        width,
        support.operand_dtype(backend, features),
        grad and features.requires_grad,
        grad and any(p.requires_grad for p in parameters),
        backend,
        right,
    )
    return outputs[0], None if teacher is None else outputs[1]


@torch.library.custom_op("featkd::lift_head", mutates_args=())
def _forward(
    features: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    teacher: Tensor | None,
    eps: float,
    width: int,
    compute: torch.dtype,
    need_features: bool,
    need_parameters: bool,
    backend: str,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The pooled map, the loss (0 without a teacher), and what `_backward` needs, else empty.

    From Triton that is the (B N, 4) statistics of the norm. From the CPU path, 1 / std of each row
    (B, N), the means of its product with f (B, Cs) and, with a teacher, maybe f W^T.
    """
    backends.record(NAME, backend)
    dtype = accumulation_dtype(features.dtype)
    needed = need_features or need_parameters
    empty = [features.new_empty(0, dtype=dtype) for _ in range(3)]
    kept: tuple[Tensor, ...]
    with support.no_autocast(features):
        if backend == "cpu":
            from featkd.cpu import lift_head as cpu

            pooled, means, rstd, energy, product = cpu.forward(
                *(features, weight, norm_weight, norm_bias, teacher),
                eps=eps,
                width=width,
                compute=compute,
                need_gradient=needed,
                right=right,
            )
            kept = (rstd, means, product) if needed else tuple(empty)
        else:
            from featkd.kernels import lift_head as kernels
            from featkd.kernels import restored

            head = kernels.Head(weight, norm_weight, norm_bias)
            forward = kernels.forward if right is None else restored.lift_forward
            pooled, total, statistics = forward(
                *(features, head, teacher, *(() if right is None else (right,))),
                eps=eps,
                width=width,
                compute=compute,
                need_statistics=needed,
            )
            energy = pooled.new_zeros(()) if total is None else total
            kept = (empty[0] if statistics is None else statistics, *empty[1:])
        pooled = torch.addcmul(norm_bias.to(dtype), norm_weight.to(dtype), pooled)
    loss = energy if teacher is None else energy * support.distance_factor(teacher, width, right)
    return (pooled.to(features.dtype), loss, *kept)  # type: ignore[return-value]


@_forward.register_fake
def _(
    features: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    teacher: Tensor | None,
    eps: float,
    width: int,
    compute: torch.dtype,
    need_features: bool,
    need_parameters: bool,
    backend: str,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, channels = features.shape
    dtype = accumulation_dtype(features.dtype)
    needed, empty = need_features or need_parameters, (0,)
    on_cpu = backend == "cpu"
    keep = on_cpu and needed and teacher is not None and keeps_product(features)
    statistics = ((batch, tokens) if on_cpu else (batch * tokens, 4)) if needed else empty
    return (
        features.new_empty(batch, weight.shape[0]),
        features.new_empty((), dtype=dtype),
        features.new_empty(statistics, dtype=dtype),
        features.new_empty((batch, channels) if on_cpu and needed else empty, dtype=dtype),
        features.new_empty(
            (batch, tokens, weight.shape[0]) if keep else empty,
            dtype=features.dtype if keep else dtype,
        ),
    )


@torch.library.custom_op("featkd::lift_head_backward", mutates_args=())
def _backward(
    d_pooled: Tensor | None,
    d_loss: Tensor | None,
    statistics: Tensor,
    means: Tensor,
    product: Tensor,
    features: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    teacher: Tensor | None,
    eps: float,
    width: int,
    compute: torch.dtype,
    need_features: bool,
    need_parameters: bool,
    backend: str,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the features, weight, norm's weight and bias; empty where not needed."""
    parameters = (weight, norm_weight, norm_bias)
    results = [features.new_empty(0) for _ in range(4)]
    dtype = statistics.dtype
    # a transposed or expanded one keeps its strides through `to`; the backends count on none
    d_pooled = None if d_pooled is None else d_pooled.to(dtype).contiguous()
    if teacher is None:
        d_loss = None
    else:  # the loss's scale joins here: sums of unscaled gradients keep their bits in half types
        d_loss = (
            None
            if d_loss is None
            else d_loss * (2 * support.distance_factor(teacher, width, right))
        )
    with support.no_autocast(features):
        if backend == "cpu":
            from featkd.cpu import lift_head as cpu

            if teacher is None:
                assert d_pooled is not None
                results[0], gradients = cpu.backward(
                    *(features, weight, norm_weight, statistics, means, d_pooled),
                    compute=compute,
                    need_features=need_features,
                    need_parameters=need_parameters,
                )
            else:
                results[0], gradients = cpu.backward_with_loss(
                    *(features, *parameters, teacher, product, d_pooled, d_loss),
                    eps=eps,
                    width=width,
                    compute=compute,
                    need_features=need_features,
                    need_parameters=need_parameters,
                    right=right,
                )
        else:
            from featkd.kernels import lift_head as kernels
            from featkd.kernels import restored

            backward = kernels.backward
            given: tuple[Tensor | None, ...] = (teacher,)
            if right is not None and d_loss is not None:  # else the teacher isn't looked at
                backward, given = restored.lift_backward, (teacher, right)
            gradient, gradients = backward(
                *(features, kernels.Head(*parameters), *given, statistics, d_loss, d_pooled),
                width=width,
                compute=compute,
                need_features=need_features,
                need_parameters=need_parameters,
            )
            if gradient is not None:
                results[0] = gradient
    if need_parameters:
        pairs = zip(parameters, gradients, strict=True)
        results[1:] = [x.to(p.dtype) for p, x in pairs]
    return tuple(results)  # type: ignore[return-value]


@_backward.register_fake
def _(
    d_pooled: Tensor | None,
    d_loss: Tensor | None,
    statistics: Tensor,
    means: Tensor,
    product: Tensor,
    features: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    teacher: Tensor | None,
    eps: float,
    width: int,
    compute: torch.dtype,
    need_features: bool,
    need_parameters: bool,
    backend: str,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = [features.new_empty(features.shape if need_features else (0,))]
    for p in (weight, norm_weight, norm_bias):
        empty = features.new_empty(0)
        results.append(p.new_empty(p.shape) if need_parameters else empty)
    return tuple(results)  # type: ignore[return-value]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    features, weight, norm_weight, norm_bias, teacher, *rest, right = inputs
    _, loss, *kept = output
    ctx.save_for_backward(*kept, features, weight, norm_weight, norm_bias, teacher, right)
    ctx.rest = rest
    ctx.mark_non_differentiable(*kept, *(() if teacher is not None else (loss,)))
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_pooled, d_loss, *_):  # type: ignore[no-untyped-def]
    *saved, right = ctx.saved_tensors
    nothing = (None,) * 12
    if d_pooled is None and d_loss is None:
        return nothing
    results = _backward(d_pooled, d_loss, *saved, *ctx.rest, right)
    needed = ctx.needs_input_grad[:4]
    gradients = [r if n else None for r, n in zip(results, needed, strict=True)]
    return (*gradients, *nothing[4:])


_forward.register_autograd(_differentiate, setup_context=_setup_context)
