"""Image sets: reading, folder layout, and unreadable files."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import os
import pickle
import shutil
import stat
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from featkd.data import AugmentConfig, BadImageError, DataConfig, ImageSet, SampleKey, read_image
from featkd.data.imageset import MAX_TRIES
from tests.data.conftest import MakeSet, save_noise
from tests.data.loading import loading

Spoil = Callable[[Path, str], None]
HOWS = {
    "truncated": "OSError: image file is truncated",
    "empty": "the file is empty",
    "text": r"no image of a supported format \(26 bytes; supported: BMP, ",
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


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_fixed_range_are_refused(tmp_path: Path, dtype: type) -> None:
    """A float TIFF in 0..1 would come out black."""
    path = tmp_path / "x.tif"
    Image.fromarray(np.ones((4, 4), dtype)).save(path)
    with pytest.raises(BadImageError, match=r"x\.tif: .* pixels, whose black and white are not"):
        read_image(str(path))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("workers", [0, 1])
def test_postscript_starts_no_program(
    make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Pillow would start the first `gs` of the path, for any file that begins as PostScript."""
    started = tmp_path / "started"
    program = tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked up in the path again
    with Image.open(io.BytesIO(POSTSCRIPT)) as image, contextlib.suppress(OSError):
        image.load()
    assert started.exists()  # the trap works
    started.unlink()
    root = make_set(train=4, val=4, classes=1)
    for split in ("train", "val"):
        (root / split / "class0/zz.jpg").write_bytes(POSTSCRIPT)
        with loading(root, split, 5, workers=workers, on_bad_image="skip") as loader:
            list(loader)
        (cause,) = loader.bad_images.values()
        assert cause.startswith("no image of a supported format")
    assert not started.exists()


