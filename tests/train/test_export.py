"""`featkd export` of trained students."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from featkd.cli.main import main
from featkd.train.export import without_places
from featkd.train.trained import load_trained
from tests.conftest import CLASSES
from tests.train.runs import changed, run

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHS = ("plain", "lift", "widelast")
FORMS = {  # name: arguments, largest error
    "timm": (["--to", "timm"], 1e-6),
    "safetensors": (["--to", "safetensors"], 1e-6),
    "pt2": (["--to", "pt2"], 1e-6),
    "onnx": (["--to", "onnx"], 1e-4),
    "fp16": (["--to", "onnx", "--precision", "fp16"], 1e-2),
}
# A process that has loaded neither featkd nor the checkpoint.
FRESH = """
import sys
import numpy as np, onnxruntime, timm, torch
root = sys.argv[1]
images = torch.from_numpy(np.load(f"{root}/images.npy"))
found = {}

def measure(arch, form, model):
    with torch.no_grad():
        for size in (1, 7):
            parts = [np.asarray(model(batch)) for batch in images.split(size)]
            found[f"{arch}-{form}-{size}"] = np.concatenate(parts)

def onnx(path):
    session = onnxruntime.InferenceSession(path)
    return lambda x: session.run(["logits"], {"images": x.numpy()})[0]

def timms(arch):
    name = f"local-dir:{root}/{arch}-timm"
    measure(arch, "timm", timm.create_model(name, pretrained=True).eval())

timms("plain")
for arch in ("plain", "lift", "widelast"):
    measure(arch, "pt2", torch.export.load(f"{root}/{arch}-pt2/model.pt2").module())
    measure(arch, "onnx", onnx(f"{root}/{arch}-onnx/model.onnx"))
measure("lift", "fp16", onnx(f"{root}/lift-fp16/model.onnx"))
assert not [name for name in sys.modules if name.startswith("featkd")]
import featkd.models
for arch in ("lift", "widelast"):
    timms(arch)
for arch in ("plain", "lift", "widelast"):
    measure(arch, "safetensors", featkd.models.load_exported(f"{root}/{arch}-safetensors"))
