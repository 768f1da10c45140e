"""How the CPU paths cut a map of tokens into chunks that stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from featkd.environment import multiplies_bf16
from featkd.reference import accumulation_dtype


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


class TeacherMap:
    """The teacher's map, a chunk at a time: a view of it, or the product of its factors.

    A chunk of the product is written over the one before, so that no whole map exists. The mse
    without a norm could also be had from products of the small factors alone, as a difference of
    sums as large as ||T||^2: loss and gradients of (32, 196, 192) -> 384 took 0.59, 0.73 and 1.01
    of the time with the map at k = 32, 64 and 96, and restored chunks 0.99, 1.12 and 1.16. But
    where ||E||^2 is 1e-4 of ||T||^2, near the end of a training, float32 products left the loss
    with an error of up to 3e-4 for 1e-7, and the gradients with 3 to 10 times theirs.

    Args:
        teacher: (B, N, C), or the left factor (B, N, k).
        right: None, or the right factor (B, C, k).
        dtype: the product's.
    """

    def __init__(self, teacher: Tensor, right: Tensor | None, dtype: torch.dtype) -> None:
        self.teacher = teacher
        self.right = right
        self.dtype = dtype
        self.buffer: Tensor | None = None

    def __getitem__(self, at: tuple[slice, slice]) -> Tensor:
        """Of `row_chunks`, the first being the largest. Good until the next one is asked for."""
        chunk = self.teacher[at]
        if self.right is None:
            return chunk
        images, tokens, _ = chunk.shape
        right = self.right[at[0]].to(self.dtype)
        if self.buffer is None:
            self.buffer = chunk.new_empty(images * tokens * right.shape[1], dtype=self.dtype)
        place = self.buffer[: images * tokens * right.shape[1]].view(images, tokens, -1)
        return torch.bmm(chunk.to(self.dtype), right.mT, out=place)


def product_dtype(x: Tensor) -> torch.dtype:
    """What maps like `x` are multiplied in: bf16 where they are and the processor does, which is
    4 times as fast on one with AMX; else the accumulators' type, as torch's products of half types
    take many times as long there."""
    if x.dtype == torch.bfloat16 and multiplies_bf16(x.device):
        return torch.bfloat16
    return accumulation_dtype(x.dtype)


def keeps_product(x: Tensor) -> bool:
    """Whether a forward pass leaves its product with maps like `x`, of their dtype, to the backward
    pass: where it is multiplied in that dtype."""
    return product_dtype(x) == x.dtype


def put_product(a: Tensor, b: Tensor, place: Tensor) -> None:
    """Write a b to `place`, of any dtype, through no copy where it is of theirs."""
    if place.dtype == a.dtype:
        torch.mm(a, b, out=place)
    else:
        place.copy_(a @ b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, whose dtype may be another."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