SPECIAL_FILES: dict[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "OSError: .*No such device or address": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "a device or another special file": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("cause", SPECIAL_FILES)
def test_a_special_file_among_the_images_is_named(
    make_set: MakeSet, split: Any, cause: str
) -> None:
    root = make_set(train=4, val=4, classes=1)
    SPECIAL_FILES[cause](root / split / "class0/a.jpg")
    with (
        loading(root, split, 5) as loader,
        pytest.raises(BadImageError, match=rf"class0/a\.jpg: {cause}"),
    ):
        list(loader)
    assert loader.dataset.fingerprint()


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


def test_validation_on_the_training_images_is_said(make_set: MakeSet) -> None:
    root = make_set() / "train"
    with pytest.warns(UserWarning, match=r"data\.val_split: .* is the folder of the training imag"):
        dataset = ImageSet(config(root, train_split=".", val_split="."), "val")
    assert dataset.classes == ["class0", "class1", "class2"]
    assert len(dataset) == 12


def test_shared_images_of_two_splits_are_said(make_set: MakeSet) -> None:
    root = make_set(train=12, val=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ImageSet(config(root), "val")) == 6  # same names, other images
    copied, linked = root / "val/class0/003.jpg", root / "val/class0/002.jpg"
    copied.write_bytes((root / "train/class0/003.jpg").read_bytes())
    linked.symlink_to("../../train/class0/002.jpg")
    with pytest.warns(UserWarning, match=r"2 of 8 compared files .*\(class0/002.jpg, class0/003"):
        ImageSet(config(root), "val")
    (root / "train/nested/class0").mkdir(parents=True)
    save_noise(root / "train/nested/class0/x.jpg")
    with pytest.warns(UserWarning, match=r"train/nested lies below the training images, as a cla"):
        ImageSet(config(root, val_split="train/nested"), "val")


def test_held_out_images_stay_when_others_are_added(make_set: MakeSet) -> None:
    root = make_set(train=60, classes=2)
    held = config(root, val_split=None, val_fraction=0.3)

    def names(split: Any) -> set[str]:
        dataset = ImageSet(held, split)
        assert dataset.classes == ["class0", "class1"]
        return {dataset.name(index) for index in range(len(dataset))}

    train, val = names("train"), names("val")
    assert not train & val
    assert len(train | val) == 60
    assert 8 <= len(val) <= 28  # 18 +- 10: binomial, p = 0.005
    for number in range(40):
        save_noise(root / f"train/class{number % 2}/more{number}.jpg")
    assert train < names("train")
    assert val < names("val")
    for fraction, split, advice in ((1e-9, "val", "larger"), (1 - 1e-9, "train", "smaller")):
        nearly = config(root, val_split=None, val_fraction=fraction)
        with pytest.raises(ValueError, match=rf"data\.val_fraction: .* use a {advice} fraction"):
            ImageSet(nearly, split)


def test_links_do_not_multiply_images(make_set: MakeSet, tmp_path: Path) -> None:
    root = make_set(train=12, val=3)
    plain = ImageSet(config(root), "train")
    expected = [plain.name(index) for index in range(len(plain))]
    fingerprint = plain.fingerprint()
    (root / "train/class0/loop").symlink_to(".")
    (root / "train/class0/up").symlink_to("..")
    (root / "train/class0/self").symlink_to("self")
    (root / "train/class1/root").symlink_to(root)
    with pytest.warns(UserWarning, match="3 links to folders .* are not followed: .*class0/loop"):
        again = ImageSet(config(root), "train")
    assert [again.name(index) for index in range(len(again))] == expected
    assert again.fingerprint() == fingerprint
    # links to other folders are followed, once
    save_noise(tmp_path / "more/deep/x.jpg")
    (root / "train/class2/a").symlink_to(tmp_path / "more")
    (root / "train/class2/b").symlink_to(tmp_path / "more/deep")
    (tmp_path / "more/deep/back").symlink_to(root / "train/class2")
    with pytest.warns(UserWarning, match="5 links"):
        more = ImageSet(config(root), "train")
    names = [more.name(index) for index in range(len(more))]
    assert set(names) - set(expected) == {f"{root}/train/class2/a/deep/x.jpg"}
    (root / "train/zz").symlink_to(".")
    with (
        pytest.warns(UserWarning, match="6 links"),
        pytest.raises(FileNotFoundError, match="no images in the class folders zz"),
    ):
        ImageSet(config(root), "train")


def test_the_order_is_that_of_torchvision(make_set: MakeSet) -> None:
    """Sample keys number the images, so another order would change runs and caches."""
    root = make_set()
    for name in ("b/x", "a/x", "a-/x", "a/b/x", "a b/y", "B/x", "a/b-c/x", "z", "0"):
        save_noise(root / f"train/class1/{name}.jpg")
    dataset = ImageSet(config(root), "train")
    names = [dataset.name(index) for index in range(len(dataset))]
    assert names == [path for path, _ in ImageFolder(str(root / "train")).samples]


def test_hidden_files_and_folders_are_skipped(make_set: MakeSet) -> None:
    root = make_set(train=6, val=3)
    for split, name in itertools.product(("train", "val"), (".y.jpg", ".d/y.jpg", "d/.e/y.jpg")):
        save_noise(root / split / "class0" / name)
    save_noise(root / "train/.hidden/y.jpg")
    assert len(ImageSet(config(root), "train")) == 6
    assert len(ImageSet(config(root), "val")) == 3


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
    with pytest.raises(FileNotFoundError, match=expected):
        ImageSet(config(root), "val")
    shutil.rmtree(root / "train")
    (root / "val").rename(root / "train")
    with pytest.raises(FileNotFoundError, match=expected.replace("val", "train")):
        ImageSet(config(root), "train")


def test_a_leftover_tar_file_beside_class_folders(make_set: MakeSet) -> None:
    root = make_set()
    (root / "train/a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found tar files \(a.tar\) beside folders \(class0, "):
        ImageSet(config(root), "train")


def test_names_that_are_not_utf8(make_set: MakeSet) -> None:
    root = make_set(train=6, val=3)
    name = os.fsencode(root) + b"/train/caf\xe9"
    os.rename(root / "train/class0", name)
    os.rename(root / "val/class0", os.fsencode(root) + b"/val/caf\xe9")
    train = ImageSet(config(root), "train")
    assert train.classes[0] == "caf\udce9"
    assert len(train.fingerprint()) == 64
    with open(name + b"/000.jpg", "wb"), pytest.raises(BadImageError) as raised:
        train[SampleKey(0, 0, 0)]
    assert r"train/caf\xe9/000.jpg: the file is empty" in str(raised.value)
    held = ImageSet(config(root, val_split=None, val_fraction=0.5), "val")
    assert 0 < len(held) < 6


def test_escape_sequences_in_names_are_escaped_in_messages(make_set: MakeSet) -> None:
    root = make_set(train=4, val=4)
    for split in ("train", "val"):
        os.rename(root / split / "class0", root / split / "\x1b]0;owned\x07")
    for path in (root / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    dataset = ImageSet(config(root), "train")
    messages = []
    with pytest.raises(BadImageError) as bad:
        dataset[SampleKey(0, 0, 0)]
    messages.append(str(bad.value))
    os.rename(root / "train/\x1b]0;owned\x07", root / "train/other")
    with pytest.raises(ValueError, match="classes that the training split lacks") as unknown:
        ImageSet(config(root), "val")
    messages.append(str(unknown.value))
    for message in messages:
        assert message.isprintable()
        assert r"\x1b]0;owned\x07" in message


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
    with pytest.raises(ValueError, match=r"2 classes that the training split lacks: ape, zebra;"):
        ImageSet(config(root), "val")
    for i in range(20):
        (root / f"val/z{i:02d}").mkdir()
    with pytest.raises(ValueError, match=r"z07, z08, and 12 more;"):
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
def test_skip_does_not_hide_a_failing_transform(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch, split: Any
) -> None:
    dataset = ImageSet(replace(config(make_set()), on_bad_image="skip"), split, seed=4)

    def fails(*_: Any) -> torch.Tensor:
        raise ZeroDivisionError("no such luck")

    monkeypatch.setattr(dataset, "_train_transform" if split == "train" else "_transform", fails)
    with pytest.raises(
        RuntimeError, match=r"transform failed on .*/.*jpg \(seed 4, .*no such luck"
    ):
        dataset[SampleKey(0, 1, 0)]
