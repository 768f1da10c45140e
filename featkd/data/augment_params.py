"""Random augmentation parameters of a sample, drawn as timm draws them, without pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.data.auto_augment import AugmentOp, RandAugment
from torchvision.transforms import Compose

from featkd.data.augment import build_transform, draw_crop, seeded
from featkd.data.config import DataConfig
from featkd.data.sampler import SampleKey


class RandAugmentOp(NamedTuple):
    """A RandAugment operation with timm's name and arguments: RandAugmentOp("Rotate", (27.0,))."""

    name: str
    arguments: tuple[float, ...]


@dataclass
class AugmentParams:
    """Parameters that turn an image into one sample; the steps are in the order of the fields.

    Attributes:
        source_box: top, left, height, width of the region that is read from the stored image.
        resize_to: height, width to which the region is resized.
        crop_offset: top, left of the final crop in the resized region.
        flip: whether the crop is flipped horizontally.
        operations: RandAugment operations in order, without those skipped by their probability.
    """

    source_box: tuple[int, int, int, int]
    resize_to: tuple[int, int]
    crop_offset: tuple[int, int]
    flip: bool = False
    operations: list[RandAugmentOp] = field(default_factory=list)


class AugmentParamSampler:
    """Draws the parameters that `build_transform(config, training=True)` would use.

    It makes the same calls to timm in the same order, so both draw equal values.

    Args:
        config: sizes and augmentation, without color jitter.
        seed: seed of the run.

    Attributes:
        op_names: timm's names of the operations that RandAugment chooses from.
        num_ops: number of operations that RandAugment applies per image.
        fill_color: red, green and blue (0..255) that geometric operations fill with.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        transform = build_transform(config, training=True, normalize=False)
        assert isinstance(transform, Compose)
        steps = transform.transforms
        self._rand_augment = next((s for s in steps if isinstance(s, RandAugment)), None)
        ops: list[AugmentOp] = [] if self._rand_augment is None else self._rand_augment.ops
        for op in ops:
            op.aug_fn = partial(_record, op.name)
        self.op_names = [op.name for op in ops]
        self.num_ops = 0 if self._rand_augment is None else self._rand_augment.num_layers
        self.fill_color: tuple[int, int, int] = ops[0].kwargs["fillcolor"] if ops else (0, 0, 0)

    def sample(self, size: tuple[int, int], key: SampleKey) -> AugmentParams:
        """Draws the parameters for an image of `size` (width, height).

        The global generators are left seeded. Wrap the calls for a batch in one
        `preserve_rng_state`.
        """
        config = self._config
        side = config.img_size
        augment = config.augment
        # timm reads only the image's shape, so an expanded tensor without memory will do.
        image = torch.empty(1).expand(1, size[1], size[0])
        with seeded(self._seed, key, restore=False):
            window = draw_crop(image, augment.scale, augment.ratio)
            params = AugmentParams(window, (side, side), (0, 0))
            params.flip = augment.hflip > 0 and bool(torch.rand(1) < augment.hflip)
            if self._rand_augment is not None:
                self._rand_augment(params.operations)
        return params


def evaluation_params(size: tuple[int, int], side: int, crop_pct: float) -> AugmentParams:
    """Returns the parameters of the central crop, rounded as torchvision rounds.

    Args:
        size: width and height of the image.
        side: height and width of the result.
        crop_pct: fraction of the shorter side that is kept.
    """
    width, height = size
    shorter = int(side / crop_pct)
    longer = int(shorter * max(size) / min(size))
    resized = (shorter, longer) if height <= width else (longer, shorter)
    top, left = (round((length - side) / 2.0) for length in resized)
    return AugmentParams((0, 0, height, width), resized, (top, left))


def _record(
    name: str, operations: list[RandAugmentOp], *arguments: float, **_: Any
) -> list[RandAugmentOp]:
    """Records an operation; replaces timm's function, with the list in place of the image."""
    operations.append(RandAugmentOp(name, arguments))
    return operations
