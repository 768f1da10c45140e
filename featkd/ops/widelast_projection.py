"""The op behind `functional.widelast_projection`: schema, autograd, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from featkd import backends, reference
from featkd.cpu.chunks import keeps_product
from featkd.ops import support
from featkd.reference import accumulation_dtype

NAME = "widelast_projection"
# of x: a tile's dx, in registers, and the products unrolled over blocks of x's channels
_MOST_STUDENT_CHANNELS = 1024


def widelast_projection(
    x: Tensor,
    weight: Tensor,
    proj_norm_weight: Tensor,
    proj_norm_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """r and u by the chosen backend; arguments as in `featkd.reference`, taken as valid."""
    parameters = (weight, proj_norm_weight, proj_norm_bias, norm1_weight, norm1_bias)

    def unsupported(backend: str) -> str:
        batch, tokens, channels = x.shape
        why = support.unsupported(backend, x, batch * tokens, parameters)
        if not why and not weight.numel():
            return "no channels"
        if not why and backend == "triton" and channels > _MOST_STUDENT_CHANNELS:
            return f"{channels} student channels, more than {_MOST_STUDENT_CHANNELS}"
        return why

    exported = support.is_being_exported()
    backend = "reference" if exported else backends.choose(NAME, x.device, unsupported)
    if backend == "reference":
        if not exported:
            backends.record(NAME, backend)
        return reference.widelast_projection(x, *parameters, eps=eps)
    compute = support.operand_dtype(backend, x)
    residual, normed, *_ = _forward(
        *(x, *parameters),
        eps,
        compute,
        # as LayerNorm's output under autocast: the residual stream stays in float32
        torch.float32 if support.is_cast(backend, x) else x.dtype,
        torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)),
        backend,
    )
    return residual, normed


@torch.library.custom_op("featkd::widelast_projection", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    proj_norm_weight: Tensor,
    proj_norm_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    eps: float,
    compute: torch.dtype,
    residual_dtype: torch.dtype,
    need_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r, u, and what `_backward` needs: row statistics and, from the CPU path, maybe x W^T.

    Statistics are (B N, 4) from Triton and (4, B N) from the CPU path. What is not needed is
    empty.
    """
    backends.record(NAME, backend)
    parameters = (weight, proj_norm_weight, proj_norm_bias, norm1_weight, norm1_bias)
    kind = accumulation_dtype(compute)
    empty = [x.new_empty(0, dtype=kind) for _ in range(2)]
    if backend == "cpu":
        from featkd.cpu import widelast_projection as cpu

        with torch.autocast("cpu", enabled=False):  # it would round the projection's operands
            r, u, *kept = cpu.forward(x, cpu.Parameters(*parameters), eps=eps)
        return (r, u, *(kept if need_gradient else empty))  # type: ignore[return-value]
    batch, tokens, _ = x.shape
    if not batch * tokens:
        shape = (batch, tokens, weight.shape[0])
        return (
            x.new_empty(shape, dtype=residual_dtype),
            x.new_empty(shape, dtype=compute),
            x.new_empty((0, 4) if need_gradient else 0, dtype=kind),
            empty[1],
        )
    from featkd.kernels import widelast_projection as kernels

    r, u, statistics = kernels.forward(
        x,
        kernels.Parameters(*parameters),
        eps=eps,
        compute=compute,
        residual_dtype=residual_dtype,
        need_gradient=need_gradient,
    )
    return r, u, empty[0] if statistics is None else statistics, empty[1]


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    proj_norm_weight: Tensor,
    proj_norm_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    eps: float,
    compute: torch.dtype,
    residual_dtype: torch.dtype,
    need_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, _ = x.shape
    width, kind = weight.shape[0], accumulation_dtype(compute)
    rows = batch * tokens
    shape: tuple[int, ...] = (rows, 4) if backend == "triton" else (4, rows)
    keep = need_gradient and backend == "cpu" and keeps_product(x)
    return (
        x.new_empty((batch, tokens, width), dtype=residual_dtype),
        x.new_empty((batch, tokens, width), dtype=compute),
        x.new_empty(shape if need_gradient else (0,), dtype=kind),
        x.new_empty((rows, width) if keep else (0,), dtype=x.dtype if keep else kind),
    )


@torch.library.custom_op("featkd::widelast_projection_backward", mutates_args=())
def _backward(
    d_residual: Tensor | None,
    d_normed: Tensor | None,
    statistics: Tensor,
    product: Tensor,
    x: Tensor,
    weight: Tensor,
    proj_norm_weight: Tensor,
    proj_norm_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    compute: torch.dtype,
    need_input: bool,
    need_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the parameters, in the order of the arguments; empty where not needed."""
    parameters = (weight, proj_norm_weight, proj_norm_bias, norm1_weight, norm1_bias)
    d_input: Tensor | None
    sums: list[Tensor]
    if backend == "cpu":
        from featkd.cpu import widelast_projection as cpu

        with torch.autocast("cpu", enabled=False):
            d_input, sums = cpu.backward(
                *(x, cpu.Parameters(*parameters), d_residual, d_normed, statistics, product),
                need_input=need_input,
                need_parameters=need_parameters,
            )
    elif not x.shape[0] * x.shape[1]:
        d_input, sums = x.new_empty(x.shape), [torch.zeros_like(p) for p in parameters]
    else:
        from featkd.kernels import widelast_projection as kernels

        d_input, sums = kernels.backward(
            *(x, kernels.Parameters(*parameters), d_residual, d_normed, statistics),
            compute=compute,
            need_input=need_input,
            need_parameters=need_parameters,
        )
    results = [d_input if need_input and d_input is not None else x.new_empty(0)]
    if not need_parameters:
        results += [x.new_empty(0) for _ in parameters]
    else:
        results += [x.to(p.dtype) for p, x in zip(parameters, sums, strict=True)]
    return tuple(results)  # type: ignore[return-value]


@_backward.register_fake
def _(
    d_residual: Tensor | None,
    d_normed: Tensor | None,
    statistics: Tensor,
    product: Tensor,
    x: Tensor,
    weight: Tensor,
    proj_norm_weight: Tensor,
    proj_norm_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    compute: torch.dtype,
    need_input: bool,
    need_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    results = [x.new_empty(x.shape if need_input else (0,))]
    for p in (weight, proj_norm_weight, proj_norm_bias, norm1_weight, norm1_bias):
        results.append(p.new_empty(p.shape) if need_parameters else x.new_empty(0))
    return tuple(results)  # type: ignore[return-value]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, _, compute, _, _, backend = inputs
    _, _, statistics, product = output
    ctx.save_for_backward(statistics, product, *tensors)
    ctx.rest = (compute, backend)
    ctx.mark_non_differentiable(statistics, product)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_residual, d_normed, *_):  # type: ignore[no-untyped-def]
    nothing = (None,) * 11
    if d_residual is None and d_normed is None:
        return nothing
    compute, backend = ctx.rest
    needed = ctx.needs_input_grad[:6]
    results = _backward(
        *(d_residual, d_normed, *ctx.saved_tensors),
        *(compute, needed[0], any(needed[1:]), backend),
    )
    gradients = [r if n else None for r, n in zip(results, needed, strict=True)]
    return (*gradients, *nothing[6:])


_forward.register_autograd(_differentiate, setup_context=_setup_context)
