"""mixup and CutMix in the training loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from featkd.train.recipe import Recipe, RecipeError
from featkd.train.trainer import Trainer
from tests.train.runs import CPU, changed, column, run


def mixing(recipe: Recipe, **fields: float | str) -> Recipe:
    """Sets fields of `data.augment`, or `data.backend`."""
    data = recipe.data
    if "backend" in fields:
        data = replace(data, backend=fields.pop("backend"))
    return replace(recipe, data=changed(data, augment=dict(**fields)))


@pytest.mark.parametrize("backend", ["timm", "dali"])
def test_teacher_and_student_see_the_mixed_batch(recipe, backend):
    """Each micro-batch is mixed once, seeded by its number in the epoch; evaluation is not."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    recipe = changed(recipe, optim=dict(accumulate=2))
    trainer = Trainer(mixing(recipe, mixup=0.8, cutmix=1.0, backend=backend), CPU)
    components, mixer = trainer.components, trainer.components.mixer
    places, mixed, teacher_images, student_images, targets = [], [], [], [], []

    def note_place(batch, **place):
        assert batch.targets.dtype == torch.int64
        places.append(tuple(place.values()))
        mixed.append(mixer(batch, **place))
        return mixed[-1]

    components.mixer = note_place
    outputs = components.teacher.outputs
    components.teacher.outputs = lambda batch: (
        teacher_images.append(batch.images),
        outputs(batch),
    )[1]
    components.student_forward.register_forward_pre_hook(
        lambda _, given: student_images.append(given[0])
    )
    components.loss.register_forward_pre_hook(lambda _, given: targets.append(given[1]))
    trainer.run(quiet=True)
    assert places == [(epoch, number, 0) for epoch in range(2) for number in range(6)]
    for batch, *seen in zip(mixed, teacher_images, student_images, targets, strict=True):
        assert torch.equal(seen[0], batch.images)
        assert torch.equal(seen[1], batch.images)
        assert torch.equal(seen[2], batch.targets)
        assert batch.targets.shape == (8, 3)
        assert batch.targets.amin().item() == pytest.approx(0.1 / 3)  # smoothed


def test_off_by_default_and_without_effect(recipe):
    """Probabilities of mixing change nothing while mixing is off."""
    run(recipe)
    off = mixing(replace(recipe, out=recipe.out + "-off"), mixup_prob=0.3, mixup_switch_prob=0.9)
    run(off)
    on = mixing(replace(recipe, out=recipe.out + "-on"), mixup=0.2)
    run(on)
    losses = [column(r, "loss") for r in (recipe, off, on)]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[2][0]
    assert Trainer(recipe, CPU).components.mixer is None
    assert Trainer(mixing(recipe, mixup=0.2, mixup_prob=0.0), CPU).components.mixer is None


def test_an_odd_batch_is_refused(recipe):
    with pytest.raises(RecipeError, match=r"batch_size: 7 is odd, and data\.augment\.mixup"):
        mixing(replace(recipe, batch_size=7), cutmix=1.0)
    replace(recipe, batch_size=7)  # allowed without mixing
