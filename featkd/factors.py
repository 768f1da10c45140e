"""A feature map in two thin factors: the type that the losses take, and what it stands for.

`featkd.lowrank` makes them; they lie here, below the layers that take them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """Feature maps (B, N, C) as `left @ right.mT`, image by image.

    Attributes:
        left: (B, N, k), U_k S_k of each image's own rank, and zeros beyond it.
        right: (B, C, k), V_k, orthonormal columns, and zeros beyond the image's rank.

    Notes:
        The losses ask for neither orthonormal nor ordered columns, only for the product. The
        dtypes may differ from each other's and from the student's.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> torch.Size:
        """(B, N, C) of the maps."""
        return torch.Size((*self.left.shape[:2], self.right.shape[1]))


def restore(factors: LowRank, dtype: torch.dtype | None = None) -> Tensor:
    """The maps (B, N, C) that the factors stand for, multiplied in `dtype` (the wider of theirs).

    Example:
        >>> import torch
        >>> restore(LowRank(torch.ones(1, 2, 1), torch.ones(1, 3, 1)))
        tensor([[[1., 1., 1.],
                 [1., 1., 1.]]])
    """
    left, right = factors
    kind = torch.promote_types(left.dtype, right.dtype) if dtype is None else dtype
    return torch.bmm(left.to(kind), right.to(kind).mT)
