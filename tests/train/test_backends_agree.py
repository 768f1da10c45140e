"""Runs on the kernels have the losses of runs on the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import featkd
from featkd.ops import backends
from featkd.train.recipe import Recipe
from tests.kernels.conftest import cache, executing  # noqa: F401
from tests.train.runs import changed, column, run

UPDATES = 12


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(op, backend) pairs that ran."""
    found: set[tuple[str, str]] = set()
    monkeypatch.setattr(backends, "record", lambda op, backend: found.add((op, backend)))
    return found


def losses(recipe: Recipe) -> dict[str, list[float]]:
    run(recipe)
    names = ("loss", "logits_loss", "feature_loss")
    return {name: [float(x) for x in column(recipe, name)] for name in names}


@pytest.mark.parametrize(("arch", "metric"), [("widelast", "spectral"), ("lift", "mse")])
def test_the_kernels_train_as_the_reference_does(recipe, arch, metric, ran):
    recipe = changed(recipe, student=dict(arch=arch), loss=dict(feature=metric), ema_decay=None)
    with executing(check=False) as executed, featkd.use_backend("triton"):
        fused = losses(recipe)
    # a Lift student computes the loss with its pooled map
    compared = "lift_head" if arch == "lift" else "projected_feature_kd"
    ops = {"soft_kd", compared, *(["widelast_projection"] if arch == "widelast" else [])}
    assert ran == {(op, "triton") for op in ops}
    assert executed.count("distance_backward") == UPDATES
    ran.clear()
    with featkd.use_backend("reference"):
        plain = losses(replace(recipe, out=str(Path(recipe.out) / "reference")))
    assert ran == {(op, "reference") for op in ops}
    for name, expected in plain.items():
        assert len(expected) == UPDATES
        assert fused[name] == pytest.approx(expected, rel=1e-5), name
