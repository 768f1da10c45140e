"""`widelast_projection`: input of the last block, which is wider than the block before it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from featkd.functional import widelast_projection

from .problem import Normal, Problem, Tensors
from .sizes import Maps, Sizes

_NORMS = ("proj_norm_weight", "proj_norm_bias", "norm1_weight", "norm1_bias")


def problems(sizes: Sizes) -> list[Problem]:
    """Returns the op's problems."""
    return [_projection(maps) for maps in sizes.maps]


def _projection(maps: Maps) -> Problem:
    """Residual r = LN_p(x W^T) and input u = LN_1(r) of the block."""
    width = (maps.teacher,)

    def tensors(normal: Normal) -> Tensors:
        found = {
            "x": normal(maps.batch, maps.tokens, maps.student),
            "weight": normal(maps.teacher, maps.student, scale=maps.student**-0.5),
        }
        for name in _NORMS:
            found[name] = normal(maps.teacher, scale=0.1, mean=name.endswith("weight"))
        return found

    def eager(x: Tensors) -> tuple[Tensor, ...]:
        h = F.linear(x["x"], x["weight"])
        residual = F.layer_norm(h, width, x["proj_norm_weight"], x["proj_norm_bias"], 1e-6)
        normed = F.layer_norm(residual, width, x["norm1_weight"], x["norm1_bias"], 1e-6)
        return residual, normed

    return Problem(
        "widelast_projection",
        "two-norms",
        str(maps),
        differentiable=("x", "weight", *_NORMS),
        multiply_adds=maps.multiply_adds,
        tensors=tensors,
        eager=eager,
        featkd=lambda x: widelast_projection(x["x"], x["weight"], *(x[name] for name in _NORMS)),
    )
