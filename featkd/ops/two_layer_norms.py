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


def _fake(h: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape, dtype=others[-1]), h.new_empty(h.shape)


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, _, h, *parameters, _, need_norms = arguments
    size = (4 if need_norms else 0, h.shape[2])
    return h.new_empty(h.shape), h.new_empty(size, dtype=widest_dtype(*parameters))


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
    "two_layer_norms:forward",
    _fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
_backward = support.define(
    f"two_layer_norms_backward(Tensor? d_residual, Tensor? d_normed, {_TENSORS}, bool need_norms) "
    "-> (Tensor, Tensor)",
    "two_layer_norms:backward",
    _fake_backward,
)
