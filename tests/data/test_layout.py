"""Layout of image folders: classes, splits, links, names, and messages about other layouts."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import ImageFolder

from featkd.data import BadImageError, SampleKey
from tests.data.conftest import MakeSet, save_noise
from tests.data.loading import image_set, names, refused


def test_classes_are_the_training_folders_in_text_order(tmp_path: Path) -> None:
    for name in ("train/10", "train/2", "train/b/deep/er", "train/.hidden", "val/2"):
        save_noise(tmp_path / name / "x.png")
    save_noise(tmp_path / "train/b/ä ö.JPEG")
    (tmp_path / "train/b/notes.txt").write_text("no image")
    (tmp_path / "train/loose.jpg").write_bytes(b"beside the classes")
    train, val = image_set(tmp_path), image_set(tmp_path, "val")
    assert train.classes == val.classes == ["10", "2", "b"]  # as torchvision's ImageFolder
    found = ["10/x.png", "2/x.png", "b/ä ö.JPEG", "b/deep/er/x.png"]
    assert names(tmp_path) == [f"train/{name}" for name in found]
    assert [train[SampleKey(0, i, 0)].target for i in range(4)] == [0, 1, 2, 2]
    assert [val[SampleKey(0, i, 0)].target for i in range(len(val))] == [1]


def test_classes_without_validation_images_are_named(make_set: MakeSet) -> None:
    root = make_set(train=12, val=6)
    for path in (root / "val/class1").iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match="no validation images of the classes class1 in .*val"):
        image_set(root, "val")


def test_shared_images_of_two_splits_are_said(make_set: MakeSet) -> None:
    root = make_set(train=12, val=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(image_set(root, "val")) == 6  # same names, other images
    copied, linked = root / "val/class0/003.jpg", root / "val/class0/002.jpg"
    copied.write_bytes((root / "train/class0/003.jpg").read_bytes())
    linked.symlink_to("../../train/class0/002.jpg")
    with pytest.warns(UserWarning, match=r"2 of 8 compared files .*\(class0/002.jpg, class0/003"):
        image_set(root, "val")
    (root / "train/nested/class0").mkdir(parents=True)
    save_noise(root / "train/nested/class0/x.jpg")
    with pytest.warns(UserWarning, match=r"train/nested lies below the training images, as a cla"):
        image_set(root, "val", val_split="train/nested")


def test_held_out_images_stay_when_others_are_added(make_set: MakeSet) -> None:
    root = make_set(train=60, classes=2)
    held = {"val_split": None, "val_fraction": 0.3}
    assert image_set(root, "val", **held).classes == ["class0", "class1"]
    train, val = (set(names(root, split, **held)) for split in ("train", "val"))
    assert not train & val
    assert len(train | val) == 60
    assert 8 <= len(val) <= 28  # 18 +- 10: binomial, p = 0.005
    for number in range(40):
        save_noise(root / f"train/class{number % 2}/more{number}.jpg")
    assert train < set(names(root, "train", **held))
    assert val < set(names(root, "val", **held))
    for fraction, split, advice in ((1e-9, "val", "larger"), (1 - 1e-9, "train", "smaller")):
        message = rf"data\.val_fraction: .* use a {advice} fraction, or folders for both splits"
        refused(ValueError, message, root, split, val_split=None, val_fraction=fraction)


def test_links_do_not_multiply_images(make_set: MakeSet, tmp_path: Path) -> None:
    root = make_set(train=12, val=3)
    expected, fingerprint = names(root), image_set(root).fingerprint()
    (root / "train/class0/loop").symlink_to(".")
    (root / "train/class0/up").symlink_to("..")
    (root / "train/class0/self").symlink_to("self")
    (root / "train/class1/root").symlink_to(root)
    with pytest.warns(UserWarning, match="3 links to folders .* are not followed: .*class0/loop"):
        assert image_set(root).fingerprint() == fingerprint
    # links to other folders are followed, once
    save_noise(tmp_path / "more/deep/x.jpg")
    (root / "train/class2/a").symlink_to(tmp_path / "more")
    (root / "train/class2/b").symlink_to(tmp_path / "more/deep")
    (tmp_path / "more/deep/back").symlink_to(root / "train/class2")
    with pytest.warns(UserWarning, match="5 links"):
        more = names(root)
    assert set(more) - set(expected) == {"train/class2/a/deep/x.jpg"}
    (root / "train/zz").symlink_to(".")
    with pytest.warns(UserWarning, match="6 links"):
        refused(FileNotFoundError, "no images in the class folders zz", root)


def test_the_order_is_that_of_torchvision(make_set: MakeSet) -> None:
    """Sample keys number the images, so another order would change runs and caches."""
    root = make_set()
    for name in ("b/x", "a/x", "a-/x", "a/b/x", "a b/y", "B/x", "a/b-c/x", "z", "0"):
        save_noise(root / f"train/class1/{name}.jpg")
    expected = [path for path, _ in ImageFolder(str(root / "train")).samples]
    assert [f"{root}/{name}" for name in names(root)] == expected


def test_hidden_files_and_folders_are_skipped(make_set: MakeSet) -> None:
    root = make_set(train=6, val=3)
    for split, name in itertools.product(("train", "val"), (".y.jpg", ".d/y.jpg", "d/.e/y.jpg")):
        save_noise(root / split / "class0" / name)
    save_noise(root / "train/.hidden/y.jpg")
    assert (len(names(root)), len(names(root, "val"))) == (6, 3)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("val/x.jpg", "val/y.jpg"), r"val; found 2 image file\(s\) directly in it \(x.jpg, y.jpg"),
        (("val/a.tar.gz",), r"val; found a.tar.gz, but shards must be uncompressed tar files"),
        (("val/class0/.x.jpg",), r"no images in .*/val; expected <path>/<split>/<class>/"),
    ],
)
def test_unexpected_layouts_are_described(
    make_set: MakeSet, files: tuple[str, ...], expected: str
) -> None:
    root = make_set()
    shutil.rmtree(root / "val")
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    refused(FileNotFoundError, expected, root, "val")
    shutil.rmtree(root / "train")
    (root / "val").rename(root / "train")
    refused(FileNotFoundError, expected.replace("val", "train"), root)


def test_a_leftover_tar_file_beside_class_folders(make_set: MakeSet) -> None:
    root = make_set()
    (root / "train/a.tar").write_bytes(b"")
    refused(ValueError, r"found tar files \(a.tar\) beside folders \(class0, ", root)


def test_names_that_are_not_utf8(make_set: MakeSet) -> None:
    root = make_set(train=6, val=3)
    name = os.fsencode(root) + b"/train/caf\xe9"
    os.rename(root / "train/class0", name)
    os.rename(root / "val/class0", os.fsencode(root) + b"/val/caf\xe9")
    train = image_set(root)
    assert train.classes[0] == "caf\udce9"
    assert len(train.fingerprint()) == 64
    with open(name + b"/000.jpg", "wb"), pytest.raises(BadImageError) as raised:
        train[SampleKey(0, 0, 0)]
    assert r"train/caf\xe9/000.jpg: the file is empty" in str(raised.value)
    assert 0 < len(names(root, "val", val_split=None, val_fraction=0.5)) < 6


def test_escape_sequences_in_names_are_escaped_in_messages(make_set: MakeSet) -> None:
    root = make_set(train=4, val=4)
    for split in ("train", "val"):
        os.rename(root / split / "class0", root / split / "\x1b]0;owned\x07")
    for path in (root / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(BadImageError) as bad:
        image_set(root)[SampleKey(0, 0, 0)]
    os.rename(root / "train/\x1b]0;owned\x07", root / "train/other")
    unknown = refused(ValueError, "classes that the training split lacks", root, "val")
    for message in (str(bad.value), unknown):
        assert message.isprintable()
        assert r"\x1b]0;owned\x07" in message


def test_missing_folders(make_set: MakeSet, tmp_path: Path) -> None:
    root = make_set()

    def error(split: Any = "train", path: Path | str = root, **options: Any) -> str:
        return refused(FileNotFoundError, "expected", path, split, **options)

    assert "data.path: not set" in error(path="")
    assert f"data.path: no folder {tmp_path}/nowhere" in error(path=tmp_path / "nowhere")
    message = error(train_split="training")
    assert f"data.train_split: no folder {root}/training" in message
    assert "folders there: train, val" in message
    assert f"data.val_split: no folder {root}/test" in error("val", val_split="test")
    flat = error(path=root / "train")
    assert 'data.train_split="." with data.val_split=null and data.val_fraction=0.1' in flat
    assert "class0, class1, class2" in flat
    (tmp_path / "none/train").mkdir(parents=True)
    assert f"no class folders in {tmp_path}/none/train" in error(path=tmp_path / "none")
    (tmp_path / "none/train/a").mkdir()
    (tmp_path / "none/train/a/x.txt").write_text("x")
    nothing = error(path=tmp_path / "none")
    assert f"no images in {tmp_path}/none/train; expected <path>/<split>/<class>/*.jpg" in nothing
    assert "files ending in .jpg" in nothing
    (root / "train/zebra").mkdir()
    assert f"no images in the class folders zebra of {root}/train" in error()


def test_unknown_validation_classes_are_listed(make_set: MakeSet) -> None:
    root = make_set()
    for name in ("zebra", "ape"):
        save_noise(root / "val" / name / "x.jpg")
    message = "2 classes that the training split lacks: ape, zebra;"
    refused(ValueError, message, root, "val")
    for i in range(20):
        (root / f"val/z{i:02d}").mkdir()
    refused(ValueError, "z07, z08, and 12 more;", root, "val")


def test_splits_are_not_taken_for_classes(make_set: MakeSet) -> None:
    message = r'data\.train_split: got "\." but .* holds splits \(train'
    refused(ValueError, message, make_set(), train_split=".")


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_dataset_survives_pickling(make_set: MakeSet, split: Any) -> None:
    """Workers started by spawn or forkserver receive it pickled."""
    dataset = image_set(make_set(), split)
    again = pickle.loads(pickle.dumps(dataset))
    key = SampleKey(1, 2, 0)
    assert torch.equal(dataset[key].image, again[key].image)
