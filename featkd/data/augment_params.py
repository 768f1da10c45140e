"""Everything random about a training sample, drawn as timm's transform draws it, without pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.data.auto_augment import AugmentOp, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import Compose

from featkd.data.augment import build_transform, seeded
from featkd.data.config import DataConfig
from featkd.data.sampler import Key


class Operation(NamedTuple):
    """An operation of RandAugment, by timm's name and arguments: Operation("Rotate", (27.0,))."""

    name: str
    arguments: tuple[float, ...]


@dataclass
class Decisions:
    """How one sample is made from its image.

    Attributes:
        window: top, left, height, width in the image as stored.
        size: height, width that the window is resized to.
        crop: top, left of the final image in it.
        flip: whether it is mirrored, before RandAugment.
        operations: RandAugment's, in order; those that its probability left out are not there.
        erased: (index, values) to write into the normalised (3, H, W) image.
    """

    window: tuple[int, int, int, int]
    size: tuple[int, int]
    crop: tuple[int, int]
    flip: bool = False
    operations: list[Operation] = field(default_factory=list)
    erased: list[tuple[Any, Tensor]] = field(default_factory=list)


class TrainingDecisions:
    """Draws what `build_transform(config, training=True)` would, by the same calls of timm.

    Args:
        config: sizes and augmentation; without colour jitter.
        seed: seed of the run.

    Attributes:
        operations: timm's names of the operations that RandAugment picks from.
        layers: how many it applies to an image.
        fill: red, green and blue (0..255) of what an operation moves in from outside the image.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        transform = build_transform(config, training=True)
        assert isinstance(transform, Compose)
        steps = transform.transforms
        self._rand_augment = next((s for s in steps if isinstance(s, RandAugment)), None)
        self._erase = next((s for s in steps if isinstance(s, RandomErasing)), None)
        ops: list[AugmentOp] = [] if self._rand_augment is None else self._rand_augment.ops
        for op in ops:
            op.aug_fn = partial(_record, op.name)
        self.operations = [op.name for op in ops]
        self.layers = 0 if self._rand_augment is None else self._rand_augment.num_layers
        self.fill: tuple[int, int, int] = ops[0].kwargs["fillcolor"] if ops else (0, 0, 0)

    def draw(self, size: tuple[int, int], key: Key) -> Decisions:
        """The decisions for an image of this (width, height).

        It leaves the global generators seeded: call it inside `kept_generators`, once a batch.
        """
        config = self._config
        side = config.img_size
        augment = config.augment
        # timm asks an image for its size; this one takes no memory
        sized = torch.empty(1).expand(1, size[1], size[0])
        with seeded(self._seed, key, restore=False):
            top, left, height, width = RandomResizedCropAndInterpolation.get_params(
                sized, augment.scale, augment.ratio
            )
            decisions = Decisions((top, left, height, width), (side, side), (0, 0))
            decisions.flip = augment.hflip > 0 and bool(torch.rand(1) < augment.hflip)
            if self._rand_augment is not None:
                self._rand_augment(decisions.operations)
            if self._erase is not None:
                recorder = _Recorder()
                self._erase._erase(recorder, 3, side, side, torch.float32)
                decisions.erased = recorder.writes
        return decisions


def evaluation_decisions(size: tuple[int, int], side: int, crop_pct: float) -> Decisions:
    """The shorter side to side / crop_pct, then the centre, rounded as torchvision does.

    Args:
        size: width and height of the image.
        side: height and width of the result.
        crop_pct: share of the shorter side that is kept.
    """
    width, height = size
    shorter = int(side / crop_pct)
    longer = int(shorter * max(size) / min(size))
    resized = (shorter, longer) if height <= width else (longer, shorter)
    crop = tuple(round((length - side) / 2.0) for length in resized)
    return Decisions((0, 0, height, width), resized, (crop[0], crop[1]))


def _record(name: str, operations: list[Operation], *arguments: float, **_: Any) -> list[Operation]:
    """Stands where timm has the function that changes an image."""
    operations.append(Operation(name, arguments))
    return operations


class _Recorder:
    """Takes what would be written into an image."""

    def __init__(self) -> None:
        self.writes: list[tuple[Any, Tensor]] = []

    def __setitem__(self, where: Any, pixels: Tensor) -> None:
        self.writes.append((where, pixels))
