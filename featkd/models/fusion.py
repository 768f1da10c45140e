"""Checks whether a fused op may replace a model's modules."""

from __future__ import annotations

from typing import Any

from timm.layers import LayerNorm
from torch import nn

from featkd.ops.plain_modules import are_plain


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
    return are_plain(projection, *norms)


def can_bypass(*linears: Any) -> bool:
    """Checks whether these are Linears with bias whose weights may be used without a call."""
    known = all(type(linear) is nn.Linear and linear.bias is not None for linear in linears)
    return known and are_plain(*linears)
