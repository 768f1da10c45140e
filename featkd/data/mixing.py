"""mixup and CutMix of a training batch, on the training device."""

from __future__ import annotations

import numpy as np
import torch
from timm.data import Mixup

from featkd.data.config import AugmentConfig
from featkd.data.loader import Batch
from featkd.runtime.seeding import derive_seed

_SEED_PART = 1  # fifth part of the seed; a sample's seed has four parts, so the two differ


class Mixer:
    """timm's `Mixup` with reproducible draws; returns a copy of the batch.

    Image i of B is paired with image j = B - 1 - i. One draw of lam serves the whole batch. mixup
    computes lam x_i + (1 - lam) x_j. CutMix pastes a rectangle of x_j onto x_i. The labels become
    lam y_i + (1 - lam) y_j, where lam of CutMix accounts for the visible part of the rectangle.

    Args:
        config: parameters and probabilities of both.
        classes: K, number of the model's outputs.
        label_smoothing: applied to the labels before mixing, because `DistillationLoss` does not
            smooth soft labels.
        seed: seed of the run.
        device: device on which batches are mixed and returned.

    Examples:
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
        """Returns a mixed copy of a batch; the draws depend on (seed, epoch, number, rank).

        Args:
            batch: floating-point images (B, 3, H, W), B even, and targets (B,) int64, on any
                device.
            epoch: epoch of the batch.
            number: number of the batch in its epoch on this rank.
            rank: this process.

        Returns:
            The batch with mixed images, and targets (B, K) float32, on the mixer's device.

        Raises:
            ValueError: the number of images is odd.
        """
        if len(batch.targets) % 2:
            raise ValueError(
                f"batch: got {len(batch.targets)} images, expected an even number, because images "
                "are mixed in pairs"
            )
        # A copy, because timm mixes in place and the batch belongs to the caller.
        images = batch.images.to(self._device, non_blocking=True, copy=True)
        targets = batch.targets.to(self._device, non_blocking=True)
        # timm's `Mixup` draws from numpy's global generator.
        state = np.random.get_state()
        try:
            np.random.seed(derive_seed(self._seed, epoch, number, rank, _SEED_PART) & 0xFFFFFFFF)
            images, targets = self._mixup(images, targets)
        finally:
            np.random.set_state(state)
        return batch._replace(images=images, targets=targets)
