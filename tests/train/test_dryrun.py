"""Figures of the dry run; the command line's tests check that it writes nothing."""

from __future__ import annotations

import re

import pytest

from featkd.models import create_student
from featkd.train.dryrun import dry_run, forward_macs
from tests.train.runs import CPU, changed


@pytest.mark.parametrize(
    ("arch", "published"), [("plain", 1.254), ("lift", 1.268), ("widelast", 1.545)]
)
def test_forward_macs_are_the_published_ones(arch, published):
    """GMACs at 224 x 224, from the table of students in [EM26]."""
    student = create_student("deit_tiny_patch16_224", arch=arch, teacher_dim=384)
    assert round(forward_macs(student, 224) / 1e9, 3) == published


def test_a_dry_run_needs_no_weights_of_the_teacher(recipe):
    recipe = changed(recipe, teacher=dict(random=False, img_size=20))
    recipe = changed(recipe, optim=dict(epochs=1, warmup_epochs=0))
    report = dry_run(recipe, CPU)
    assert re.findall(r"(?<!\.)\b1 (?!x )[a-z]+s\b", report.replace("1 process ", "")) == []
    assert "its images are resized from 16 to 20 pixels" in report
    assert "a run needs teacher.checkpoint, teacher.pretrained or teacher.random" in report
