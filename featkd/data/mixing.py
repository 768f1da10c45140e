"""mixup and CutMix of a training batch, on the device that trains."""

from __future__ import annotations

import torch
from timm.data import Mixup

from featkd.data.augment import seeded
from featkd.data.config import AugmentConfig
from featkd.data.loader import Batch

_DRAW = 1  # a fifth part of the seed: a sample's has four, and must not be the same


class Mixer:
    """timm's `Mixup`, with draws that repeat, and a batch of its own.

    Images are paired from both ends: i of B with B - 1 - i, and one draw holds for the whole batch.
    mixup gives lam x_i + (1 - lam) x_j, CutMix puts a rectangle of x_j over x_i; labels become
    lam y_i + (1 - lam) y_j, where what the border cuts off a rectangle does not count.

    Args:
        config: which of the two, and how often.
        classes: K, the model's outputs.
        label_smoothing: spread over the labels before they are mixed; `DistillationLoss` adds none
            to soft labels.
        seed: seed of the run.
        device: where mixing happens and the result lies.

    Example:
        >>> mixer = Mixer(AugmentConfig(mixup=0.8), 3, 0.1, seed=0, device=torch.device("cpu"))
        >>> keys = torch.zeros(4, 3, dtype=torch.int64)
        >>> images, targets = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 2])
        >>> batch = Batch(images, targets, [], keys, keys[:, 1])
        >>> mixer(batch, epoch=0, number=0, rank=0).targets.shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        config: AugmentConfig,
        classes: int,
        label_smoothing: float,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self._seed = seed
        self._device = device
        self._mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            label_smoothing=label_smoothing,
            num_classes=classes,
        )

    def __call__(self, batch: Batch, *, epoch: int, number: int, rank: int) -> Batch:
        """A mixed copy of a batch; nothing random but by the seed and the three numbers.

        Args:
            batch: images (B, 3, H, W) floating, B even, and targets (B,) int64, on any device.
            epoch: of the batch.
            number: of the batch in its epoch.
            rank: of the process, whose batch of that number it is.

        Returns:
            The batch with images as before and targets (B, K) float32, on the mixer's device.

        Raises:
            ValueError: an odd number of images.
        """
        if len(batch.targets) % 2:
            raise ValueError(
                f"batch: {len(batch.targets)} images, of which one has no partner; expected an "
                "even number"
            )
        # timm writes into the images, which may be the loader's own memory or be used again
        images = batch.images.to(self._device, non_blocking=True, copy=True)
        targets = batch.targets.to(self._device, non_blocking=True)
        with seeded(self._seed, (epoch, number, rank, _DRAW), restore=True):
            images, targets = self._mixup(images, targets)
        return batch._replace(images=images, targets=targets)
