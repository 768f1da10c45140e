"""Random augmentation parameters of a batch, drawn with timm's probabilities, without pixels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featkd.data.config import DataConfig
from featkd.data.draws import uniforms
from featkd.data.rand_augment import Floats, RandAugmentSampler, timm_rand_augment

_TRIES = 10  # windows tried before the central one, as in timm
_CROP = 2 * _TRIES + 2  # numbers for a window: areas, aspect ratios, and its place


class AugmentParams(NamedTuple):
    """Parameters that turn B images into samples; the steps are in the order of the fields.

    Attributes:
        source_box: (B, 4) int32, top, left, height, width of the region that is read from each
            stored image.
        resize_to: (B, 2) int32, height and width to which the region is resized.
        crop_offset: (B, 2) int32, top and left of the final crop in the resized region.
        flip: (B,) bool, flips the crop horizontally.
        ops: (B, num_ops) int64, RandAugment's operations in order; see `RandAugmentSampler.sample`.
        arguments: (B, num_ops) float64, their arguments.
    """

    source_box: NDArray[np.int32]
    resize_to: NDArray[np.int32]
    crop_offset: NDArray[np.int32]
    flip: NDArray[np.bool_]
    ops: NDArray[np.int64]
    arguments: Floats


class AugmentParamSampler:
    """Draws the parameters of training samples; equal parameters for equal keys.

    timm and torchvision draw the same distributions, one image after the other.

    Args:
        config: sizes and augmentation; color jitter is drawn elsewhere.
        seed: seed of the run.

    Attributes:
        op_names: timm's names of the operations that RandAugment chooses from, without suffixes.
        num_ops: number of operations that RandAugment applies per image.
        op_options: timm's keyword arguments for all operations: filter and fill color.

    Raises:
        ValueError: RandAugment cannot be drawn as configured.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        timms = timm_rand_augment(config)
        self._rand_augment = RandAugmentSampler(timms)
        self.op_names, self.num_ops = self._rand_augment.names, self._rand_augment.num_ops
        self.op_options: dict[str, Any] = timms.ops[0].kwargs

    @property
    def fill_color(self) -> tuple[int, int, int]:
        """Red, green and blue (0..255) that geometric operations fill with."""
        color: tuple[int, int, int] = self.op_options.get("fillcolor", (0, 0, 0))
        return color

    def sample(self, sizes: ArrayLike, keys: ArrayLike) -> AugmentParams:
        """Draws the parameters of a batch.

        Args:
            sizes: (B, 2), width and height of each stored image.
            keys: (B, 3), the `SampleKey` of each.
        """
        config = self._config
        count = _CROP + 1 + self._rand_augment.count
        numbers = uniforms(self._seed, keys, count, purpose="augment")
        side, b = config.img_size, len(numbers)
        ops, arguments = self._rand_augment.sample(numbers[:, _CROP + 1 :])
        return AugmentParams(
            draw_crops(
                np.asarray(sizes, np.float64).reshape(b, 2),
                numbers[:, :_CROP],
                config.augment.scale,
                config.augment.ratio,
            ),
            np.full((b, 2), side, np.int32),
            np.zeros((b, 2), np.int32),
            numbers[:, _CROP] < config.augment.hflip,
            ops,
            arguments,
        )


def draw_crops(
    sizes: Floats, numbers: Floats, scale: tuple[float, float], ratio: tuple[float, float]
) -> NDArray[np.int32]:
    """Turns uniform numbers into windows of random area and aspect ratio.

    A window has an area uniform in `scale` times the image's, and a uniform logarithm of its aspect
    ratio. The first of ten that fits the image is taken, at a uniform place; otherwise the largest
    central window with an aspect ratio within `ratio`. Windows have at least one pixel: timm rounds
    some of them to 0 in images of a few pixels.

    Args:
        sizes: (B, 2), widths and heights.
        numbers: (B, 22), uniform in [0, 1).
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.

    Returns:
        (B, 4): top, left, height, width.
    """
    width, height = sizes[:, :1], sizes[:, 1:]
    area = (scale[0] + (scale[1] - scale[0]) * numbers[:, :_TRIES]) * (width * height)
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * numbers[:, _TRIES : 2 * _TRIES])
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    first = ((widths <= width) & (heights <= height)).argmax(1)[:, None]
    tried_width = np.take_along_axis(widths, first, 1)
    tried_height = np.take_along_axis(heights, first, 1)
    fits = (tried_width <= width) & (tried_height <= height)
    w = np.where(fits, tried_width, np.minimum(width, np.rint(height * ratio[1])))
    h = np.where(fits, tried_height, np.minimum(height, np.rint(width / ratio[0])))
    w, h = np.maximum(w, 1), np.maximum(h, 1)
    free = np.hstack((height - h, width - w))
    place = np.where(fits, np.floor(numbers[:, 2 * _TRIES :] * (free + 1)), free // 2)
    boxes: NDArray[Any] = np.hstack((place, h, w))
    return boxes.astype(np.int32)


def evaluation_params(sizes: ArrayLike, side: int, crop_pct: float) -> AugmentParams:
    """Returns the parameters of the central crop, rounded as torchvision rounds.

    Args:
        sizes: (B, 2), width and height of each image.
        side: height and width of the result.
        crop_pct: fraction of the shorter side that is kept.
    """
    shapes = np.asarray(sizes, np.int64).reshape(-1, 2)[:, ::-1]
    shorter = int(side / crop_pct)
    resized = (shorter * shapes / shapes.min(1, keepdims=True)).astype(np.int32)
    offset = np.rint((resized - side) / 2.0).astype(np.int32)
    b = len(shapes)
    return AugmentParams(
        np.hstack((np.zeros_like(shapes), shapes)).astype(np.int32),
        resized,
        offset,
        np.zeros(b, np.bool_),
        np.empty((b, 0), np.int64),
        np.empty((b, 0)),
    )
