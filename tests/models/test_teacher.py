"""create_teacher: frozen, in evaluation mode, and with the weights of the file."""

from __future__ import annotations

import re
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from featkd.models import CheckpointMismatch, create_student, create_teacher, download
from tests.models.conftest import TINY

NAME = "cait_xxs24_224"
SIZE: dict[str, Any] = {**TINY, "embed_dim": 32, "depth": 2, "num_heads": 4}


@pytest.fixture(name="source")
def _source(perturb: Any) -> Any:
    return perturb(timm.create_model(NAME, **SIZE)).eval()


def test_frozen_and_in_evaluation_mode():
    teacher: Any = create_teacher(NAME, **SIZE, drop_rate=0.5)
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    logits, (features,) = teacher.forward_with_features(torch.zeros(1, 3, 32, 32), [-1])
    assert not logits.requires_grad
    assert not features.requires_grad
    assert features.shape == (1, 16, 32)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_loads_weight_file(source, tmp_path, suffix):
    path = tmp_path / f"teacher.{suffix}"
    last = source.state_dict()
    averaged = {name: value + 1 for name, value in last.items()}
    if suffix == "safetensors":
        safetensors.torch.save_file(last, path)
    else:
        wrapped = {f"module.{name}": value for name, value in last.items()}
        torch.save({"model": wrapped, "model_ema": averaged}, path)
    for weights, wanted in (("auto", averaged if suffix == "pth" else last), ("model", last)):
        teacher: Any = create_teacher(NAME, checkpoint=path, weights=weights, **SIZE)
        state = teacher.state_dict()
        assert list(state) == list(wanted)
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher(images), source(images).detach())


def test_loads_pretrained_timm_weights(source, tmp_path):
    path = tmp_path / "timm.pth"
    torch.save(source.state_dict(), path)
    # timm reads this file instead of downloading the weights
    overlay = {"file": str(path), "num_classes": 10}
    teacher = create_teacher(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **SIZE)
    state = teacher.state_dict()
    assert all(torch.equal(state[name], value) for name, value in source.state_dict().items())


def test_mismatched_checkpoint_raises(source, tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save(source.state_dict(), path)
    message = r"teacher\.pth does not fit cait_xxs24_224; 2 of another shape: head\.weight \(10, 32"
    with pytest.raises(CheckpointMismatch, match=message):
        create_teacher(NAME, checkpoint=path, **{**SIZE, "num_classes": 5})
    with pytest.raises(CheckpointMismatch, match=r"18 unexpected: blocks\.1\.gamma_1"):
        create_teacher(NAME, checkpoint=path, **{**SIZE, "depth": 1})
    with pytest.raises(CheckpointMismatch, match=r"18 missing: blocks\.2\.gamma_1"):
        create_teacher(NAME, checkpoint=path, **{**SIZE, "depth": 3})


def test_student_as_teacher(tmp_path, tiny, perturb):
    student: Any = perturb(create_student("deit_tiny_patch16_224", "lift", 384, **tiny)).eval()
    path = tmp_path / "student.pth"
    torch.save({"model": student.state_dict()}, path)
    teacher = create_teacher("deit_tiny_lift384_patch16_224", checkpoint=path, **tiny)
    images = torch.randn(2, 3, 32, 32)
    _, (wanted,) = student.forward_with_features(images, [-1])
    _, (got,) = teacher.forward_with_features(images, [-1])
    torch.testing.assert_close(got, wanted.detach())


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"name: timm has no model .* did you mean 'cait_s24_224'"):
        create_teacher("cait_s24_242")
    with pytest.raises(ValueError, match=r"checkpoint: .* together with pretrained=True"):
        create_teacher(NAME, pretrained=True, checkpoint=tmp_path / "x.pth")
    with pytest.raises(ValueError, match="timm has no weights for 'vit_giant_patch14_224'"):
        create_teacher("vit_giant_patch14_224", pretrained=True)


def test_a_checkpoint_of_another_size_names_three_tensors_and_its_model(tmp_path):
    path = tmp_path / "last.pt"
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3)
    student = {"base": "vit_tiny_patch16_224", "arch": "plain", "options": {"embed_dim": 24}}
    torch.save({"model": model.state_dict(), "recipe": {"student": student}}, path)
    with pytest.raises(ValueError, match="does not fit") as caught:
        create_teacher("vit_tiny_patch16_224", checkpoint=path)
    message = str(caught.value)
    assert re.search(r"120 missing: [\w.]+, [\w.]+, [\w.]+, and 117 more", message), message
    expected = "teacher.name: vit_tiny_patch16_224, teacher.options: {'embed_dim': 24}"
    assert message.endswith(f"its stored recipe can build it: {expected}")
    assert len(message) < 900


@pytest.mark.parametrize(
    ("name", "pretrained"), [("cait_s24_224", True), ("hf-hub:timm/resnet18.a1_in1k", False)]
)
def test_unreachable_weights_are_refused_at_once(monkeypatch, name, pretrained):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(download, "getproxies", dict)
    monkeypatch.setattr(download.huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(download.socket, "create_connection", refuse)
    monkeypatch.setattr(timm, "create_model", None)  # it would retry
    with pytest.raises(ConnectionError, match=rf"'{name}' .*no network.*teacher\.checkpoint"):
        create_teacher(name, pretrained=pretrained)
