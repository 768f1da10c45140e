"""Checks whether modules may be replaced by an op that reads their parameters."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_KINDS = ("forward", "forward_pre", "backward", "backward_pre")


def are_plain(*modules: nn.Module) -> bool:
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
