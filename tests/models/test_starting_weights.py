"""Students that start from weights of their base, or of a student like them."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf

from featkd.models import ARCHS, CheckpointMismatch, create_student, create_teacher

VIT = "deit_tiny_patch16_224"
DINO = "vit_small_patch16_dinov3"
BASES = [(VIT, arch) for arch in ARCHS]
BASES += [(DINO, arch) for arch in ("plain", "lift", "widelast", "heads_linear")]
# Tensors whose modules the base lacks, or has with another width. 8 blocks, so that the linear
# schedules widen two.
OWN = {
    "plain": (),
    "lift": ("projection", "head."),
    "widelast": ("blocks.7.", "norm.", "head."),
    "fixed_step": ("blocks.7.", "norm.", "head."),
    "heads_linear": ("blocks.6.", "blocks.7.", "norm.", "head."),
    "fixed_linear": ("blocks.6.", "blocks.7.", "norm.", "head."),
}


@pytest.fixture(name="eight")
def _eight(tiny: dict[str, Any]) -> dict[str, Any]:
    return {**tiny, "depth": 8}


def student(base: str, arch: str, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return create_student(base, arch, 96, **options)


@pytest.mark.parametrize(("base", "arch"), BASES)
@pytest.mark.parametrize("source", ["pretrained", "checkpoint"])
def test_shared_tensors_are_copied_and_own_ones_new(base, arch, source, eight, perturb, tmp_path):
    weights = perturb(timm.create_model(base, **eight)).state_dict()
    path = tmp_path / "base.pth"
    torch.save(weights, path)
    notes: list[str] = []
    given: dict[str, Any] = {"checkpoint": path}
    if source == "pretrained":  # timm reads the file instead of downloading
        overlay = {"file": str(path), "num_classes": 10}
        given = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    started = student(base, arch, **eight, **given, notes=notes)
    fresh = student(base, arch, **eight).state_dict()
    found = started.state_dict()
    assert found.keys() == fresh.keys()
    for name, value in found.items():
        wanted = fresh if name.startswith(OWN[arch]) else weights
        assert torch.equal(value, wanted[name]), name
    assert started.training
    assert ("file" in started.pretrained_cfg) == (source == "pretrained" and arch == "plain")
    (note,) = notes
    copied = {"widelast": 6, "fixed_step": 6, "heads_linear": 5, "fixed_linear": 5}
    if arch in copied:
        assert f"copied: blocks 0 to {copied[arch]} and the embeddings; new: blocks." in note
        assert note.endswith("blocks.7, norm, head")
    assert ("new: projection, projection_norm, head" in note) == (arch == "lift")
    assert ("new" in note) == (arch != "plain")


@pytest.mark.parametrize("arch", ["lift", "widelast"])
@pytest.mark.parametrize("base", [VIT, DINO])
def test_a_student_of_the_same_architecture(base, arch, tiny, perturb, tmp_path):
    before = perturb(student(base, arch, **tiny))
    path = tmp_path / "student.safetensors"
    safetensors.torch.save_file(before.state_dict(), path)
    notes: list[str] = []
    again = student(base, arch, **tiny, checkpoint=path, notes=notes).state_dict()
    assert all(torch.equal(again[name], x) for name, x in before.state_dict().items())
    assert notes == [f"student: starts from {path}"]
    fewer = {**tiny, "num_classes": 4}
    fresh = student(base, arch, **fewer).state_dict()
    other = student(base, arch, **fewer, checkpoint=path, notes=notes).state_dict()
    for name, value in before.state_dict().items():
        assert torch.equal(other[name], fresh[name] if "head" in name else value), name
    assert notes[1].endswith("; new: head (4 classes, 10 there)")
    assert student(base, arch, **{**tiny, "num_classes": 0}, checkpoint=path).num_classes == 0
    with pytest.raises(CheckpointMismatch, match=r"checkpoint: .*student.safetensors does not fit"):
        create_student(base, arch, 144, **tiny, checkpoint=path)


@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("base", [VIT, DINO, "cait_xxs24_224", "convnext_atto"])
def test_a_classifier_of_another_number_of_classes_is_new(base, classes, perturb, tmp_path):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    options: dict[str, Any] = small if base != "convnext_atto" else {"depths": (1, 1, 1, 1)}
    weights = perturb(timm.create_model(base, **options, num_classes=10)).state_dict()
    path = tmp_path / "base.pth"
    torch.save(weights, path)
    notes: list[str] = []
    found: Any = create_student(
        base, num_classes=classes, checkpoint=path, notes=notes, **options
    ).state_dict()
    head = "head.fc." if base == "convnext_atto" else "head."
    assert sum(name.startswith(head) for name in found) == (2 if classes else 0)
    for name, value in found.items():
        assert torch.equal(value, weights[name]) == (not name.startswith(head)), name
    expected = f"; new: {head[:-1]} (4 classes, 10 there)" if classes else ""
    assert notes == [f"student: starts from {path}{expected}"]


@pytest.mark.parametrize("arch", ["plain", "lift", "widelast"])
@pytest.mark.parametrize("same", [False, True])
def test_position_embeddings_of_another_image_size_are_resampled(
    arch, same, tiny, perturb, tmp_path
):
    before = perturb(student(VIT, arch if same else "plain", **tiny)).state_dict()
    path = tmp_path / "weights.pth"
    torch.save(before, path)
    notes: list[str] = []
    started = student(VIT, arch, **{**tiny, "img_size": 48}, checkpoint=path, notes=notes)
    wanted = resample_abs_pos_embed(before["pos_embed"], new_size=[6, 6], num_prefix_tokens=1)
    assert torch.equal(started.state_dict()["pos_embed"], wanted)
    assert notes[0].endswith("; resampled by timm: pos_embed (1, 17, 48) -> (1, 37, 48)")


def test_pretrained_weights_of_another_image_size_are_noted(tiny, perturb, tmp_path):
    """A folder of timm's has sizes of its own, like timm's weights of a name."""
    model = perturb(timm.create_model(VIT, **tiny))
    save_for_hf(model, tmp_path / "hub", model_args=tiny, safe_serialization=True)
    base = f"local-dir:{tmp_path / 'hub'}"
    for arch in ("plain", "lift", "widelast"):
        notes: list[str] = []
        found: Any = create_student(base, arch, 96, 3, img_size=48, pretrained=True, notes=notes)
        wanted = resample_abs_pos_embed(model.pos_embed, new_size=[6, 6], num_prefix_tokens=1)
        assert torch.equal(found.pos_embed, wanted)
        assert torch.equal(found.blocks[2].mlp.fc1.weight, model.blocks[2].mlp.fc1.weight)
        assert "resampled by timm: pos_embed (1, 17, 48) -> (1, 37, 48)" in notes[0]
        assert found.pretrained_cfg["architecture"] == (
            VIT if arch == "plain" else "featkd_student"
        )
    other = perturb(timm.create_model(VIT, **tiny))
    torch.save(other.state_dict(), tmp_path / "other.pth")
    started: Any = create_student(base, num_classes=10, checkpoint=tmp_path / "other.pth")
    assert torch.equal(started.head.weight, other.head.weight)
    teacher: Any = create_teacher(base, pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(teacher(images), model.eval()(images))


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("plain", {"depth": 3}, r"checkpoint: \S+ does not fit deit\S+; 12 unexpected: blocks.3."),
        ("lift", {"depth": 6}, r"24 missing: blocks\.4\.norm1\.weight, "),
        ("widelast", {"embed_dim": 24}, r"other shape: cls_token \(1, 1, 48\) inst.* \(1, 1, 24"),
    ],
)
def test_other_mismatches_are_errors(arch, options, message, tiny, tmp_path):
    path = tmp_path / "base.pth"
    torch.save(student(VIT, "plain", **tiny).state_dict(), path)
    with pytest.raises(CheckpointMismatch, match=message) as caught:
        create_student(VIT, arch, 96, **{**tiny, **options}, checkpoint=path)
    assert len(str(caught.value)) < 600


def test_bad_sources(tiny, tmp_path):
    for base, options, message in (
        (VIT, {"checkpoint": "x.pth"}, "checkpoint: x.pth given together with pretrained: True"),
        ("local-dir:/nowhere", {}, "base: 'local-dir:/nowhere': no file /nowhere/config.json"),
        ("hub:timm/resnet18", {}, "base: Unknown model source 'hub'"),
        ("vit_giant_patch14_224", tiny, "pretrained: timm has no weights for 'vit_giant_patch14"),
    ):
        with pytest.raises(ValueError, match=message):
            create_student(base, pretrained=True, **options)
    save_for_hf(
        timm.create_model(VIT, **tiny), tmp_path / "hub", model_args=tiny, safe_serialization=True
    )
    (tmp_path / "hub" / "model.safetensors").unlink()
    with pytest.raises(CheckpointMismatch, match=r"pretrained: .*No suitable checkpoints found in"):
        create_student(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
