"""How the CPU paths cut a map of tokens into chunks that stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor


def row_chunks(batch: int, tokens: int, rows: int, width: int = 1) -> list[tuple[slice, slice]]:
    """Slices of the images and of their tokens that cover (batch, tokens), `rows` each at most, in
    whole image rows of `width` tokens, at least one.

    Whole images where one fits, so that an expanded or transposed map is copied a chunk at a time.

    Example:
        >>> row_chunks(3, 2, 4)
        [(slice(0, 2, None), slice(None, None, None)), (slice(2, 4, None), slice(None, None, None))]
    """
    if tokens <= rows:
        images = max(1, rows // max(1, tokens))
        return [(slice(i, i + images), slice(None)) for i in range(0, batch, images)]
    step = max(1, rows // width) * width
    steps = range(0, tokens, step)
    return [(slice(i, i + 1), slice(n, n + step)) for i in range(batch) for n in steps]


def put_product(a: Tensor, b: Tensor, place: Tensor) -> None:
    """Write a b to `place`, of any dtype, through no copy where it is of theirs."""
    if place.dtype == a.dtype:
        torch.mm(a, b, out=place)
    else:
        place.copy_(a @ b)
