"""`lift_head` for inference (pooled features) and training (with the feature loss)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from featkd.functional import Metric, lift_head

from .problem import Normal, Problem, Tensors
from .projected_feature_kd import LIFT_PARAMETERS, distance, lift_tensors, projected
from .sizes import Maps, Sizes

Form = Literal["mse", "spectral", "pool"]
_FORMS: tuple[Form, ...] = ("mse", "spectral", "pool")


def problems(sizes: Sizes) -> list[Problem]:
    """Returns the op's problems."""
    return [_head(maps, form) for maps in sizes.maps for form in _FORMS]


def _head(maps: Maps, form: Form) -> Problem:
    """Mean over the tokens of z = LN(f W^T), and for training the distance of z from T."""
    metric: Metric = "spectral" if form == "spectral" else "mse"

    def tensors(normal: Normal) -> Tensors:
        drawn = lift_tensors(maps, normal)
        if form == "pool":
            del drawn["teacher"]
        return drawn

    def eager(x: Tensors) -> tuple[Tensor, ...]:
        z = projected(x)
        if form == "pool":
            return (z.mean(1),)
        return z.mean(1), distance(z, x["teacher"], metric, maps.grid)

    def ours(x: Tensors) -> tuple[Tensor, ...]:
        parameters = (x["weight"], x["norm_weight"], x["norm_bias"])
        pooled, loss = lift_head(
            x["student"], *parameters, x.get("teacher"), metric=metric, grid=maps.grid
        )
        return (pooled,) if loss is None else (pooled, loss)

    return Problem(
        "lift_head",
        form,
        str(maps),
        differentiable=LIFT_PARAMETERS,
        multiply_adds=maps.multiply_adds,
        tensors=tensors,
        eager=eager,
        featkd=ours,
    )
