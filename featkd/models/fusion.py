"""Whether the modules of a model may be left uncalled, for one fused op in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_KINDS = ("forward", "forward_pre", "backward", "backward_pre")


def can_fuse(projection: Any, *norms: Any) -> bool:
    """Whether these do what the fused ops compute, and nobody watches them run.

    A model that finds False calls its modules instead, so that what stands in their place (another
    norm, an adapter, a quantised layer, sharded weights) and hooks have their effect.

    Args:
        projection: to be a Linear without a bias.
        norms: to be LayerNorms of its outputs, with weight and bias, of one epsilon.
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
    """Whether these are Linears with a bias whose weights may be used without calling them."""
    known = all(type(linear) is nn.Linear and linear.bias is not None for linear in linears)
    return known and _are_plain(linears)


def _are_plain(modules: Sequence[Any]) -> bool:
    """Without quantised or sharded weights, and without anybody who watches them run."""
    weights = [p for module in modules for p in module.parameters()]
    plain = all(type(p) in (Tensor, nn.Parameter) for p in weights)
    return plain and not any(_is_watched(module) for module in modules)


def _is_watched(module: nn.Module) -> bool:
    """By a hook, its own or one on all modules, or by a `forward` put over its class's."""
    if "forward" in vars(module):
        return True
    return any(
        getattr(module, f"_{kind}_hooks") or getattr(torch_module, f"_global_{kind}_hooks")
        for kind in _KINDS
    )
