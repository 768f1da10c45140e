"""`featkd diagnose` of models on images."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from featkd.cli.main import main
from featkd.diagnostics import build_source
from featkd.diagnostics.config import DiagnoseConfig
from featkd.diagnostics.source import Layer
from featkd.models import create_teacher
from featkd.runtime.distributed import ProcessContext
from featkd.train.checkpoint import load
from featkd.train.recipe import LossConfig
from featkd.train.trainer import Trainer
from tests.diagnostics.commands import QUICK

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("layers", [None, "[-1,0]"])
def test_student_and_teacher(images, tmp_path, capsys, layers, request):
    if layers is not None:  # the same figures
        request.getfixturevalue("no_figures")
    words = ["--data", images, "--img-size", "16", "--workers", "0", *QUICK]
    for name, width in (("student", 12), ("teacher", 24)):
        options = {"patch_size": 4, "depth": 2, "num_heads": 3, "embed_dim": width}
        words += [f"--{name}", "vit_tiny_patch16_224", f"--{name}-options", json.dumps(options)]
    if layers is not None:
        words += ["--layers", layers]
    call = [str(word) for word in ("diagnose", *words, "--out", tmp_path)]
    assert main(call) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    order = (0, 1) if layers is None else (1, 0)
    assert [(r["model"], r["layer"]) for r in summary["layers"]] == [
        (model, layer) for model in ("student", "teacher") for layer in order
    ]
    (last,) = (r for r in summary["reach"] if r["teacher"] == "teacher layer 1")
    assert (last["channels"], last["teacher_channels"]) == (12, 24)
    assert 0 < last["pooled"] < last["shared"] <= last["shared_with_bias"] < 1
    assert last["shared"] < last["per_image"] <= 1
    printed = capsys.readouterr()
    assert "random weights" in printed.err
    page = html.unescape((tmp_path / "report.html").read_text())
    assert "What the student can reach" in page
    for text in (printed.out, page):  # only the last layers
        assert "Teacher layer 1, 12 against 24 channels." in text
        assert "Teacher layer 0, 12 against" not in text


STUDENT, TEACHER = ({"embed_dim": width, "depth": 2, "num_heads": 3} for width in (12, 24))


@pytest.fixture
def trained(recipe):
    """Checkpoint of a plain student for 16 x 16 pixels."""
    student = replace(recipe.student, arch="plain", options=STUDENT | {"patch_size": 4})
    optim = replace(recipe.optim, epochs=1, warmup_epochs=0)
    run = replace(recipe, student=student, teacher=None, loss=LossConfig(), optim=optim)
    Trainer(run, ProcessContext(0, 1, torch.device("cpu"))).run()
    return Path(run.out) / "last.pt"


@pytest.mark.usefixtures("no_figures")
def test_pretrained_and_img_size_beside_a_checkpoint(
    trained, images, tmp_path, capsys, monkeypatch
):
    """They apply to the timm model of a pair; the checkpoint sets its own."""
    asked = []

    def without_network(name, pretrained=False, **options):
        asked.append((pretrained, options["img_size"]))
        return create_teacher(name, **options)

    monkeypatch.setattr(build_source, "create_teacher", without_network)
    words = ("diagnose", "--student", trained, "--data", images, "--out", tmp_path / "out")
    words += ("--pretrained", "--workers", "0", "--images", "8", *QUICK)
    own = ("--teacher", "vit_tiny_patch16_224")
    own += ("--teacher-options", json.dumps(TEACHER | {"patch_size": 4}))
    assert main([str(w) for w in (*words, *own, "--img-size", "16")]) == 0
    assert asked == [(True, 16)]
    err = capsys.readouterr().err
    assert "random weights" not in err
    assert main([str(w) for w in (*words, *own, "--img-size", "32")]) == 2
    assert f"img_size: got 32 together with {trained}, which expects 16" in capsys.readouterr().err
    assert main([str(w) for w in (*words, "--teacher", trained)]) == 2
    message = f"without a weights file, got {trained} and {trained}"
    assert message in capsys.readouterr().err
    assert main([str(w) for w in (*words, "--teacher", "vit_tinny_patch16_224")]) == 2
    assert "featkd: teacher: timm has no model 'vit_tinny_patch16_224'; " in capsys.readouterr().err


def test_each_model_of_a_pair_sees_its_own_images(trained, images):
    """A SigLIP teacher (mean and std 0.5) of another size, compared with timm's transform."""
    options = TEACHER | {"patch_size": 4, "img_size": 20}
    config = DiagnoseConfig(
        student=str(trained),
        teacher="vit_base_patch16_siglip_224",
        teacher_options=options,
        data=str(images),
        images=6,
        workers=0,
        batch_size=6,
        crop_pct=1.0,
    )
    source = build_source.build_source(config, torch.device("cpu"))
    (chunk,) = source.chunks([0])
    student, teacher = (source.model(name) for name in ("student", "teacher"))
    record = timm.data.resolve_model_data_config(teacher) | {"input_size": (3, 20, 20)}
    assert record["mean"] == (0.5, 0.5, 0.5)
    transform = timm.data.create_transform(**(record | {"crop_pct": 1.0}), is_training=False)
    files = [Image.open(source.name(number)).convert("RGB") for number in range(6)]
    (want,) = teacher.forward_maps(torch.stack([transform(file) for file in files]), [-1])
    torch.testing.assert_close(chunk.maps[Layer("teacher", 1)], want, rtol=1e-5, atol=1e-5)
    data = load(trained)["recipe"]["data"]
    record |= {"mean": data["mean"], "std": data["std"], "crop_pct": 1.0}
    transform = timm.data.create_transform(**record, is_training=False)
    pixels = torch.stack([transform(file) for file in files])
    small = F.interpolate(pixels, size=(16, 16), mode="bilinear", antialias=True)
    (want,) = student.forward_maps(small, [-1])
    torch.testing.assert_close(chunk.maps[Layer("student", 1)], want, rtol=1e-4, atol=1e-4)
    assert any("the student's images have mean" in note for note in source.notes)


def test_an_exported_folder_stands_for_its_checkpoint(trained, images, tmp_path, capsys):
    out = tmp_path / "exported"
    words = ["export", trained, "--to", "safetensors", "--out", out, "--quiet"]
    assert main(list(map(str, words))) == 0
    shared = {"data": str(images), "images": 6, "workers": 0, "batch_size": 6}

    def maps(word):
        config = DiagnoseConfig(model=word, **shared)
        assert config.random_models == []
        source = build_source.build_source(config, torch.device("cpu"))
        (chunk,) = source.chunks([0])
        return chunk.maps, source

    want, _ = maps(str(trained))
    for word in (str(out), f"local-dir:{out}"):
        found, source = maps(word)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[layer], want[layer]) for layer in want)
        assert source.identity()["model"]["name"] == word

    call = ["diagnose", "--data", str(images), "--out", str(tmp_path / "out")]
    for words, message in (
        (("--model", tmp_path), f"model: {tmp_path}: no config.json there; expected a folder"),
        (("--model", "local-dir:nowhere"), "model: nowhere: no config.json there"),
        (("--model", out, "--img-size", "32"), f"img_size: got 32 together with {out}, which"),
        (("--model", out, "--checkpoint", "x.pth"), f"checkpoint: got x.pth together with {out}"),
        (
            ("--model", out, "--pretrained"),
            f"expected a timm name without a weights file, got {out}",
        ),
    ):
        assert main([*call, *map(str, words)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
