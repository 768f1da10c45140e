"""mixup and CutMix: equal to timm's, reproducible, labels smoothed once."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from featkd.data import AugmentConfig, Batch, Mixer
from featkd.losses import DistillationLoss
from featkd.runtime.seeding import derive_seed

CPU = torch.device("cpu")
CLASSES, SMOOTHING = 5, 0.1
KINDS = {
    "mixup": AugmentConfig(mixup=0.8),
    "cutmix": AugmentConfig(cutmix=1.0),
    "both": AugmentConfig(mixup=0.8, cutmix=1.0, mixup_prob=0.7, mixup_switch_prob=0.2),
}


def noise(size: int = 4) -> Batch:
    """Random images; the two of each pair have different classes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((size, 3, 10, 14), generator=generator)
    keys = torch.arange(3 * size).view(size, 3)
    return Batch(images, torch.arange(size) % CLASSES, ["bad.jpg"], keys, keys[:, 1])


def mixer(config: AugmentConfig, smoothing: float = SMOOTHING, seed: int = 3) -> Mixer:
    return Mixer(config, CLASSES, smoothing, seed=seed, device=CPU)


def share(targets: Tensor) -> float:
    """Returns lam, from unsmoothed labels of `noise`."""
    return targets[0, 0].item()


@pytest.mark.parametrize("kind", KINDS)
def test_results_equal_timms(kind):
    """Compares with timm's class, its generator seeded from (seed, epoch, number, rank)."""
    config, batch = KINDS[kind], noise()
    theirs = Mixup(
        mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob, label_smoothing=SMOOTHING, num_classes=CLASSES,
    )  # fmt: skip
    ours = mixer(config)
    for number in range(40):
        np.random.seed(derive_seed(3, 2, number, 7, 1) & 0xFFFFFFFF)
        images, targets = theirs(batch.images.clone(), batch.targets)
        found = ours(batch, epoch=2, number=number, rank=7)
        assert torch.equal(found.images, images)
        assert torch.equal(found.targets, targets)
        assert found.bad == ["bad.jpg"]


def test_images_and_labels_are_mixed_in_the_same_proportion():
    """Checks the equations: blended images, or each pixel from one of the two."""
    batch = noise()
    x, partner = batch.images, batch.images.flip(0)
    y = F.one_hot(batch.targets, CLASSES).float()
    kinds = set()
    both = mixer(KINDS["both"], smoothing=0)
    for number in range(40):
        found = both(batch, epoch=0, number=number, rank=0)
        lam = share(found.targets)
        torch.testing.assert_close(found.targets, lam * y + (1 - lam) * y.flip(0))
        if torch.equal(found.images, x):
            kinds.add("neither")
            assert lam == 1
        elif torch.isin(found.images, x).all():
            kinds.add("cutmix")
            covered = found.images != x
            assert torch.equal(found.images[covered], partner[covered])
            assert covered.float().mean().item() == pytest.approx(1 - lam, abs=1e-6)
        else:
            kinds.add("mixup")
            torch.testing.assert_close(found.images, lam * x + (1 - lam) * partner)
    assert kinds == {"neither", "cutmix", "mixup"}


def test_the_batch_and_the_generators_are_unchanged():
    """The batch can be the loader's memory, and drop-path draws from the generators."""
    batch = noise()
    images, targets = batch.images.clone(), batch.targets.clone()
    states = random.getstate(), torch.get_rng_state()
    np.random.seed(5)
    mixed = mixer(KINDS["cutmix"])(batch, epoch=0, number=0, rank=0)
    assert not torch.equal(mixed.images, images)
    assert torch.equal(batch.images, images)
    assert torch.equal(batch.targets, targets)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.rand() == np.random.RandomState(5).rand()


def test_draws_depend_only_on_seed_epoch_number_and_rank():
    batch, config = noise(), KINDS["mixup"]
    shares = {}
    for seed, epoch, number, rank in np.ndindex(2, 2, 2, 2):
        found = mixer(config, seed=seed)(batch, epoch=epoch, number=number, rank=rank)
        shares[seed, epoch, number, rank] = found.images
    assert len({x.numpy().tobytes() for x in shares.values()}) == 16
    used = mixer(config, seed=1)
    used(batch, epoch=4, number=4, rank=0)
    again = used(batch, epoch=1, number=0, rank=1)
    assert torch.equal(again.images, shares[1, 1, 0, 1])


def test_labels_are_smoothed_once():
    """The loss is the mixture of the smoothed cross-entropies with both labels."""
    batch = noise()
    unsmoothed = mixer(KINDS["mixup"], smoothing=0)(batch, epoch=0, number=0, rank=0)
    lam = share(unsmoothed.targets)
    assert 0 < lam < 1
    mixed = mixer(KINDS["mixup"])(batch, epoch=0, number=0, rank=0)
    torch.testing.assert_close(mixed.targets.sum(1), torch.ones(4))
    logits = torch.randn((4, CLASSES), generator=torch.Generator().manual_seed(2))
    found = DistillationLoss(label_smoothing=SMOOTHING)(logits, mixed.targets).total
    one, other = (
        F.cross_entropy(logits, targets, label_smoothing=SMOOTHING)
        for targets in (batch.targets, batch.targets.flip(0))
    )
    torch.testing.assert_close(found, lam * one + (1 - lam) * other)


def test_an_image_without_a_partner():
    with pytest.raises(ValueError, match="batch: got 5 images, expected an even number"):
        mixer(KINDS["mixup"])(noise(5), epoch=0, number=0, rank=0)
