"""The plan for many GPUs: its work against published figures, its times by hand, its document."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.report.chips import chip_of
from benchmarks.studies import scale_plan
from benchmarks.studies.scale_plan import Assumed, Work, model_update

ROOT = Path(__file__).parents[2]
WORK = Work(teacher_flops=20_000_000_000, student_flops=9_000_000_000, gradient_bytes=32_000_000)


def test_work_is_that_of_the_published_models_and_the_document_has_the_table(tmp_path):
    work = scale_plan.published_work()
    assert work.teacher_flops == pytest.approx(2 * 9.35e9, rel=0.01)  # CaiT-S24's 9.35 GMACs
    assert work.student_flops == pytest.approx(3 * 2 * 1.545e9, rel=0.03)  # test_dryrun's GMACs
    assert work.student_flops < 3 * 2 * 1.545e9  # no gradient of the image
    assert 4 * 5.7e6 < work.gradient_bytes < 4 * 8e6
    page = tmp_path / "scale.md"
    page.write_text("<!-- bench scale-plan -->\n<!-- end bench scale-plan -->\n")
    scale_plan.main(["--out", str(page)])
    assert page.read_text().strip() in (ROOT / "docs/scale.md").read_text()


def test_times_by_hand():
    """H100 at 989 Tflop/s and 64 GPUs, 32 images each."""
    update = model_update(WORK, chip_of(90), 32, Assumed(share_of_peak=0.5))
    assert update.teacher == pytest.approx(32 * 20e9 / 494.5e12 * 1e3)
    assert update.student == pytest.approx(32 * 9e9 / 494.5e12 * 1e3)
    assert update.all_reduce == pytest.approx(2 * 63 / 64 * 32e6 / 50e9 * 1e3 + 6 * 0.02)
    assert update.host_copy == pytest.approx(32 * 602_112 / 50e9 * 1e3)
    assert update.loader == pytest.approx(32 / 2520 * 1e3)
    shown = update.all_reduce - update.student * 2 / 3  # longer than the backward pass
    assert update.compute == pytest.approx(
        update.host_copy + update.teacher + update.student + shown
    )
    assert (update.limit, update.total) == ("loader", update.loader)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [({"images_per_core_s": 1e6}, "GPU"), ({"host_gb_per_s": 0.1}, "GPU"), ({}, "loader")],
)
def test_limit(changes, limit):
    assumed = replace(Assumed(), **changes)
    update = model_update(WORK, chip_of(90), 512, assumed)
    assert update.limit == limit
    assert update.total == max(update.compute, update.loader)
    alone = model_update(WORK, chip_of(90), 512, replace(assumed, gpus=1))
    assert alone.all_reduce == 0
    assert alone.compute == update.compute  # hidden at 512 images
