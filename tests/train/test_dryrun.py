"""Figures of the dry run; the command line's tests check that it writes nothing."""

from __future__ import annotations

import re

import pytest

from featkd.models import create_student
from featkd.train.dryrun import dry_run, forward_macs
from tests.train.runs import CPU, changed, run


@pytest.mark.parametrize(
    ("arch", "published"), [("plain", 1.254), ("lift", 1.268), ("widelast", 1.545)]
)
def test_forward_macs_are_the_published_ones(arch, published):
    """GMACs at 224 x 224, from the table of students in [EM26]."""
    student = create_student("deit_tiny_patch16_224", arch=arch, teacher_dim=384)
    assert round(forward_macs(student, 224) / 1e9, 3) == published


def test_a_dry_run_tells_of_the_checkpoint_in_its_folder(recipe):
    recipe = changed(recipe, optim=dict(epochs=1, warmup_epochs=0))
    assert "out: " not in dry_run(recipe, CPU)
    run(recipe)
    report = dry_run(recipe, CPU)
    assert f"out: the run continues from {recipe.out}/last.pt" in report
    report = dry_run(changed(recipe, optim=dict(lr=0.5)), CPU)
    assert "out: the run is refused with this folder: " in report
    assert "-> 0.5" in report


@pytest.mark.parametrize(("decay", "noted"), [(0.99, True), (0.5, False), (None, False)])
def test_an_average_that_is_longer_than_the_run_is_noted(recipe, decay, noted):
    recipe = changed(recipe, ema_decay=decay, optim=dict(epochs=1, warmup_epochs=0))
    assert ("ema_decay: with 0.99 the average consists of" in dry_run(recipe, CPU)) == noted


def test_a_dry_run_needs_no_weights_of_the_teacher(recipe):
    recipe = changed(recipe, teacher=dict(random=False, img_size=20))
    recipe = changed(recipe, optim=dict(epochs=1, warmup_epochs=0))
    report = dry_run(recipe, CPU)
    assert re.findall(r"(?<!\.)\b1 (?!x )[a-z]+s\b", report.replace("1 process ", "")) == []
    assert "its images are resized from 16 to 20 pixels" in report
    assert "a run needs teacher.checkpoint, teacher.pretrained or teacher.random" in report
