"""Figures of the dry run; the command line's tests check that it writes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from featkd.models import create_student
from featkd.runtime.distributed import ProcessContext
from featkd.train.dryrun import dry_run, forward_macs


@pytest.mark.parametrize(
    ("arch", "published"), [("plain", 1.254), ("lift", 1.268), ("widelast", 1.545)]
)
def test_forward_macs_are_the_published_ones(arch, published):
    """GMACs at 224 x 224, from the table of students in [EM26]."""
    student = create_student("deit_tiny_patch16_224", arch=arch, teacher_dim=384)
    assert round(forward_macs(student, 224) / 1e9, 3) == published


def test_a_minimum_above_the_peak_is_noted(recipe):
    recipe = replace(recipe, optim=replace(recipe.optim, lr_batch=1024, min_lr=1e-4))
    report = dry_run(recipe, ProcessContext(0, 1, torch.device("cpu")))
    assert "optim.min_lr: 0.0001 is above the peak learning rate 1.56e-05" in report
