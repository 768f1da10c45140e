"""Row op of `projected_feature_kd` and `lift_head`: distance from a teacher's map, pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featkd.ops import reference, support
from featkd.runtime.dtypes import accumulation_dtype, widest_dtype


def feature_distance(
    name: str,
    feature: Tensor,
    teacher: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float,
    grid: tuple[int, int] | None,
    pooled_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Distance of Y = LN(feature) from the teacher's map, and the mean of Y over the tokens.

    Args:
        name: public function that calls, for `featkd.last_backend`.
        feature: (B, N, C); without a teacher B may be 0.
        teacher: (B, N, C), or None for no loss.
        norm_weight, norm_bias: (C,), or None; no LayerNorm without `norm_weight`.
        eps: LayerNorm's epsilon.
        grid: (H, W) for the spectral metric, None for the mse.
        pooled_dtype: dtype of the pooled map; None for no pooled map.

    Returns:
        (loss or None, pooled (B, C) or None).
    """

    def why_not() -> str:
        from featkd.kernels.feature_distance import MOST_COLUMNS

        if grid is not None and grid[1] > MOST_COLUMNS:
            return f"a patch grid of {grid[1]} columns, more than {MOST_COLUMNS}"
        return support.too_many_rows(feature)

    tensors = (feature, teacher, norm_weight, norm_bias)
    if not len(feature) or support.choose(name, tensors, why_not) == "reference":
        return reference.feature_distance(*tensors, eps=eps, grid=grid, pooled_dtype=pooled_dtype)
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    loss, pooled, _ = _forward(
        *tensors, eps, 0 if grid is None else grid[1], pooled_dtype, needed
    )  # fmt: skip
    return loss if teacher is not None else None, pooled if pooled_dtype is not None else None


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    feature, teacher, gamma, _, _, _, pooled_dtype, needed = arguments
    batch, tokens, channels = feature.shape
    acc = accumulation_dtype(feature.dtype)
    loss, pooled, statistics = (feature.new_empty(0) for _ in range(3))
    if teacher is not None:
        loss = feature.new_empty((), dtype=acc)
    if pooled_dtype is not None:
        pooled = feature.new_empty(batch, channels, dtype=pooled_dtype)
    if needed and gamma is not None:
        statistics = feature.new_empty(4, batch, tokens, dtype=acc)
    return loss, pooled, statistics


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, _, feature, _, gamma, beta, _, _, need_norm = arguments
    d_norm = feature.new_empty(0)
    if gamma is not None and need_norm:
        dtype = widest_dtype(gamma, beta)
        d_norm = gamma.new_empty(1 if beta is None else 2, len(gamma), dtype=dtype)
    return feature.new_empty(feature.shape), d_norm


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    feature, teacher, gamma, beta, _, width, pooled_dtype, _ = inputs
    loss, pooled, statistics = output
    ctx.save_for_backward(feature, teacher, gamma, beta, statistics)
    ctx.width = width
    ctx.mark_non_differentiable(
        statistics,
        *(() if teacher is not None else (loss,)),
        *(() if pooled_dtype is not None else (pooled,)),
    )
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_loss: Tensor | None, d_pooled: Tensor | None, _: Any) -> Any:
    if d_loss is None and d_pooled is None:
        return (None,) * 8
    _, _, need_gamma, need_beta, *_ = ctx.needs_input_grad
    feature, teacher, gamma, beta, statistics = ctx.saved_tensors
    d_feature, d_norm = _backward(
        d_loss,
        d_pooled,
        feature,
        teacher,
        gamma,
        beta,
        statistics,
        ctx.width,
        need_gamma or need_beta,
    )
    d_gamma = d_norm[0].to(gamma.dtype) if need_gamma else None
    d_beta = d_norm[1].to(beta.dtype) if need_beta else None
    return d_feature, None, d_gamma, d_beta, None, None, None, None


_forward = support.define(
    "feature_distance(Tensor feature, Tensor? teacher, Tensor? gamma, Tensor? beta, float eps, "
    "int width, ScalarType? pooled_dtype, bool needed) -> (Tensor, Tensor, Tensor)",
    "feature_distance:forward",
    _fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
_backward = support.define(
    "feature_distance_backward(Tensor? d_loss, Tensor? d_pooled, Tensor feature, Tensor? teacher, "
    "Tensor? gamma, Tensor? beta, Tensor statistics, int width, bool need_norm) "
    "-> (Tensor, Tensor)",
    "feature_distance:backward",
    _fake_backward,
)
