"""Transforms from PIL images to tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torchvision.transforms.functional as F
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP
from torch import Tensor
from torchvision.transforms import InterpolationMode

from featkd.data.augment_params import AugmentParams, AugmentParamSampler
from featkd.data.config import DataConfig
from featkd.data.draws import uniforms
from featkd.data.rand_augment import OPERATIONS
from featkd.data.sampler import SampleKey

Transform = Callable[[Image.Image], Tensor]

AUGMENTATION_VERSION = 2
"""Incremented whenever featkd draws another augmentation for the same key and configuration.

Version 1 drew each sample with timm's generators. Version 2 hashes the key (`featkd.data.draws`).
"""

_WITHOUT_ARGUMENT = ("AutoContrast", "Equalize", "Invert")
_WHOLE_ARGUMENT = ("Posterize", "Solarize", "SolarizeAdd")


def build_transform(config: DataConfig, *, normalize: bool = True) -> Transform:
    """Builds the evaluation transform from an RGB PIL image to (3, img_size, img_size) float32.

    Resizes the shorter side to img_size / crop_pct, crops the centre, and normalizes.

    Args:
        config: sizes, filter and statistics.
        normalize: False leaves out the last step and returns uint8, as the loaders' workers do.

    Returns:
        A picklable callable.
    """
    transform = create_transform(
        config.img_size,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        normalize=normalize,
    )
    return cast(Transform, transform)


class TrainTransform:
    """Training transform from an RGB PIL image and its key to (3, img_size, img_size) uint8.

    Random resized crop, flip, RandAugment, color jitter. timm, torchvision and Pillow do the work
    on pixels. All randomness derives from (seed, key). The loaders normalize and erase batches.

    Args:
        config: sizes, filter and augmentation.
        seed: seed of the run.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._sampler = AugmentParamSampler(config, seed)
        self._filter = InterpolationMode(config.interpolation)

    def __call__(self, image: Image.Image, key: SampleKey) -> Tensor:
        config = self._config
        image = self.apply(image, self._sampler.sample([image.size], [key]))
        if config.augment.color_jitter is not None:
            numbers = uniforms(self._seed, [key], 6, purpose="color_jitter")[0]
            image = _jitter(image, numbers, config.augment.color_jitter)
        return cast(Tensor, F.pil_to_tensor(image))

    def apply(self, image: Image.Image, params: AugmentParams) -> Image.Image:
        """Crops, flips and augments an image with the first of these parameters."""
        top, left, height, width = params.source_box[0].tolist()
        size = params.resize_to[0].tolist()
        image = F.resized_crop(image, top, left, height, width, size, self._filter)
        if params.flip[0]:
            image = F.hflip(image)
        for op, argument in zip(params.ops[0].tolist(), params.arguments[0].tolist(), strict=True):
            if op >= 0:
                image = apply_op(image, OPERATIONS[op], argument, self._sampler.op_options)
        return image


def apply_op(
    image: Image.Image, name: str, argument: float, options: Mapping[str, Any]
) -> Image.Image:
    """Applies an operation of RandAugment with timm's function.

    Args:
        name: one of `OPERATIONS`.
        argument: its argument; ignored if it has none.
        options: timm's filter and fill color for geometric operations.
    """
    if name == "Posterize" and argument < 1:
        # With "rand-m9-n2-mstd0.5-inc1" 2.3 % of its uses keep no bits. Old versions of Pillow
        # returned a black image, and the published runs trained on those. Pillow 13 refuses it.
        return Image.new(image.mode, image.size)
    value = int(argument) if name in _WHOLE_ARGUMENT else argument
    values = () if name in _WITHOUT_ARGUMENT else (value,)
    return cast(Image.Image, NAME_TO_OP[name](image, *values, **options))


def _jitter(image: Image.Image, numbers: NDArray[np.float64], strength: float) -> Image.Image:
    """Changes brightness, contrast and saturation in random order, as torchvision's ColorJitter."""
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = (low + (high - low) * numbers[:3]).tolist()
    for n in np.argsort(numbers[3:]).tolist():
        image = adjust[n](image, factors[n])
    return image
