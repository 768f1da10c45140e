"""What a save leaves when something goes wrong: weights, the order of files, the disk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from featkd.losses import DistillationTerms
from featkd.train.checkpoint import load
from featkd.train.engine import Trainer
from featkd.train.logs import RunLog
from featkd.train.meter import TrainingDiverged
from tests.train.runs import CPU


@pytest.mark.parametrize("stopped", [False, True])
def test_a_diverged_state_is_not_saved(alone, monkeypatch, stopped):
    """nan in update 4, which nothing reads before the epoch's end but the save, or the stop."""
    policy = replace(alone.checkpoint, every_updates=2)
    trainer = Trainer(replace(alone, log_every=100, checkpoint=policy), CPU)
    compare = trainer.compare

    def diverge(*args):
        factor = math.nan if trainer.update == 3 else 1.0
        return DistillationTerms(*(x * factor for x in compare(*args)))

    monkeypatch.setattr(trainer, "compare", diverge)
    monkeypatch.setattr(trainer, "apply_gradients", lambda: None)  # the weights stay finite
    if stopped:
        monkeypatch.setattr(trainer, "_stop_agreed", lambda _: 15 if trainer.update == 4 else None)
    with pytest.raises(TrainingDiverged, match=r"loss is nan by update 4; the last .*last.pt"):
        trainer.run(quiet=True)
    assert load(Path(alone.out) / "last.pt")["update"] == 2


def test_weights_that_overflowed_are_not_saved(alone):
    """The loss of the update that broke them was finite; the next one's is not seen yet."""
    trainer = Trainer(alone, CPU)
    trainer.store.prepare()
    trainer._save(RunLog(None, 0, 0))
    with torch.no_grad():
        next(trainer.parts.student.parameters()).view(-1)[0] = math.inf
    trainer.update = 1
    with pytest.raises(TrainingDiverged, match=r"norm of the weights is inf by update 1; the"):
        trainer._save(RunLog(None, 0, 0))
    assert load(trainer.store.last)["update"] == 0
