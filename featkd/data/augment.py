"""Transforms from PIL images to normalized tensors, and the seeding of their randomness."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.transforms.functional import get_image_size

from featkd.data.config import DataConfig
from featkd.runtime.seeding import derive_seed

Transform = Callable[[Image.Image], Tensor]

AUGMENTATION_VERSION = 2
"""Incremented whenever featkd draws another augmentation for the same key and configuration.

Version 1 drew each sample with timm's generators. Version 2 hashes the key (`featkd.data.draws`).
"""


def build_transform(config: DataConfig, *, training: bool, normalize: bool = True) -> Transform:
    """Builds timm's transform from an RGB PIL image to (3, img_size, img_size) float32.

    Training: random resized crop, flip, RandAugment or color jitter, normalize, random erasing.
    Evaluation: resize the shorter side to img_size / crop_pct, central crop, normalize.

    Args:
        config: sizes, filter, statistics and augmentation.
        training: selects the training transform.
        normalize: False stops before the last two steps and returns uint8, as the loaders' workers
            do; the loaders normalize and erase whole batches, with other draws for the erased
            boxes than this function's.

    Returns:
        A picklable callable. In training it draws from the global generators of `random`,
        `numpy.random` and `torch`, so call it inside `seeded`.
    """
    shared: dict[str, Any] = {
        "input_size": config.img_size,
        "interpolation": config.interpolation,
        "mean": config.mean,
        "std": config.std,
        "normalize": normalize,
    }
    if not training:
        return cast(Transform, create_transform(**shared, crop_pct=config.crop_pct))
    augment = config.augment
    transform = create_transform(
        **shared,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.rand_augment,
        re_prob=augment.random_erasing,
        re_mode="pixel",
        re_count=1,
    )
    for step in transform.transforms:
        if isinstance(step, RandomResizedCropAndInterpolation):
            step.get_params = draw_crop
        if isinstance(step, RandAugment):
            for op in step.ops:
                if op.aug_fn is timm_posterize:
                    op.aug_fn = _posterize
    return cast(Transform, transform)


def draw_crop(
    image: Image.Image | Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draws timm's random crop with at least one pixel; returns top, left, height and width.

    In images of a few pixels timm rounds some heights and widths to 0. torchvision then returns a
    black image, and DALI fails.
    """
    draw = RandomResizedCropAndInterpolation.get_params
    top, left, height, width = draw(image, scale, ratio)
    if height < 1 or width < 1:
        image_width, image_height = get_image_size(image)
        height, width = max(height, 1), max(width, 1)
        top, left = min(top, image_height - height), min(left, image_width - width)
    return top, left, height, width


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """timm's posterize, which also accepts 0 bits and then returns a black image.

    timm's increasing posterize keeps 4 - int(0.4 * level) bits. With "rand-m9-n2-mstd0.5-inc1" the
    level is clipped at 10, which leaves 0 bits, in 2.3 % of its uses (one image in 660). Old
    versions of Pillow returned a black image, and the published runs trained on those. Pillow 13
    raises ValueError.
    """
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return cast(Image.Image, timm_posterize(image, bits_to_keep, **kwargs))


@contextlib.contextmanager
def seeded(seed: int, key: tuple[int, ...], *, restore: bool | None = None) -> Iterator[None]:
    """Seeds `random`, `numpy.random` and `torch` (CPU) from (seed, key).

    timm draws from all three: crops, RandAugment levels and erased boxes from `random`, the choice
    of RandAugment operations from `numpy.random`, flips, jitter and erasing noise from torch.

    Args:
        seed: seed of the run.
        key: the `SampleKey` of a sample, or integers of another number for other draws.
        restore: restore the three generators afterwards. By default only in the training process
            (workers=0), because nothing else draws in a worker and saving numpy's state costs ten
            times the seeding.
    """
    derived = derive_seed(seed, *key)
    if restore is None:
        restore = get_worker_info() is None
    with preserve_rng_state() if restore else contextlib.nullcontext():
        random.seed(derived)
        np.random.seed(derived & 0xFFFFFFFF)
        # Not torch.manual_seed, which also seeds every accelerator and takes 90 us.
        torch.default_generator.manual_seed(derived >> 31)
        yield


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restores the states of `random`, `numpy.random` and `torch` (CPU) on exit."""
    python_state, torch_state = random.getstate(), torch.default_generator.get_state()
    numpy_state = np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)
