"""Exported models, timm's hub functions, and the code of docs/export.md."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.models import push_to_hf_hub, save_for_hf

from featkd.models import create_student, create_teacher, export_model, load_exported
from featkd.models import export as module
from featkd.models.export import ExportError, exported_folder
from featkd.models.registered import default_cfgs

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
EVA = {**SMALL, "embed_dim": 24}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_code_of_docs_page_runs(tmp_path, monkeypatch):
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(PAGE), "exec"), {})
    assert names_in(tmp_path / "exported") == ["config.json", "model.onnx"]


@pytest.mark.parametrize(
    ("base", "arch", "options"),
    [
        ("vit_tiny_patch16_224", "plain", SMALL),
        ("vit_tiny_patch16_224.augreg_in21k", "lift", SMALL),
        ("vit_tiny_patch16_224", "fixed_step", SMALL),
        ("vit_small_patch16_dinov3", "lift", EVA),
        ("deit_tiny_patch16_224", "widelast", {**SMALL, "embed_dim": 48}),
        ("deit_tiny_w204_patch16_224", "plain", {"img_size": 16, "patch_size": 4, "depth": 1}),
    ],
)
def test_every_student_goes_through_the_hub_twice(base, arch, options, tmp_path, perturb):
    student: Any = perturb(create_student(base, arch, 384, 3, **options)).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        want = student(images)
        for generation in ("first", "second"):
            save_for_hf(student, tmp_path / generation, safe_serialization=True)
            name = f"local-dir:{tmp_path / generation}"
            student = timm.create_model(name, pretrained=True).eval()
            assert torch.equal(student(images), want)
        teacher = create_teacher(name, pretrained=True)
        assert torch.equal(teacher(images), want)
    # as timm's own models: another number of classes, another size
    other = timm.create_model(name, pretrained=True, num_classes=5, img_size=32).eval()
    assert other(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    kept = student.state_dict()["blocks.0.attn.proj.weight"]
    assert torch.equal(other.state_dict()["blocks.0.attn.proj.weight"], kept)


@pytest.mark.parametrize("name", default_cfgs)
def test_registered_students_are_pushed_to_the_hub_and_created_from_it(name, tmp_path, monkeypatch):
    """The hub is a folder here."""

    class Hub:
        def __init__(self, **_: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, **_: Any) -> bool:
            return False

        def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> None:
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr("timm.models._hub.HfApi", Hub)
    student = timm.create_model(name, img_size=32, depth=2, num_classes=3).eval()
    push_to_hf_hub(student, "me/student")
    again = timm.create_model(f"local-dir:{tmp_path / 'me/student'}", pretrained=True).eval()
    assert type(again) is type(student)
    assert again.pretrained_cfg["architecture"] == name
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), student(images))


def test_lift_on_a_saved_base_is_not_taken_for_its_base(tmp_path):
    save_for_hf(create_student("vit_tiny_patch16_224", **SMALL), tmp_path / "base")
    student: Any = create_student(f"local-dir:{tmp_path / 'base'}", "lift", 24, 3).eval()
    save_for_hf(student, tmp_path / "lift")
    again = load_exported(tmp_path / "lift")
    assert type(again) is type(student)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images), student(images))


def test_general_architecture_has_no_weights_of_its_base():
    options: dict[str, Any] = {"base": "vit_tiny_patch16_224", "arch": "lift", "teacher_dim": 24}
    model = timm.create_model("featkd_student", **options, **SMALL)
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="'featkd_student' has no weights to download"):
        timm.create_model("featkd_student", pretrained=True, **options, **SMALL)


@pytest.fixture
def student() -> Any:
    torch.manual_seed(0)
    return create_student("vit_tiny_patch16_224", "lift", 24, 3, **SMALL)


def test_exported_folder_is_loaded_in_evaluation_mode(student, tmp_path):
    images = torch.randn(4, 3, 16, 16)
    found = export_model(student, "safetensors", tmp_path / "a/b", images, details={"x": [1]})
    assert (found.output, found.error, found.images) == ("logits", 0.0, 4)
    assert student.training
    again: Any = load_exported(tmp_path / "a/b")
    assert not again.training
    assert torch.equal(again(images), student.eval()(images))
    assert found.largest == student(images).abs().max().item()
    _, (features,) = again.forward_with_features(images, [-1])
    assert features.shape == (4, 16, 24)
    stored = json.loads((tmp_path / "a/b/config.json").read_text())["featkd"]
    file = {"form": "safetensors", "file": "model.safetensors"}
    assert stored == {**file, "x": [1], "output": "logits"}


def test_one_image_is_enough_for_a_dynamic_batch(student, tmp_path):
    export_model(student, "pt2", tmp_path / "pt2", torch.randn(1, 3, 16, 16))
    program: Any = torch.export.load(tmp_path / "pt2/model.pt2").module()
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(program(images), student.eval()(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", [lambda x: x + 1e-4, lambda x: x[:1], lambda x: x * torch.nan])
def test_nothing_is_written_if_outputs_differ(student, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(module, "_open", lambda *_: lambda images: wrong(student(images)))
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(ExportError, match=r"--to timm: .* logits differ .* nothing was written"):
        export_model(student, "timm", tmp_path / "out", images)
    with torch.no_grad():
        student.head.bias.fill_(torch.nan)
    with pytest.raises(ExportError, match="own outputs are not finite"):
        export_model(student, "timm", tmp_path / "out", images)
    assert list(tmp_path.iterdir()) == []


def test_model_that_torch_cannot_trace(student, tmp_path, monkeypatch):
    class Odd(type(student)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (2 if float(x.mean()) > 9 else 1)

    student.__class__ = Odd
    with pytest.raises(ExportError, match=r"torch can't export this model: \w+: .* nothing was"):
        export_model(student, "pt2", tmp_path / "out", torch.randn(2, 3, 16, 16))
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_export_are_replaced(student, tmp_path):
    leftover = tmp_path / ".out.partial"
    leftover.mkdir()
    (leftover / "junk").touch()
    (tmp_path / "out").mkdir()
    export_model(student, "timm", tmp_path / "out", torch.randn(2, 3, 16, 16), card="# A card\n")
    assert names_in(tmp_path / "out") == ["README.md", "config.json", "model.safetensors"]
    assert not leftover.exists()


def test_folders_that_hold_no_model(student, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json there; expected a folder of"):
        load_exported(tmp_path)
    folder = tmp_path / "out"
    export_model(student, "timm", folder, torch.randn(2, 3, 16, 16))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-50])
    with pytest.raises(ValueError, match=r"out: timm can't load this model: SafetensorError: "):
        load_exported(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors there"):
        load_exported(folder)


def test_names_that_stand_for_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("resnet18", "mine"):
        Path(name).mkdir()
    assert exported_folder("mine") == Path("mine")
    assert exported_folder("local-dir:resnet18") == Path("resnet18")
    for name in ("resnet18", "nowhere", "hf-hub:a/b"):
        assert exported_folder(name) is None
