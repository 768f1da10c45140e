"""Feature files and models as sources: layouts, prefix tokens, unusable files."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from featkd.data import DataConfig
from featkd.diagnostics import DiagnoseConfig
from featkd.diagnostics.feature_files import FeatureFiles
from featkd.diagnostics.model_features import MeasuredModel, ModelFeatures, _find_images
from featkd.diagnostics.source import Layer, UnreadableError, fingerprint, num_chunks
from featkd.models import create_teacher
from tests.diagnostics.maps import feature_maps


@pytest.fixture
def maps():
    """(images, layers, tokens, channels): five images, three layers, 4 x 4 tokens and a class."""
    return feature_maps(15, 17, 8).unflatten(0, (5, 3))


def feature_files(folder, **options):
    return FeatureFiles(DiagnoseConfig(features=str(folder), **options))


def write_npy(folder, maps):
    for number, m in enumerate(maps):
        np.save(folder / f"{number:03}.npy", m.numpy())


def all_maps(source, layer):
    chunks = list(source.chunks(range(num_chunks(source))))
    return torch.cat([c.maps[layer] for c in chunks]), torch.cat([c.images for c in chunks])


def test_published_layout(tmp_path, maps):
    write_npy(tmp_path, maps)
    source = feature_files(tmp_path, batch_size=2)
    assert source.layers == (Layer("", 0), Layer("", 1), Layer("", 2))
    found, images = all_maps(source, Layer("", 1))
    assert torch.equal(found, maps[:, 1, 1:])  # without the class token
    assert images.tolist() == [0, 1, 2, 3, 4]
    chosen = feature_files(tmp_path, layers=[-1], prefix_tokens=0)
    assert torch.equal(all_maps(chosen, Layer("", 2))[0], maps[:, 2])


def test_each_file_is_opened_once(tmp_path, maps, monkeypatch):
    write_npy(tmp_path, maps)
    opened = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda f, **k: (opened.append(f.name), load(f, **k))[1])
    all_maps(feature_files(tmp_path, batch_size=2), Layer("", 0))
    assert len(opened) == len(set(opened)) == 5


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_named_layers_of_several_widths(tmp_path, suffix):
    names = ("block_2", "block_10")
    stored = []
    for number in range(3):
        first, second = feature_maps(1, 16, 6, number)[0], feature_maps(1, 4, 9, number)[0]
        stored.append((first, second))
        parts = dict(zip(names, (first, second), strict=True))
        if suffix == "npz":
            np.savez(tmp_path / f"{number}.npz", **{k: v.numpy() for k, v in parts.items()})
        else:
            safetensors.torch.save_file(parts, tmp_path / f"{number}.safetensors")
    source = feature_files(tmp_path)
    for position in (0, 1):
        found, _ = all_maps(source, Layer("", position))
        assert torch.equal(found, torch.stack([image[position] for image in stored]))


def test_notes_on_prefix_tokens(tmp_path, maps):
    write_npy(tmp_path, maps)
    (note,) = feature_files(tmp_path).notes
    assert note.startswith("of 17 tokens per map the first 1 are removed as class")
    assert feature_files(tmp_path, prefix_tokens=1).notes == []
    for path in tmp_path.iterdir():
        np.save(path, np.ones((3, 15, 8), np.float32))
    (note,) = feature_files(tmp_path).notes
    assert note.startswith("15 tokens per map form no square")
    assert feature_files(tmp_path, images=2).num_images == 2


def test_object_arrays_need_allow_pickle(tmp_path):
    stages = np.empty(2, dtype=object)
    stages[0] = np.ones((4, 4, 3), np.float32)
    stages[1] = np.ones((2, 2, 6), np.float32)
    np.save(tmp_path / "0.npy", stages)
    with pytest.raises(UnreadableError, match=r"0.npy holds an object array.*allow_pickle"):
        feature_files(tmp_path)
    source = feature_files(tmp_path, allow_pickle=True)
    (chunk,) = source.chunks([0])
    assert [tuple(m.shape) for m in chunk.maps.values()] == [(1, 16, 3), (1, 4, 6)]


@pytest.mark.parametrize("kind", ["truncated", "width", "tokens", "garbage", "integers"])
def test_bad_file_is_named_or_skipped(tmp_path, maps, kind):
    write_npy(tmp_path, maps)
    path = tmp_path / "003.npy"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "garbage":
        path.write_bytes(b"no array")
    elif kind == "integers":
        np.save(path, np.ones((3, 17, 8), np.int64))
    else:
        np.save(path, np.ones((3, 17, 9) if kind == "width" else (3, 26, 8), np.float32))
    with pytest.raises(UnreadableError, match=r"003\.npy"):
        all_maps(feature_files(tmp_path), Layer("", 0))
    source = feature_files(tmp_path, on_bad="skip", batch_size=2)
    chunks = list(source.chunks(range(3)))
    assert torch.cat([c.images for c in chunks]).tolist() == [0, 1, 2, 4]
    assert [*chunks[1].left_out] == [str(path)]


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html>", b"", pickle.dumps([1.0])], ids=["page", "empty", "pickle"]
)
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_other_file_types_are_not_called_object_arrays(tmp_path, suffix, content, allow_pickle):
    """The error for a failed download must not suggest allow_pickle."""
    (tmp_path / f"0{suffix}").write_bytes(content)
    with pytest.raises(UnreadableError) as caught:
        feature_files(tmp_path, allow_pickle=allow_pickle)
    assert f"0{suffix} is damaged or not a {suffix} file: expected" in str(caught.value)
    assert str(caught.value).endswith(f"got {content[:6]!r}")
    assert "pickle" not in str(caught.value).split("got")[0]


def test_bad_folders_and_layers(tmp_path, maps):
    with pytest.raises(FileNotFoundError, match="features: expected a folder"):
        feature_files(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"expected files of one of \.npy.*got none"):
        feature_files(tmp_path)
    write_npy(tmp_path, maps)
    with pytest.raises(ValueError, match=r"layers: 3 is out of range .*valid: -3\.\.2"):
        feature_files(tmp_path, layers=[3])
    with pytest.raises(ValueError, match="prefix_tokens: expected fewer than the 17 tokens"):
        feature_files(tmp_path, prefix_tokens=17)


TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3}


def model_features(folder, *layers, model=None, **options):
    """A small model on a folder of images."""
    model = model or create_teacher("vit_tiny_patch16_224", **TINY)
    return ModelFeatures(
        DiagnoseConfig(model="vit_tiny_patch16_224", data=str(folder), **options),
        [MeasuredModel("", model, layers or None, {})],
        DataConfig(img_size=16, workers=0),
        torch.device("cpu"),
    )


def test_models_on_images(images):
    source = model_features(images, -1, 0, batch_size=25, images=50)
    assert source.num_images == 50
    assert source.layers == (Layer("", 2), Layer("", 0))
    chunk = next(source.chunks([1]))
    assert chunk.images.tolist() == list(range(25, 50))
    assert chunk.maps[Layer("", 2)].shape == (25, 16, 12)
    classes = {source.name(image).split("/")[-2] for image in range(50)}
    assert classes == {"blue", "green", "red"}  # spread over the folder
    again = next(source.chunks([1]))
    assert torch.equal(chunk.maps[Layer("", 0)], again.maps[Layer("", 0)])


def test_blocks_after_the_deepest_layer_are_not_run(images):
    model = create_teacher("vit_tiny_patch16_224", **TINY)
    for unused in (model.blocks[2], model.norm, model.head):
        unused.register_forward_hook(lambda *_: pytest.fail("this module is not needed"))
    (chunk,) = model_features(images, 1, 0, model=model, images=2).chunks([0])
    assert list(chunk.maps) == [Layer("", 1), Layer("", 0)]
    assert len(chunk.images) == 2


def test_unreadable_images(tmp_path):
    for number in range(3):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(Exception, match=r"1\.png: the file is empty"):
        next(model_features(tmp_path).chunks([0]))
    chunk = next(model_features(tmp_path, on_bad="skip").chunks([0]))
    assert chunk.images.tolist() == [0, 2]
    assert [*chunk.left_out.values()] == ["the file is empty"]
    with pytest.raises(FileNotFoundError, match="data: expected a folder"):
        model_features(tmp_path / "none")


def test_links_hidden_files_and_other_names(images, tmp_path):
    """The same files are skipped as in training; names need not be UTF-8."""
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    expected = sorted(str(path) for path in folder.rglob("*.png"))
    (folder / "loop").symlink_to(".")
    first = Path(expected[0])
    for hidden in (".x.png", ".hidden/x.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        shutil.copy(first, folder / hidden)
    with pytest.warns(UserWarning, match="1 links to folders .*images/loop"):
        assert _find_images(folder, None) == expected
    other = os.path.join(os.fsencode(first.parent), b"caf\xe9.png")
    os.rename(first, other)
    assert fingerprint([os.fsdecode(other)]) != fingerprint(expected[1:2])


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors"])
def test_hidden_and_special_feature_files(tmp_path, maps, suffix):
    name = "\x1b[2J"
    os.mkfifo(tmp_path / f"{name}.{suffix}")
    (tmp_path / ".0.npy").write_bytes(b"")  # hidden, so not of another kind
    (tmp_path / "._0.npz").write_bytes(b"")
    with pytest.raises(UnreadableError, match="a FIFO, not a regular file") as raised:
        feature_files(tmp_path)
    assert str(raised.value).isprintable()