np.savez(f"{root}/found.npz", **found)
"""


def three_updates(recipe, arch="lift"):
    """Trains a student; returns its checkpoint."""
    run(
        changed(
            recipe,
            out=f"{recipe.out}-{arch}",
            batch_size=16,
            student=dict(arch=arch),
            optim=dict(epochs=1, warmup_epochs=0),
            # a plain student's map has another width than the teacher's
            loss=dict(feature=None if arch == "plain" else "mse"),
        )
    )
    return f"{recipe.out}-{arch}/last.pt"


@pytest.fixture
def trained(recipe):
    return three_updates(recipe)


def export(*words):
    return main(["export", *map(str, words)])


@pytest.mark.slow
def test_round_trips_in_a_fresh_process(recipe, images, tmp_path):
    files = sorted((images / "val").rglob("*.png"))[:10]
    want = {}
    for arch in ARCHS:
        path = three_updates(recipe, arch)
        student = load_trained(path)
        transform = create_transform(**resolve_model_data_config(student), is_training=False)
        batch = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        np.save(tmp_path / "images.npy", batch.numpy())
        with torch.no_grad():
            want[arch] = student(batch).numpy()
        for form, (words, _) in FORMS.items():
            if form != "fp16" or arch == "lift":
                assert export(path, *words, "--out", tmp_path / f"{arch}-{form}") == 0
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "found.npz") as found:
        assert len(found) == (len(ARCHS) * (len(FORMS) - 1) + 1) * 2
        for key, logits in found.items():
            arch, form, _ = key.split("-")
            assert logits.shape == (10, 3)
            np.testing.assert_allclose(logits, want[arch], rtol=0, atol=FORMS[form][1], err_msg=key)
            if form == "fp16":
                assert np.abs(logits - want[arch]).max() > 0


def test_command_writes_a_card_and_figures(trained, images, tmp_path, capsys):
    out, figures = tmp_path / "my|student", tmp_path / "figures.json"
    words = ("--license", "cc-by-4.0", "--json", figures, "--weights", "model_ema")
    assert export(trained, "--to", "timm", "--out", out, *words) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(
        f"{out}: timm, fp32, weights model_ema; largest difference of logits"
    )
    assert said.out.endswith(f" on 10 images of {images / 'val'}\n")
    found = json.loads(figures.read_text())
    assert found["error"] == 0
    assert (found["images"], found["form"], found["weights"]) == (10, "timm", "model_ema")

    card = (out / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("---\n", 1)
    assert "license: cc-by-4.0\n" in front
    assert "library_name: timm\npipeline_tag: image-classification\n" in front
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    student = load_trained(trained, "model_ema")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), student(x))
    count = sum(p.numel() for p in model.parameters())
    state = torch.load(trained, weights_only=True)
    for row in (
        "| architecture | vit_tiny_patch16_224 (lift, teacher width 24) |",
        f"| parameters | {count:,} |",
        "| output | logits of 3 classes: blue, green, red |",
        "| weights | exponential average over the updates (decay 0.9) |",
        "| teacher | vit_tiny_patch16_224, random weights |",
        "| length | 3 updates, 1 epoch |",
        f"| images | 48 of {images.name} |",
        f"| top-1 accuracy, % | {state['scores']['ema']['top1']:.4g} |",
    ):
        assert row in body
    assert "import featkd.models" in body
    assert "Undefined" not in card

    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == list(CLASSES)
    assert config["featkd"]["scores"] == state["scores"]["ema"]
    assert config["featkd"]["recipe"]["student"] == state["recipe"]["student"]
    assert str(tmp_path) not in card + json.dumps(config)
    assert str(images) not in card + json.dumps(config)
    read, known = (json.dumps(resolve_model_data_config(x)) for x in (model, student))
    assert read == known


def test_card_without_a_license_says_so(trained, tmp_path, capsys):
    assert export(trained, "--to", "timm", "--out", tmp_path / "out", "--quiet") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "featkd: README.md: license: not given; --license ID sets it, as apache-2.0\n"
    )
    card = (tmp_path / "out/README.md").read_text()
    assert "| license | not given |" in card
    assert "license:" not in card.split("---\n")[1]


def test_the_weights_asked_for_are_exported(trained, tmp_path):
    x, logits = torch.randn(2, 3, 16, 16), []
    for weights in ("model", "model_ema"):
        out = tmp_path / weights
        assert export(trained, "--to", "safetensors", "--out", out, "--weights", weights) == 0
        model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        assert torch.equal(model(x), load_trained(trained, weights)(x))
        logits.append(model(x))
    assert not torch.equal(*logits)


def edited(path, **changes):
    """Changes entries of a checkpoint."""
    state = torch.load(path, weights_only=True)
    torch.save({**state, **changes}, path)
    return state


def test_images_to_compare_on(trained, images, tmp_path, capsys):
    words = ("--to", "safetensors", "--images", "3", "--data", images / "train")
    assert export(trained, *words, "--out", tmp_path / "a") == 0
    assert f"on 3 images of {images / 'train'}\n" in capsys.readouterr().out
    recipe = torch.load(trained, weights_only=True)["recipe"]
    recipe["data"]["path"] = str(tmp_path / "moved")
    edited(trained, recipe=recipe)
    assert export(trained, "--to", "safetensors", "--out", tmp_path / "b") == 0
    said = capsys.readouterr()
    assert said.out.endswith(" on 10 random images\n")
    assert "compared on random images; --data DIR names others: data.path: no folder" in said.err


def test_student_without_classifier_exports_features(trained, tmp_path, capsys):
    """Such as one trained without labels; the projectors of its loss are left out."""
    state = torch.load(trained, weights_only=True)
    for key in ("model", "model_ema"):
        state[key] = {k: v for k, v in state[key].items() if not k.startswith("head.")}
    edited(
        trained,
        **{key: state[key] for key in ("model", "model_ema")},
        num_classes=0,
        classes=[],
        scores={},
        projectors={"0.weight": torch.zeros(2, 2)},
    )
    assert export(trained, "--to", "timm", "--out", tmp_path / "out") == 0
    assert "largest difference of features 0.0e+00" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    student = load_trained(trained)
    assert torch.equal(model(x), student(x))
    assert model(x).shape == (2, 24)
    card = (tmp_path / "out/README.md").read_text()
    assert "| output | features, 24 channels |" in card
    assert "| scores | none: this checkpoint was not evaluated |" in card
    assert "pipeline_tag: image-feature-extraction" in card
    assert "label_names" not in json.loads((tmp_path / "out/config.json").read_text())


def test_bad_input_gets_one_line(trained, tmp_path, capsys, monkeypatch):
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    for folder in (full, empty):
        folder.mkdir()
    (full / "kept.txt").write_text("kept")
    file.write_text("kept")
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.pt")
    cases = [
        (1, "other.pt: not a checkpoint of a featkd run", tmp_path / "other.pt", {}),
        (1, f"could not read the checkpoint {file}: ", file, {}),
        (1, "could not read the checkpoint nowhere.pt: ", "nowhere.pt", {}),
        (2, f"out: {full} has files in it (kept.txt); expected a new or", trained, {"out": full}),
        (2, f"out: {file} is a file, expected a new or an empty folder", trained, {"out": file}),
        (
            2,
            "--to: expected safetensors, timm, onnx or pt2; got 'tflite'",
            trained,
            {"to": "tflite"},
        ),
        (2, "precision: got fp16 with --to timm; only onnx", trained, {"precision": "fp16"}),
        (2, "license: expected an SPDX identifier such as", trained, {"license": "my own: x"}),
        (2, "images: expected a whole number >= 1, got 0", trained, {"images": 0}),
        (2, "data: expected a folder of images, got nowhere", trained, {"data": "nowhere"}),
        (2, "data: expected files ending in .jpg, ", trained, {"data": empty}),
        (1, "--to onnx: needs onnxscript, which is not installed: pip", trained, {"to": "onnx"}),
    ]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for code, message, path, changes in cases:
        options = {"to": "timm", "out": tmp_path / "out"} | changes
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        assert export(path, *words) == code, message
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("featkd: ")
        assert message in said.err
        assert said.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    assert [path.name for path in full.iterdir()] == ["kept.txt"]
    assert export() == 2
    assert "the following arguments are required: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/data/private/imagenet", "imagenet"),
        ("~/sets/cifar/", "cifar"),
        ("s3://key@bucket/run/best.pt", "best.pt"),
        ("local-dir:/home/me/model", "local-dir:model"),
        ("hf-hub:timm/vit_tiny", "hf-hub:timm/vit_tiny"),
        ("runs/x", "runs/x"),
        ("rand-m9-n2", "rand-m9-n2"),
    ],
)
def test_recipes_are_published_without_places(value, kept):
    assert without_places({"a": [{"b": value}], "c": 1}) == {"a": [{"b": kept}], "c": 1}
