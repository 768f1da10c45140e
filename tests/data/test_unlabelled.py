"""data.labels none: any images below a folder, or shards without labels, are one split."""

from __future__ import annotations

import shutil
import tarfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from featkd.data import DataConfig, SampleKey
from featkd.data.shards import ShardError
from tests.data import loading
from tests.data.conftest import MakeSet, save_noise
from tests.data.test_shards import add

image_set, names, refused = (
    partial(function, labels="none")
    for function in (loading.image_set, loading.names, loading.refused)
)


def pack(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            add(archive, name, content)


def test_all_images_below_the_split_folder_are_found(tmp_path: Path) -> None:
    for name in ("train/a.jpg", "train/2024/b.png", "train/2024/05/c.JPEG", "train/.d/x.jpg"):
        save_noise(tmp_path / name)
    (tmp_path / "train/notes.txt").write_text("not an image")
    (tmp_path / "train/2024/loop").symlink_to("..")
    save_noise(tmp_path / "val/flat.jpg")
    with pytest.warns(UserWarning, match="1 links to folders"):
        found = names(tmp_path)
    assert found == ["train/a.jpg", "train/2024/b.png", "train/2024/05/c.JPEG"]
    assert names(tmp_path, "val") == ["val/flat.jpg"]


def test_a_folder_of_photographs_holds_out_a_tenth(tmp_path: Path) -> None:
    for number in range(100):
        save_noise(tmp_path / f"day{number % 3}/{number}.jpg", (8, 8))
    refused(FileNotFoundError, r'data\.train_split="\." with data\.val_split=nul', tmp_path)
    whole = {"train_split": ".", "val_split": None}
    train, val = (names(tmp_path, split, **whole) for split in ("train", "val"))
    assert not set(train) & set(val)
    assert len(train) + len(val) == 100
    assert 1 <= len(val) <= 25
    assert names(tmp_path, "val", **whole, val_fraction=0.1) == val
    for split in ("train", "val"):  # the folders are no classes
        assert image_set(tmp_path, split, **whole).classes == []
    refused(ValueError, "use a larger fraction", tmp_path, split="val", **whole, val_fraction=1e-9)


def test_only_validation_images_in_class_folders_have_classes(make_set: MakeSet) -> None:
    root = make_set(train=6, val=6)
    train, val = image_set(root), image_set(root, "val")
    assert (train.classes, val.classes) == ([], ["class0", "class1", "class2"])
    assert {train[SampleKey(0, i, 0)].target for i in range(6)} == {0}
    assert [val[SampleKey(0, i, 0)].target for i in range(6)] == [0, 0, 1, 1, 2, 2]
    save_noise(root / "train/new_class/x.jpg")  # training has no classes that validation must have
    assert len(names(root)) == 7
    for name in ("class1/x.jpg", "class2/x.jpg"):  # classes of one image
        shutil.rmtree((root / "val" / name).parent)
        save_noise(root / "val" / name)
    assert image_set(root, "val").classes == []
    save_noise(root / "val/class2/y.jpg")
    assert image_set(root, "val").classes == ["class0", "class1", "class2"]
    save_noise(root / "val/loose.jpg")
    assert image_set(root, "val").classes == []


def test_batches_equal_those_with_labels(make_set: MakeSet, backend: str) -> None:
    """Images in class folders are the same images in the same order."""
    root = make_set()
    for split in ("train", "val"):
        with (
            loading.loading(root, split) as labelled,
            loading.loading(root, split, labels="none") as loader,
        ):
            pairs = list(zip(labelled, loader, strict=True))
        assert all(torch.equal(a.images, b.images) for a, b in pairs)
        assert all(torch.equal(a.keys, b.keys) for a, b in pairs)
        zero = [not b.targets.any() for _, b in pairs]
        assert all(zero) if split == "train" else not all(zero)


def test_shards_without_labels(make_set: MakeSet, tmp_path: Path, backend: str) -> None:
    root, other = make_set(), tmp_path / "shards"
    for split in ("train", "val"):
        files = sorted((root / split).rglob("*.jpg"))
        content = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}
        content[f"{files[0].parent.name}/{files[0].stem}.json"] = b'{"caption": "a label"}'
        pack(other / split / "0.tar", dict(sorted(content.items())))
    for split in ("train", "val"):
        with (
            loading.loading(root, split, labels="none") as folder,
            loading.loading(other, split, labels="none") as shards,
        ):
            assert shards.classes == []
            ours, theirs = list(folder), list(shards)
        assert loading.same([b._replace(targets=b.targets * 0) for b in ours], theirs)
    held = [names(other, s, val_split=None, val_fraction=0.4) for s in ("train", "val")]
    assert all(held)
    assert sorted(held[0] + held[1]) == names(other)
    pack(other / "train/1.tar", {"x.json": b"{}"})
    refused(ShardError, r"expected one image per sample, found x\.json", other)


def test_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "train/empty").mkdir(parents=True)
    refused(FileNotFoundError, "no images in .*; expected images in it or in folders", tmp_path)
    save_noise(tmp_path / "train/x.jpg")
    pack(tmp_path / "train/0.tar", {"y.jpg": (tmp_path / "train/x.jpg").read_bytes()})
    refused(ValueError, "found tar files .* beside images", tmp_path)
    (tmp_path / "train/x.jpg").unlink()
    assert names(tmp_path) == ["train/0.tar/y.jpg"]
    with pytest.raises(ValueError, match=r"data\.labels: expected one of folders, none"):
        DataConfig(labels="some")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_split": "."}, "val lies below the training images;"),
        ({"val_split": "."}, "contains the training images"),
        ({"val_split": "train"}, "is the folder of the training images"),
        ({}, ""),
    ],
)
def test_validation_on_training_images_is_said(make_set: MakeSet, options: Any, said: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image_set(make_set(), "val", **options)
    assert len(caught) == bool(said)
    assert all(said in str(warning.message) for warning in caught)
