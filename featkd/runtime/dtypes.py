"""Dtypes in which ops accumulate and return."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def widest_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype that holds all values of the tensors; at least one is not None."""
    dtypes = {x.dtype for x in tensors if x is not None}
    return dtypes.pop() if len(dtypes) == 1 else reduce(torch.promote_types, dtypes)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
