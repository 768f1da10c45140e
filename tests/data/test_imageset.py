"""Image sets: reading, folder layout, and unreadable files."""

from __future__ import annotations

import gc
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featkd.data import AugmentConfig, BadImageError, DataConfig, ImageSet, SampleKey, read_image
from featkd.data.imageset import MAX_TRIES
from tests.data.conftest import MakeSet, save_noise

Spoil = Callable[[Path, str], None]
HOWS = {
    "truncated": "OSError: image file is truncated",
    "empty": "the file is empty",
    "text": r"not a known image format \(26 bytes\)",
    "dangling": "FileNotFoundError",
}


def config(root: Path, **options: Any) -> DataConfig:
    return DataConfig(str(root), img_size=16, workers=0, **options)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.tile(np.linspace(0, 255, 12).astype(np.uint8), (10, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(np.stack([grey] * 3, -1)).convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    got = read_image(str(path))
    assert got.mode == "RGB"
    assert got.size == (12, 10)
    pixels = np.asarray(got).astype(int)
    tolerance = {"1": 255, "P": 40}.get(mode, 1)
    assert np.abs(pixels - grey[..., None]).max() <= tolerance
    assert pixels.min() == 0
    assert pixels.max() == 255


def test_sixteen_bit_grey_keeps_its_top_eight_bits(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 30000, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        got = np.asarray(read_image(str(tmp_path / name)))
        assert got[0, :, 1].tolist() == [0, 0, 1, 117, 255]


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", (12, 10)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(str(tmp_path / "x.jpg")).size == (12, 10)


@pytest.mark.parametrize("how", [None, *HOWS])
def test_the_file_is_closed(tmp_path: Path, spoil: Spoil, how: str | None) -> None:
    path = tmp_path / "x.jpg"
    save_noise(path)
    if how is not None:
        spoil(path, how)
    before = set(Path("/proc/self/fd").iterdir())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        try:
            kept = read_image(str(path))
        except BadImageError:
            kept = None
        gc.collect()
    assert (kept is None) == (how is not None)
    assert [str(warning.message) for warning in caught] == []
    assert len(set(Path("/proc/self/fd").iterdir())) == len(before)


@pytest.mark.parametrize("how", HOWS)
def test_bad_images_name_file_and_cause(tmp_path: Path, spoil: Spoil, how: str) -> None:
    path = tmp_path / "x.jpg"
    save_noise(path)
    spoil(path, how)
    with pytest.raises(BadImageError, match=rf"cannot read image {path}: .*{HOWS[how]}") as raised:
        read_image(str(path))
    assert raised.value.path == str(path)
    again = pickle.loads(pickle.dumps(raised.value))
    assert type(again) is BadImageError
    assert (again.path, again.cause) == (raised.value.path, raised.value.cause)
    assert str(again) == str(raised.value)


# ---------------------------------------------------------------- layout


def test_classes_are_the_training_folders_in_text_order(tmp_path: Path) -> None:
    for name in ("train/10", "train/2", "train/b/deep/er", "train/.hidden", "val/2"):
        save_noise(tmp_path / name / "x.png")
    save_noise(tmp_path / "train/b/ä ö.JPEG")
    (tmp_path / "train/b/notes.txt").write_text("no image")
    (tmp_path / "train/loose.jpg").write_bytes(b"beside the classes")
    train = ImageSet(config(tmp_path), "train")
    assert train.classes == ["10", "2", "b"]  # as torchvision's ImageFolder
    found = [(train.name(i), train[SampleKey(0, i, 0)].target) for i in range(len(train))]
    assert [(str(Path(p).relative_to(tmp_path)), t) for p, t in found] == [
        ("train/10/x.png", 0),
        ("train/2/x.png", 1),
        ("train/b/ä ö.JPEG", 2),
        ("train/b/deep/er/x.png", 2),
    ]
    val = ImageSet(config(tmp_path), "val")
    assert val.classes == train.classes
    assert [val[SampleKey(0, i, 0)].target for i in range(len(val))] == [1]


def test_a_flat_set_is_its_own_split(make_set: MakeSet) -> None:
    root = make_set() / "train"
    dataset = ImageSet(config(root, train_split=".", val_split="."), "val")
    assert dataset.classes == ["class0", "class1", "class2"]
    assert len(dataset) == 12


def test_missing_folders(make_set: MakeSet, tmp_path: Path) -> None:
    root = make_set()

    def error(split: Any = "train", path: Path | str = root, **options: Any) -> str:
        with pytest.raises(FileNotFoundError) as raised:
            ImageSet(config(Path(path), **options) if path else DataConfig(), split)
        message = str(raised.value)
        assert "expected" in message
        return message

    assert "data.path: not set" in error(path="")
    assert f"data.path: no folder {tmp_path}/nowhere" in error(path=tmp_path / "nowhere")
    message = error(train_split="training")
    assert f"data.train_split: no folder {root}/training" in message
    assert "folders there: train, val" in message
    assert f"data.val_split: no folder {root}/test" in error("val", val_split="test")
    flat = error(path=root / "train")
    assert 'data.train_split="." and data.val_split="."' in flat
    assert "class0, class1, class2" in flat
    (tmp_path / "none/train").mkdir(parents=True)
    assert f"no class folders in {tmp_path}/none/train" in error(path=tmp_path / "none")
    (tmp_path / "none/train/a").mkdir()
    (tmp_path / "none/train/a/x.txt").write_text("x")
    assert f"no images in {tmp_path}/none/train; expected files ending in .jpg" in error(
        path=tmp_path / "none"
    )
    (root / "train/zebra").mkdir()
    assert f"no images in the class folders zebra of {root}/train" in error()


def test_unknown_validation_classes_are_listed(make_set: MakeSet) -> None:
    root = make_set()
    for name in ("zebra", "ape"):
        save_noise(root / "val" / name / "x.jpg")
    with pytest.raises(ValueError, match=r"2 classes that the training split lacks: ape, zebra;"):
        ImageSet(config(root), "val")
    for i in range(20):
        (root / f"val/z{i:02d}").mkdir()
    with pytest.raises(ValueError, match=r"z08, \.\.\. \(22 in all\);"):
        ImageSet(config(root), "val")


def test_splits_are_not_taken_for_classes(make_set: MakeSet) -> None:
    with pytest.raises(
        ValueError, match=r'data\.train_split: got "\." but .* holds splits \(train'
    ):
        ImageSet(config(make_set(), train_split="."), "train")


def test_the_dataset_survives_pickling(make_set: MakeSet) -> None:
    dataset = ImageSet(config(make_set()), "train", seed=3)
    again = pickle.loads(pickle.dumps(dataset))
    key = SampleKey(1, 2, 0)
    first, second = dataset[key].image, again[key].image
    assert first is not None
    assert torch.equal(first, second)


# ---------------------------------------------------------------- unreadable images


@pytest.mark.parametrize("how", HOWS)
def test_training_takes_the_next_readable_image(
    make_set: MakeSet, spoil: Spoil, no_augment: AugmentConfig, how: str
) -> None:
    """It has its own target and the augmentation of the requested key; the list wraps around."""
    root = make_set()
    for augment in (no_augment, AugmentConfig()):
        dataset = ImageSet(config(root, on_bad_image="skip", augment=augment), "train")
        expected = dataset[SampleKey(0, 0, 0)]
        assert not expected.bad
    for index in (10, 11):
        path = Path(dataset.name(index))
        if path.stat().st_size > 50:
            spoil(path, how)
    dataset = ImageSet(config(root, on_bad_image="skip", augment=no_augment), "train")
    got = dataset[SampleKey(0, 10, 0)]
    assert got.target == 0
    assert torch.equal(got.image, dataset[SampleKey(0, 0, 0)].image)  # type: ignore[arg-type]
    assert [error.path for error in got.bad] == [dataset.name(10), dataset.name(11)]
    augmented = ImageSet(config(root, on_bad_image="skip"), "train")
    one, two = (augmented[SampleKey(0, index, 0)].image for index in (10, 0))
    assert not torch.equal(one, two)  # type: ignore[arg-type]
    assert torch.equal(one, augmented[SampleKey(0, 10, 0)].image)  # type: ignore[arg-type]


def test_errors_under_error(make_set: MakeSet, spoil: Spoil) -> None:
    dataset = ImageSet(config(make_set()), "train")
    spoil(Path(dataset.name(3)), "empty")
    with pytest.raises(BadImageError, match="the file is empty"):
        dataset[SampleKey(0, 3, 0)]
    got = dataset.__getitems__([SampleKey(0, 2, 0), SampleKey(0, 3, 0)])
    assert isinstance(got, BadImageError)
    assert got.path == dataset.name(3)


def test_sixteen_unreadable_images_in_a_row_are_an_error(make_set: MakeSet, spoil: Spoil) -> None:
    root = make_set(train=20, val=20, classes=1)
    skip = config(root, on_bad_image="skip")
    train, val = ImageSet(skip, "train"), ImageSet(skip, "val")
    for index in range(MAX_TRIES):
        spoil(Path(train.name(index)), "text")
        spoil(Path(val.name(index)), "text")
    assert len(train[SampleKey(0, 1, 0)].bad) == MAX_TRIES - 1
    with pytest.raises(BadImageError, match=r"the 15 images after it") as raised:
        train[SampleKey(0, 0, 0)]
    assert raised.value.path == train.name(0)
    dropped = val[SampleKey(0, 0, 0)]
    assert dropped.image is None
    assert [error.path for error in dropped.bad] == [val.name(0)]


def test_a_set_of_unreadable_images_ends(make_set: MakeSet, spoil: Spoil) -> None:
    dataset = ImageSet(config(make_set(train=3), on_bad_image="skip"), "train")
    for index in range(3):
        spoil(Path(dataset.name(index)), "empty")
    with pytest.raises(BadImageError, match=r"the 2 images after it"):
        dataset[SampleKey(0, 1, 0)]


@pytest.mark.parametrize("split", ["train", "val"])
def test_skip_does_not_hide_a_failing_transform(make_set: MakeSet, split: Any) -> None:
    dataset = ImageSet(replace(config(make_set()), on_bad_image="skip"), split, seed=4)

    def fails(image: Image.Image) -> torch.Tensor:
        raise ZeroDivisionError("no such luck")

    dataset.transform = fails
    with pytest.raises(
        RuntimeError, match=r"transform failed on .*/.*jpg \(seed 4, .*no such luck"
    ):
        dataset[SampleKey(0, 1, 0)]
