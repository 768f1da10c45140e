"""From a PIL image to a normalised tensor, with random decisions that only the key fixes."""

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
from torch import Tensor
from torch.utils.data import get_worker_info

from featkd.data.config import DataConfig
from featkd.runtime.seeding import derive_seed

Transform = Callable[[Image.Image], Tensor]

AUGMENTATION_VERSION = 1
"""Raised whenever featkd gives other pixels for the same key and configuration."""


def build_transform(config: DataConfig, *, training: bool) -> Transform:
    """timm's transform: an RGB PIL image of any size -> (3, img_size, img_size) float32.

    Training: random resized crop, flip, RandAugment or colour jitter, normalise, random erasing.
    Evaluation: the shorter side resized to img_size / crop_pct, central crop, normalise.

    Args:
        config: sizes, filter, statistics and augmentation.
        training: which of the two.

    Returns:
        A picklable callable. In training it draws from the global generators of `random`,
        `numpy.random` and `torch`: call it inside `seeded`.
    """
    shared: dict[str, Any] = {
        "input_size": config.img_size,
        "interpolation": config.interpolation,
        "mean": config.mean,
        "std": config.std,
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
        if isinstance(step, RandAugment):
            for op in step.ops:
                if op.aug_fn is timm_posterize:
                    op.aug_fn = _posterize
    return cast(Transform, transform)


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """timm's posterize that still takes 0 bits.

    timm's increasing posterize keeps 4 - int(0.4 * level) bits. The level is drawn from N(9, 0.5)
    and clipped at 10, so it is exactly 10, and 0 bits are kept, in 2.3 % of its uses: one image in
    660 under "rand-m9-n2-mstd0.5-inc1". Pillow once masked every bit away and gave an all-black
    image, and the published runs trained on those; Pillow 13 raises ValueError. Black it stays,
    so that the distribution is the published one.
    """
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return cast(Image.Image, timm_posterize(image, bits_to_keep, **kwargs))


@contextlib.contextmanager
def seeded(seed: int, key: tuple[int, ...], *, restore: bool | None = None) -> Iterator[None]:
    """Seed `random`, `numpy.random` and `torch` (CPU) from (seed, key) alone.

    timm draws from all three: crops, RandAugment's levels and erasing's box from `random`,
    RandAugment's choice of ops from `numpy.random`, flips, jitter and erasing's noise from torch.

    Args:
        seed: seed of the run.
        key: the `Key` of a sample, or whole numbers of another length for something else.
        restore: put the three states back afterwards. Default: only in the training process
            (workers=0); a worker process has no other user of them, and saving numpy's state
            costs ten times the seeding.
    """
    derived = derive_seed(seed, *key)
    if restore is None:
        restore = get_worker_info() is None
    with kept_generators() if restore else contextlib.nullcontext():
        random.seed(derived)
        np.random.seed(derived & 0xFFFFFFFF)
        # Not torch.manual_seed: it also reaches for every accelerator, 90 us a call.
        torch.default_generator.manual_seed(derived >> 31)
        yield


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Put the states of `random`, `numpy.random` and `torch` (CPU) back at the end."""
    python_state, torch_state = random.getstate(), torch.default_generator.get_state()
    numpy_state = np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)
