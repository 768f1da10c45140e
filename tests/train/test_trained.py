"""Students from checkpoints: their preprocessing, and timm's hub functions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from featkd.data import build_transform
from featkd.train.checkpoint import CheckpointError, load
from featkd.train.trained import load_trained
from tests.conftest import CLASSES
from tests.train.runs import changed, run


@pytest.mark.parametrize("arch", ["plain", "lift", "widelast"])
def test_a_trained_student_describes_its_run(recipe, arch, images):
    recipe = changed(
        recipe,
        student=dict(arch=arch),
        data=dict(
            mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.5, interpolation="bilinear"
        ),
        optim=dict(epochs=1, warmup_epochs=0),
    )
    run(recipe)
    student = load_trained(f"{recipe.out}/best.pt")
    transform = create_transform(**resolve_model_data_config(student))
    image = Image.open(images / "val" / "red" / "0.png")
    assert torch.equal(transform(image), build_transform(recipe.data)(image))
    assert student.pretrained_cfg["label_names"] == list(CLASSES)
    assert student.pretrained_cfg["num_classes"] == 3
    assert student.default_cfg is student.pretrained_cfg
    assert not {"url", "hf_hub_id", "file", "license"} & set(student.pretrained_cfg)

    folder = Path(recipe.out) / "hub"
    save_for_hf(student, folder)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert again.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    assert again.pretrained_cfg["crop_pct"] == 0.5
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), student(x))


def test_best_has_no_optimizer_and_is_not_resumed(recipe):
    run(recipe)
    best, last = Path(recipe.out) / "best.pt", Path(recipe.out) / "last.pt"
    assert load(best)["optimizer"] == {"state": {}, "param_groups": []}
    assert load(last)["optimizer"]["state"]
    assert best.stat().st_size < 0.7 * last.stat().st_size
    with pytest.raises(CheckpointError, match=r"best.pt: holds no state .* expected last.pt or"):
        run(replace(recipe, out=recipe.out + "-more"), str(best))
