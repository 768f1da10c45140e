"""`featkd evaluate`: scores of a trained student against training's and scikit-learn's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize
from timm.data import create_transform, resolve_model_data_config

from featkd.cli.main import main
from featkd.train.checkpoint import load
from featkd.train.trained import load_trained
from tests.conftest import CLASSES, TINY
from tests.diagnostics.commands import QUICK

TIMM = ("--model", "vit_tiny_patch16_224", "--model-options", json.dumps(TINY | {"img_size": 16}))


def evaluate(tmp_path: Path, *words: object) -> list[dict[str, Any]]:
    """Scores of the models, from the JSON file."""
    options = ("--device", "cpu", "--workers", "0", "--json", tmp_path / "scores.json")
    assert main(["evaluate", *map(str, (*words, *options))]) == 0
    return json.loads((tmp_path / "scores.json").read_text())["models"]


def features_of(checkpoint: Path, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and predictions, image by image, by timm alone."""
    model: Any = load_trained(checkpoint)
    transform = create_transform(**resolve_model_data_config(model))
    rows, labels, predicted = [], [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / name).iterdir()):
            with torch.no_grad():
                x = model.forward_features(transform(Image.open(path))[None])
                rows.append(model.forward_head(x, pre_logits=True)[0].double().numpy())
                predicted.append(model.forward_head(x).argmax().item())
            labels.append(label)
    return np.stack(rows), np.array(labels), np.array(predicted)


def test_scores_are_those_of_training_and_of_scikit_learn(checkpoint, images, tmp_path, capsys):
    state = load(checkpoint)
    for weights, key in (("model", "model"), ("model_ema", "ema")):
        words = (checkpoint, "--data", images, "--scores", "head", "--weights", weights)
        (row,) = evaluate(tmp_path, *words)
        for score in ("top1", "top5"):
            assert row["scores"]["head"][score] == pytest.approx(state["scores"][key][score])
        assert (row["images"], row["bank_images"]) == (12, 0)
    capsys.readouterr()
    (row,) = evaluate(tmp_path, checkpoint, "--data", images)
    printed = capsys.readouterr().out.splitlines()
    assert (row["images"], row["bank_images"], row["classes"]) == (12, 48, [*CLASSES])
    bank, labels, _ = features_of(checkpoint, images / "train")
    queries, truth, predicted = features_of(checkpoint, images / "val")
    assert row["scores"]["head"]["confusion"] == confusion_matrix(truth, predicted).tolist()

    knn = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    found = knn.fit(normalize(bank), labels).predict(normalize(queries))
    assert row["scores"]["knn"]["confusion"] == confusion_matrix(truth, found).tolist()
    assert row["scores"]["knn"]["top1"] == pytest.approx(100 * np.mean(found == truth))

    scaler = StandardScaler().fit(bank)
    probe = LogisticRegression(C=1 / (row["scores"]["probe"]["penalty"] * 48), max_iter=9999)
    found = probe.fit(scaler.transform(bank), labels).predict(scaler.transform(queries))
    assert row["scores"]["probe"]["confusion"] == confusion_matrix(truth, found).tolist()
    accuracies = [row["scores"][x]["top1"] for x in ("head", "knn", "probe")]
    assert printed[0].split() == ["model", "top-1", "top-5", "kNN", "probe", "images"]
    cells = printed[1].split()
    assert [float(cells[i]) for i in (1, 3, 4)] == pytest.approx(accuracies, abs=0.005)


def test_processes_share_the_images(checkpoint, images, tmp_path, server):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    (data / "val" / "green" / "1.png").write_bytes(b"broken")
    common = ("evaluate", checkpoint, "--data", data, "--on-bad", "skip", "--device", "cpu")
    common = (*common, "--workers", "0", "--images", "11", "--batch-size", "2", "--json")
    assert server.call(*common, tmp_path / "1.json").returncode == 0
    for rank in server.ranks(3, *common, tmp_path / "3.json"):
        assert rank.wait() == 0, rank.stderr
    one, three = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 3))
    assert one == three
    (row,) = one["models"]
    assert (row["images"], row["bank_images"]) == (10, 11)
    assert [*row["left_out"]] == [str(data / "val" / "green" / "1.png")]


