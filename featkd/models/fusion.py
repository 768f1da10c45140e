"""Checks whether a fused op may replace a model's modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_KINDS = ("forward", "forward_pre", "backward", "backward_pre")


def is_fusible(projection: Any, *norms: Any) -> bool:
    """Checks whether a fused op may replace these modules (no hooks, no substituted layers).

    If not, the model calls its modules, so that hooks and substitutes (another norm, an adapter, a
    quantised layer, sharded weights) keep their effect.

    Args:
        projection: must be a Linear without bias.
        norms: must be LayerNorms of its output, with weight and bias and the same epsilon.
    """
    if type(projection) is not nn.Linear or getattr(projection, "bias", None) is not None:
        return False
    for norm in norms:
        if type(norm) not in (nn.LayerNorm, LayerNorm) or norm.eps != norms[0].eps:
            return False
        if norm.weight is None or norm.bias is None or getattr(norm, "_fast_norm", False):
            return False
        if norm.normalized_shape != (projection.out_features,):
            return False
    modules = (projection, *norms)
    return _are_plain(modules)


def can_bypass(*linears: Any) -> bool:
    """Checks whether these are Linears with bias whose weights may be used without a call."""
    known = all(type(linear) is nn.Linear and linear.bias is not None for linear in linears)
    return known and _are_plain(linears)


def _are_plain(modules: Sequence[Any]) -> bool:
    """Checks for plain weights (not quantised, not sharded) and the absence of hooks."""
    weights = [p for module in modules for p in module.parameters()]
    plain = all(type(p) in (Tensor, nn.Parameter) for p in weights)
    return plain and not any(_is_watched(module) for module in modules)


def _is_watched(module: nn.Module) -> bool:
    """Checks for hooks, on the module or global, and for a replaced `forward`."""
    if "forward" in vars(module):
        return True
    return any(
        getattr(module, f"_{kind}_hooks") or getattr(torch_module, f"_global_{kind}_hooks")
        for kind in _KINDS
    )
