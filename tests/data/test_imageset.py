"""Image sets: reading, and unreadable files."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickle
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featkd.data import AugmentConfig, BadImageError, ImageSet, SampleKey, read_image
from featkd.data.imageset import MAX_TRIES
from tests.data.conftest import MakeSet, save_noise, spoil
from tests.data.loading import config, image_set, loading

HOWS = {
    "truncated": "OSError: image file is truncated",
    "empty": "the file is empty",
    "text": r"no image of a supported format \(26 bytes; supported: BMP, ",
    "dangling": "FileNotFoundError",
}


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
    message = rf"class0/a\.jpg: {cause}"
    with loading(root, split, 5) as loader, pytest.raises(BadImageError, match=message):
        list(loader)
    assert loader.dataset.fingerprint()


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", (12, 10)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(str(tmp_path / "x.jpg")).size == (12, 10)


@pytest.mark.parametrize("how", [None, *HOWS])
def test_bad_images_name_file_and_cause_and_files_are_closed(tmp_path, how) -> None:
    path = tmp_path / "x.jpg"
    save_noise(path)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        if how is None:
            read_image(str(path))
        else:
            spoil(path, how)
            message = rf"cannot read image {path}: .*{HOWS[how]}"
            with pytest.raises(BadImageError, match=message) as raised:
                read_image(str(path))
            again = pickle.loads(pickle.dumps(raised.value))
            assert type(again) is BadImageError
            assert (again.path, again.cause) == (str(path), raised.value.cause)
            assert str(again) == str(raised.value)
            del raised
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("how", HOWS)
def test_training_takes_the_next_readable_image(
    make_set: MakeSet, no_augment: AugmentConfig, how: str
) -> None:
    """It has its own target and the augmentation of the requested key; the list wraps around."""
    root = make_set()
    dataset = image_set(root, on_bad_image="skip", augment=no_augment)
    expected = dataset[SampleKey(0, 0, 0)]
    assert not expected.bad
    for index in (10, 11):
        path = Path(dataset.name(index))
        if path.stat().st_size > 50:
            spoil(path, how)
    got = dataset[SampleKey(0, 10, 0)]
    assert got.target == 0
    assert torch.equal(got.image, expected.image)
    assert [error.path for error in got.bad] == [dataset.name(10), dataset.name(11)]
    augmented = image_set(root, on_bad_image="skip")
    one, two = (augmented[SampleKey(0, index, 0)].image for index in (10, 0))
    assert not torch.equal(one, two)
    assert torch.equal(one, augmented[SampleKey(0, 10, 0)].image)


@pytest.mark.parametrize("count", [20, 3])
def test_sixteen_or_all_unreadable_images_are_an_error(make_set: MakeSet, count: int) -> None:
    root, bad = make_set(train=count, val=count, classes=1), min(count, MAX_TRIES)
    train, val = (image_set(root, split, on_bad_image="skip") for split in ("train", "val"))
    for index in range(bad):
        spoil(Path(train.name(index)), "text")
        spoil(Path(val.name(index)), "text")
    if bad < count:
        assert len(train[SampleKey(0, 1, 0)].bad) == bad - 1
    with pytest.raises(BadImageError, match=f"the {bad - 1} images after it") as raised:
        train[SampleKey(0, 0, 0)]
    assert raised.value.path == train.name(0)
    dropped = val[SampleKey(0, 0, 0)]
    assert dropped.image is None
    assert [error.path for error in dropped.bad] == [val.name(0)]


@pytest.mark.parametrize("split", ["train", "val"])
def test_skip_does_not_hide_a_failing_transform(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch, split: Any
) -> None:
    dataset = ImageSet(config(make_set(), on_bad_image="skip"), split, seed=4)

    def fails(*_: Any) -> torch.Tensor:
        raise ZeroDivisionError("no such luck")

    monkeypatch.setattr(dataset, "_train_transform" if split == "train" else "_transform", fails)
    with pytest.raises(RuntimeError, match=r"transform failed on .*jpg \(seed 4, .*such luck"):
        dataset[SampleKey(0, 1, 0)]