def test_a_timm_model_and_a_checkpoint_in_one_table(checkpoint, images, tmp_path, capsys):
    rows = evaluate(tmp_path, checkpoint, *TIMM, "--data", images)
    said = capsys.readouterr()
    assert "vit_tiny_patch16_224 (random weights)" in said.out
    assert "vit_tiny_patch16_224: top-1 left out: the model has no class for 3 " in said.err
    assert [sorted(row["scores"]) for row in rows] == [["head", "knn", "probe"], ["knn", "probe"]]
    assert rows[1]["data"]["img_size"] == 16
    assert rows[1]["data"]["mean"] == [0.5, 0.5, 0.5]  # timm's record of this model


def test_folders_that_differ(checkpoint, images, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(images / "val", data / "val")
    (row,) = evaluate(tmp_path, checkpoint, "--data", data)  # no training images
    assert sorted(row["scores"]) == ["head"]
    assert "knn and probe left out: no folder" in capsys.readouterr().err
    (data / "val" / "blue").rename(data / "val" / "a stone")
    words = ["evaluate", str(checkpoint), "--data", str(data), "--device", "cpu"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "the model has no class for 1 class folder of 3: a stone; its 3 classes: blue" in error
    shutil.rmtree(data / "val" / "a stone")
    (row,) = evaluate(tmp_path, checkpoint, "--data", data)
    assert [sum(counts) for counts in row["scores"]["head"]["confusion"]] == [4, 4]
    assert row["outputs"] == [*CLASSES]
    hits = np.diag(np.array(row["scores"]["head"]["confusion"])[:, 1:]).sum()
    assert row["scores"]["head"]["top1"] == pytest.approx(100 * hits / 8)


@pytest.mark.parametrize("command", ["evaluate", "predict", "diagnose"])
def test_another_crop_than_timms_record_is_noted(command, images, tmp_path, capsys):
    options = TINY | {"img_size": 16, "pretrained_cfg_overlay": {"crop_mode": "squash"}}
    words = [command, *TIMM[:-1], json.dumps(options), "--data", images, "--workers", "0"]
    words += {"evaluate": [], "predict": ["--out", tmp_path / "table.csv"]}.get(
        command, ["--out", tmp_path / "report", *QUICK]
    )
    assert main([*map(str, words), "--device", "cpu"]) == 0
    note = "crop_mode: timm's record has squash, but the images are cropped at their centre"
    assert note in "".join(capsys.readouterr())


def test_bad_input_is_one_line(images, tmp_path, fails):
    weights, empty = tmp_path / "weights.pt", tmp_path / "empty"
    torch.save({"weight": torch.zeros(2)}, weights)
    for name in ("train", "val"):
        for label in CLASSES:
            (empty / name / label).mkdir(parents=True)
    shutil.copytree(images / "train", empty / "train", dirs_exist_ok=True)
    for words, code, message in (
        ((tmp_path / "no.pt", "--data", images), 2, "no checkpoint "),
        ((weights, "--data", images), 1, "not a checkpoint of a featkd run; for the weights of a"),
        ((*TIMM, "--data", tmp_path / "no"), 2, "--data: no folder "),
        ((*TIMM, "--data", empty), 2, "no images in "),
        ((*TIMM, "--data", images, "--val-split", "test"), 2, "--val-split: no folder "),
        ((*TIMM, "--data", images, "--k", "0"), 2, "--k: expected >= 1"),
        ((*TIMM, "--data", images, "--checkpoint", weights, "--pretrained"), 2, "--checkpoint: "),
    ):
        fails(("evaluate", *words, "--device", "cpu", "--workers", "0"), code, message)


def test_an_exported_student_scores_as_its_checkpoint(checkpoint, images, tmp_path):
    folder = tmp_path / "exported"
    words = ("export", checkpoint, "--to", "timm", "--license", "mit", "--out", folder)
    assert main([*map(str, words)]) == 0
    rows = evaluate(tmp_path, checkpoint, folder, "--data", images)
    for score in ("head", "knn", "probe"):
        first, second = (row["scores"][score] for row in rows)
        assert first == second, score
    assert rows[1]["weights"] == "exported"
