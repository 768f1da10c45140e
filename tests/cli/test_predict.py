"""`featkd predict`: the table and the features against a forward pass of each image."""

from __future__ import annotations

import csv
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

from featkd.cli.main import main
from featkd.train.recipe import LossConfig
from featkd.train.trained import load_trained
from tests.conftest import CLASSES
from tests.train.runs import changed, run


def test_classes_probabilities_and_features(checkpoint, images, tmp_path, server, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(images / "val" / "red", photos / "more")
    shutil.copy(images / "val" / "blue" / "0.png", photos / "b, é.png")
    (photos / "broken.png").write_bytes(b"broken")
    words = ["predict", checkpoint, "--data", photos, "--device", "cpu", "--workers", "0"]
    words += ["--on-bad", "skip", "--top", "2"]
    files = ["--out", tmp_path / "1.csv", "--features", tmp_path / "1.npy"]
    assert main([*map(str, (*words, *files))]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / '1.csv'}: 5 images\n"
    assert "1 unreadable image left out: " in said.err
    with (tmp_path / "1.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    features = np.load(tmp_path / "1.npy")
    assert {row["image"] for row in rows} == {"b, é.png", *(f"more/{n}.png" for n in range(4))}
    assert len(features) == 5
    model: Any = load_trained(checkpoint)
    transform = create_transform(**resolve_model_data_config(model))
    for row, feature in zip(rows, features, strict=True):
        with torch.no_grad():
            x = model.forward_features(transform(Image.open(photos / row["image"]))[None])
            expected = model.forward_head(x, pre_logits=True)[0]
            values, order = model.forward_head(x)[0].softmax(0).topk(2)
        np.testing.assert_allclose(feature, expected, atol=1e-5)
        assert [row["class_1"], row["class_2"]] == [CLASSES[i] for i in order]
        found = [float(row[f"probability_{i}"]) for i in (1, 2)]
        assert found == pytest.approx(values.tolist(), abs=1e-5)
    files = ["--out", tmp_path / "2.csv", "--features", tmp_path / "2.safetensors"]
    for rank in server.ranks(2, *words, *files):
        assert rank.wait() == 0, rank.stderr
    assert (tmp_path / "2.csv").read_text() == (tmp_path / "1.csv").read_text()
    shared = load_file(tmp_path / "2.safetensors")["features"].numpy()
    np.testing.assert_allclose(shared, features, atol=1e-6)


def test_a_model_without_a_classifier_gets_a_note_unless_features_are_written(
    recipe, tmp_path, capsys
):
    loss = LossConfig(feature="mse")
    recipe = changed(recipe, student=dict(arch="lift"), data=dict(labels="none"), loss=loss)
    run(recipe)
    words = ["predict", f"{recipe.out}/last.pt", "--data", recipe.data.path, "--device", "cpu"]
    words += ["--workers", "0", "--out", str(tmp_path / "x.csv")]
    assert main(words) == 0
    assert "last.pt has no classifier: " in capsys.readouterr().err
    assert main([*words, "--features", str(tmp_path / "x.npy")]) == 0
    assert "classifier" not in capsys.readouterr().err


def test_bad_input_is_one_line(checkpoint, images, tmp_path, fails):
    (tmp_path / "empty").mkdir()
    for words, message in (
        ((checkpoint, "--data", tmp_path / "empty", "--out", tmp_path / "x.csv"), "no images in"),
        ((checkpoint, "--data", tmp_path / "no", "--out", tmp_path / "x.csv"), "no folder"),
        ((checkpoint, "--data", images, "--out", tmp_path / "no" / "x.csv"), "--out: no folder"),
        ((checkpoint, "--data", images, "--out", tmp_path / "x.csv", "--top", 0), "--top: expect"),
    ):
        fails(("predict", *words, "--device", "cpu", "--workers", "0"), 2, message)
        assert not (tmp_path / "x.csv").exists()
