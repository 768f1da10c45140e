"""Distance of a feature map from a teacher's, in Triton: one row kernel forward, one backward.

With P the feature map (the output of a linear layer, or the student's own map) and LN a LayerNorm
or the identity:

    x_hat = (P - mean) rstd        Y = gamma x_hat + beta        E = Y - T
    loss  = scale sum(E H)         pooled = mean of Y over each image's tokens
    H = E for the mse; for the spectral metric
    H = E + (1/W) sum_w E [+ (-1)^w (1/W) sum_w (-1)^w E if W is even]

The backward pass, with u and v the gradients of loss and pooled, computes dY = 2 scale u H + v / N,
g = gamma dY, dP = rstd (g - mean(g) - x_hat mean(g x_hat)), dgamma = sum(dY x_hat) and
dbeta = sum(dY) ([EM26], feature losses; docs/method.md).

Memory traffic: the forward pass reads P and T; the backward pass reads them again and writes dP.
The forward pass also keeps four numbers per row, so that the backward pass needs no sum over
channels. Rows that take several blocks of channels are read again from the L1 or L2 cache.

As many programs as fit the GPU at once share the tiles of all images; with a pooled map, the tiles
of a program lie in one image. The number of programs depends on the shapes and the GPU alone, so
results repeat bitwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from featkd.kernels.distance_kernels import distance_backward, distance_forward
from featkd.kernels.launch import channels_adjacent, launch, processors, triton_type
from featkd.kernels.reduce import add_up, norm_gradients
from featkd.runtime.dtypes import accumulation_dtype, widest_dtype

MOST_COLUMNS = 128
"""Largest width of a patch grid for the spectral metric: a tile holds whole image rows."""


@dataclass(frozen=True)
class Config:
    """Tile sizes: image rows, columns (padded to a power of two), channels; and warps."""

    image_rows: int
    columns: int
    block: int
    num_warps: int

    def sum_rows(self, channels: int) -> int:
        """Rows of the accumulators for sums over rows: the tile's, or one per channel block."""
        blocks = -(-channels // self.block)
        return self.image_rows * self.columns if blocks == 1 else triton.next_power_of_2(blocks)


@lru_cache(maxsize=256)
def config(height: int, width: int, channels: int, itemsize: int) -> Config:
    """Returns tiles of about 2,048 elements, 16 per thread.

    A thread then has two 16-byte loads of each bf16 map in flight, and three or four programs fit
    a multiprocessor: some 24 KB in flight, which is the bandwidth times the latency of an H100.

    Args:
        height, width: image rows, and tokens per image row; width is 1 for the mse.
        itemsize: bytes of an accumulator; float64 halves the tiles.
    """
    whole = triton.next_power_of_2(channels)
    columns = triton.next_power_of_2(width)
    if columns == 1:
        block = whole
        image_rows = max(1, 8192 // itemsize // block)
    else:
        most = min(max(16, whole), 8192 // itemsize // max(16, columns))
        # padding costs work, and so does every block: 192 is cut by 64, 384 by 128
        sizes = [size for size in (16, 32, 64, 128) if size <= max(16, most)]
        block = min(sizes, key=lambda size: (-(-channels // size) * (size + 16), -size))
        image_rows = max(1, 16 // columns)
    image_rows = min(image_rows, triton.next_power_of_2(height))
    return Config(image_rows, columns, block, 8 if image_rows * columns * block > 2048 else 4)


@lru_cache(maxsize=256)
def grid(
    chosen: Config,
    images: int,
    height: int,
    width: int,
    resident: int,
    *,
    per_image: bool,
    sums: bool,
) -> tuple[int, ...]:
    """Returns the launch grid: at most as many programs as fit the GPU at once.

    Each program that forms sums over rows writes a vector over channels, so it gets 16 rows or
    more: with fewer, the sums would be more than a sixth of the traffic.

    Args:
        height, width: as for `config`.
        resident: programs that fit the GPU at once.
        per_image: a mean over each image is formed; the grid is (images, programs per image).
        sums: gradients of a norm are formed.
    """
    tiles = -(-height // chosen.image_rows)
    rows_allow = max(1, height * width // 16)
    if per_image:  # the fewest rounds over all images, times the tiles of a program
        return images, min(
            range(1, min(tiles, rows_allow) + 1),
            key=lambda n: (-(-images * n // resident) * -(-tiles // n), n),
        )
    return (min(resident, images * tiles, images * rows_allow if sums else resident),)


def _shared(
    feature: Tensor,
    teacher: Tensor | None,
    width: int,
    *,
    pooled: bool,
    per_image: bool,
    sums: bool,
) -> tuple[tuple[int, ...], dict[str, Any], dict[str, int]]:
    """Returns the grid, and the arguments and options that both kernels take.

    Args:
        pooled: a mean over each image, or its gradient, is computed; it takes registers.
        per_image, sums: as for `grid`.
    """
    images, tokens, channels = feature.shape
    row_tokens = width or 1
    acc = accumulation_dtype(feature.dtype)
    height = tokens // row_tokens
    chosen = config(height, row_tokens, channels, acc.itemsize)
    threads = 384 if width and (pooled or channels > 1024) else 512
    resident = max(1, threads // (32 * chosen.num_warps)) * processors(feature.device)
    options = {"num_warps": chosen.num_warps, "threads": threads}
    divisor = images * tokens * channels
    if width:  # the mean over real and imaginary parts; the half spectrum has half of sum(E H)
        divisor = 4 * images * channels * (tokens // width) * (width // 2 + 1)
    arguments = {
        "feature": feature,
        "teacher": teacher,
        "feature_image": feature.stride(0),
        "feature_token": feature.stride(1),
        "teacher_image": 0 if teacher is None else teacher.stride(0),
        "teacher_token": 0 if teacher is None else teacher.stride(1),
        "images": images,
        "height": height,
        "width": row_tokens,
        "loss_divisor": divisor,
        "C": channels,
        "BLOCK": chosen.block,
        "SUMS": chosen.sum_rows(channels),
        "HB": chosen.image_rows,
        "WB": chosen.columns,
        "SPECTRAL": width > 0,
        "ACC": triton_type(acc),
    }
    programs = grid(chosen, images, height, row_tokens, resident, per_image=per_image, sums=sums)
    return programs, arguments, options


def forward(
    feature: Tensor,
    teacher: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    width: int,
    pooled_dtype: torch.dtype | None,
    needed: bool,
) -> tuple[Tensor, ...]:
    """Returns loss, pooled map and statistics for `backward`; each is empty if not requested.

    Tensors whose channels are not adjacent are copied.

    Args:
        feature: (B, N, C), not empty.
        teacher: (B, N, C), or None for no loss.
        gamma, beta: (C,), or None; no LayerNorm without gamma.
        eps: LayerNorm's epsilon.
        width: columns of the patch grid for the spectral metric, 0 for the mse.
        pooled_dtype: dtype of the mean of Y over the tokens, (B, C); None for no pooled map.
        needed: a gradient will be needed: with a LayerNorm, returns statistics (4, B, N).
    """
    feature = channels_adjacent(feature)
    teacher, gamma, beta = (
        None if x is None else channels_adjacent(x) for x in (teacher, gamma, beta)
    )
    pool = pooled_dtype is not None
    programs, shared, options = _shared(
        feature, teacher, width, pooled=pool, per_image=pool, sums=False
    )
    images, tokens, channels = feature.shape
    acc = accumulation_dtype(feature.dtype)
    loss = loss_partial = pooled = pooled_partial = statistics = None
    if teacher is not None:
        loss_partial = feature.new_empty(math.prod(programs), dtype=acc)
        loss = feature.new_empty((), dtype=acc)
    if pool:
        pooled_partial = feature.new_empty(images, programs[1], channels, dtype=acc)
        pooled = feature.new_empty(images, channels, dtype=pooled_dtype)
    if needed and gamma is not None:
        statistics = feature.new_empty(4, images, tokens, dtype=acc)
    launch(
        distance_forward,
        programs,
        {
            **shared,
            "gamma": gamma,
            "beta": beta,
            "loss_partial": loss_partial,
            "pooled_partial": pooled_partial,
            "statistics": statistics,
            "NORM": gamma is not None,
            "EPS": eps,
        },
        **options,
    )
    add_up(pooled_partial, pooled, loss_partial, loss, weight=gamma, bias=beta, divisor=tokens)
    return tuple(feature.new_empty(0) if x is None else x for x in (loss, pooled, statistics))


def backward(
    d_loss: Tensor | None,
    d_pooled: Tensor | None,
    feature: Tensor,
    teacher: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    statistics: Tensor,
    width: int,
    need_norm: bool,
) -> tuple[Tensor, Tensor]:
    """Returns gradients of the feature map and of gamma and beta, (1 or 2, C).

    The second one is empty without `need_norm` or without a norm.

    Args:
        d_loss: (), any floating dtype; None if the loss has no gradient.
        d_pooled: (B, C), any floating dtype; None if the pooled map has no gradient.
        others: as for `forward`, with the statistics that it returned.
    """
    feature = channels_adjacent(feature)
    teacher = None if d_loss is None else teacher
    teacher, gamma, beta, d_pooled = (
        None if x is None else channels_adjacent(x) for x in (teacher, gamma, beta, d_pooled)
    )
    programs, shared, options = _shared(
        feature, teacher, width, pooled=d_pooled is not None, per_image=False, sums=need_norm
    )
    d_feature = torch.empty(feature.shape, dtype=feature.dtype, device=feature.device)
    parameters = [p for p in (gamma, beta) if p is not None and need_norm]
    partial = None
    if parameters:
        size = (programs[0], len(parameters), feature.shape[2])
        partial = feature.new_empty(size, dtype=accumulation_dtype(feature.dtype))
    launch(
        distance_backward,
        programs,
        {
            **shared,
            "gamma": gamma,
            "beta": beta,
            "statistics": None if gamma is None else statistics,
            "d_loss": d_loss,
            "d_pooled": d_pooled,
            "d_feature": d_feature,
            "norm_partial": partial,
            "pooled_image": 0 if d_pooled is None else d_pooled.stride(0),
            "NORM": gamma is not None,
        },
        **options,
    )
    if partial is None:
        return d_feature, feature.new_empty(0)
    return d_feature, norm_gradients(partial, widest_dtype(*parameters))
