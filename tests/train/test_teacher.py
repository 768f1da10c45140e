"""The frozen teacher: computation that its outputs do not need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from featkd.train.trainer import Trainer
from tests.train.runs import CPU


def test_unused_logits_are_not_computed(recipe):
    """With loss.alpha 0, the head does not run; the maps are the same."""

    def used(*_):
        raise AssertionError("the teacher's head ran")

    assert recipe.loss.feature is not None
    for alpha in (0.5, 0.0):
        trainer = Trainer(replace(recipe, loss=replace(recipe.loss, alpha=alpha)), CPU)
        batch = next(iter(trainer.components.train_loader))
        model, layers = trainer.components.teacher_model, trainer.components.teacher.layers
        model.head.register_forward_hook(used)
        if alpha:
            with pytest.raises(AssertionError, match="head ran"):
                trainer.teacher_forward(batch)
        else:
            outputs = trainer.teacher_forward(batch)
            assert outputs.logits is None
            assert torch.equal(outputs.maps[0], model.forward_maps(batch.images, layers)[0])
            assert trainer.losses(batch).total.isfinite()
        trainer.components.close()
