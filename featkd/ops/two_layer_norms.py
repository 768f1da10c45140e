"""Row op of `widelast_projection`: two LayerNorms, one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featkd.ops import reference, support
from featkd.runtime.dtypes import widest_dtype


def two_layer_norms(
    name: str,
    h: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    eps: float,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """r = LN_p(h) and u = LN_1(r); r is not rounded in between.

    Args:
        name: public function that calls, for `featkd.last_backend`.
        h: (B, N, C).
        parameters: weight and bias of LN_p, weight and bias of LN_1, (C,) each.
        eps: epsilon of both norms.
        residual_dtype: dtype of r; u has the dtype of h.

    Returns:
        (r, u), (B, N, C) each.
    """
    if support.choose(name, (h, *parameters), lambda: support.too_many_rows(h)) == "reference":
        return reference.two_layer_norms(h, parameters, eps=eps, residual_dtype=residual_dtype)
    residual, normed = _forward(h, *parameters, eps, residual_dtype)
    return residual, normed


def _run(
    h: Tensor,
    gamma_p: Tensor,
    beta_p: Tensor,
    gamma_1: Tensor,
    beta_1: Tensor,
    eps: float,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from featkd.kernels import two_layer_norms as kernels

    parameters = (gamma_p, beta_p, gamma_1, beta_1)
    residual, normed = kernels.forward(h, parameters, eps=eps, residual_dtype=residual_dtype)
    return residual, normed


def _fake(
    h: Tensor,
    gamma_p: Tensor,
    beta_p: Tensor,
    gamma_1: Tensor,
    beta_1: Tensor,
    eps: float,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape, dtype=residual_dtype), h.new_empty(h.shape)


def _run_backward(
    d_residual: Tensor | None,
    d_normed: Tensor | None,
    h: Tensor,
    gamma_p: Tensor,
    beta_p: Tensor,
    gamma_1: Tensor,
    beta_1: Tensor,
    eps: float,
    need_norms: bool,
) -> tuple[Tensor, Tensor]:
    """Returns gradients of h and of the four parameters, (4, C) or empty."""
    from featkd.kernels import two_layer_norms as kernels

    parameters = (gamma_p, beta_p, gamma_1, beta_1)
    if not h.numel():
        dtype = widest_dtype(*parameters)
        size = (4 if need_norms else 0, len(gamma_p))
        return torch.empty_like(h), gamma_p.new_zeros(size, dtype=dtype)
    d_h, d_norms = kernels.backward(
        h, parameters, d_residual, d_normed, eps=eps, need_norms=need_norms
    )
    if d_norms is None:
        dtype = widest_dtype(*parameters)
        d_norms = gamma_p.new_empty(0, len(gamma_p), dtype=dtype)
    return d_h, d_norms


def _fake_backward(
    d_residual: Tensor | None,
    d_normed: Tensor | None,
    h: Tensor,
    gamma_p: Tensor,
    beta_p: Tensor,
    gamma_1: Tensor,
    beta_1: Tensor,
    eps: float,
    need_norms: bool,
) -> tuple[Tensor, Tensor]:
    dtype = widest_dtype(gamma_p, beta_p, gamma_1, beta_1)
    size = (4 if need_norms else 0, len(gamma_p))
    return h.new_empty(h.shape), gamma_p.new_empty(size, dtype=dtype)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_residual: Tensor | None, d_normed: Tensor | None) -> Any:
    if d_residual is None and d_normed is None:
        return (None,) * 7
    _, *needed = ctx.needs_input_grad[:5]
    h, *parameters = ctx.saved_tensors  # read once: a checkpoint allows no second read
    d_h, d_norms = _backward(d_residual, d_normed, h, *parameters, ctx.eps, any(needed))
    of_norms = (d_norms[i].to(p.dtype) if needed[i] else None for i, p in enumerate(parameters))
    return d_h, *of_norms, None, None


_TENSORS = "Tensor h, Tensor gamma_p, Tensor beta_p, Tensor gamma_1, Tensor beta_1, float eps"
_forward = support.define(
    f"two_layer_norms({_TENSORS}, ScalarType residual_dtype) -> (Tensor, Tensor)",
    _run,
    _fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
_backward = support.define(
    f"two_layer_norms_backward(Tensor? d_residual, Tensor? d_normed, {_TENSORS}, bool need_norms) "
    "-> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
