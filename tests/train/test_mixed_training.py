"""Mixed batches in the training loop: who sees them, when, and who does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from featkd.train.recipe import Recipe, RecipeError
from featkd.train.trainer import Trainer
from tests.train.runs import CPU, column, run


def mixing(recipe: Recipe, **fields: float | str) -> Recipe:
    """The recipe with these fields of `data.augment`, or `backend`."""
    data = recipe.data
    if "backend" in fields:
        data = replace(data, backend=fields.pop("backend"))
    return replace(recipe, data=replace(data, augment=replace(data.augment, **fields)))


@pytest.mark.parametrize("backend", ["timm", "dali"])
def test_teacher_and_student_see_the_mixed_batch(recipe, backend):
    """Each micro-batch is mixed once by its place in the epoch; evaluation is not."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    recipe = replace(recipe, optim=replace(recipe.optim, accumulate=2))
    trainer = Trainer(mixing(recipe, mixup=0.8, cutmix=1.0, backend=backend), CPU)
    parts, mixer = trainer.parts, trainer.parts.mixer
    places, mixed, taught, learnt, judged = [], [], [], [], []

    def note_place(batch, **place):
        assert batch.targets.dtype == torch.int64
        places.append(tuple(place.values()))
        mixed.append(mixer(batch, **place))
        return mixed[-1]

    parts.mixer = note_place
    teach = parts.source.teach
    parts.source.teach = lambda batch: (taught.append(batch.images), teach(batch))[1]
    parts.student_forward.register_forward_pre_hook(lambda _, given: learnt.append(given[0]))
    parts.loss.register_forward_pre_hook(lambda _, given: judged.append(given[1]))
    trainer.run(quiet=True)
    assert places == [(epoch, number, 0) for epoch in range(2) for number in range(6)]
    for batch, *seen in zip(mixed, taught, learnt, judged, strict=True):
        assert torch.equal(seen[0], batch.images)
        assert torch.equal(seen[1], batch.images)
        assert torch.equal(seen[2], batch.targets)
        assert batch.targets.shape == (8, 3)
        assert batch.targets.amin().item() == pytest.approx(0.1 / 3)  # smoothed


def test_off_by_default_and_without_a_trace(recipe):
    """Probabilities of what is off change no bit of a run."""
    run(recipe)
    off = mixing(replace(recipe, out=recipe.out + "-off"), mixup_prob=0.3, mixup_switch_prob=0.9)
    run(off)
    on = mixing(replace(recipe, out=recipe.out + "-on"), mixup=0.2)
    run(on)
    losses = [column(r, "loss") for r in (recipe, off, on)]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[2][0]
    assert Trainer(recipe, CPU).parts.mixer is None
    assert Trainer(mixing(recipe, mixup=0.2, mixup_prob=0.0), CPU).parts.mixer is None


def test_an_odd_batch_is_refused(recipe):
    with pytest.raises(RecipeError, match=r"batch_size: 7 is odd, and data\.augment\.mixup"):
        mixing(replace(recipe, batch_size=7), cutmix=1.0)
    replace(recipe, batch_size=7)  # as it is, it may be
