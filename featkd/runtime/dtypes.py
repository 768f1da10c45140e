"""Dtypes in which the ops accumulate and return."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def widest_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Returns the promoted dtype of the tensors; at least one must not be None."""
    dtypes = {x.dtype for x in tensors if x is not None}
    return dtypes.pop() if len(dtypes) == 1 else reduce(torch.promote_types, dtypes)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float64 for float64, float32 for all narrower floating-point dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32
