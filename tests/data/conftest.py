"""Fixtures: small image sets on disk, and the loaders to test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featkd.data import AugmentConfig
from tests.data.loading import DALI, DEFAULTS, STRONG

MakeSet = Callable[..., Path]


def save_noise(path: Path, size: tuple[int, int] = (24, 20), seed: int = 0) -> None:
    """A smooth random picture; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    """make_set(train=12, val=5, classes=3) writes a set of that size and returns its root."""

    def make(train: int = 12, val: int = 5, classes: int = 3) -> Path:
        for number in range(train + val):
            split, i = ("train", number) if number < train else ("val", number - train)
            name = f"{split}/class{i * classes // (train if split == 'train' else val)}/{i:03d}.jpg"
            save_noise(tmp_path / "set" / name, seed=number)
        return tmp_path / "set"

    return make


@pytest.fixture
def no_augment() -> AugmentConfig:
    """Augmentation without randomness."""
    return AugmentConfig(
        rand_augment=None, scale=(1, 1), ratio=(1, 1), hflip=0, random_erasing=0, repeats=1
    )


def spoil(path: Path, how: str) -> None:
    """Makes an image unreadable; the last four kinds keep the start and end of a JPEG."""
    content = path.read_bytes()
    if how == "dangling":
        path.unlink()
        path.symlink_to("nowhere.jpg")
        return
    tables, middle = content.find(b"\xff\xdb") + 4, content.find(b"\xff\xda") + 60
    assert how != "hole" or len(content) > middle + 30
    spoilt = {
        "truncated": content[:-40],
        "empty": b"",
        "text": b"<html>404 not found</html>",
        "no tables": without_segment(content, 0xDB),
        # present, but not those that the frame refers to
        "other tables": content[:tables] + b"\3" + content[tables + 1 :],
        "no scan": without_segment(content, 0xDA),
        "hole": content[:middle] + b"\xff" * 20 + b"\2" + content[middle + 21 :],
    }
    path.write_bytes(spoilt[how])


def without_segment(jpeg: bytes, code: int) -> bytes:
    """Removes the segments with the marker `code`, with the data of a scan."""
    marker = bytes([0xFF, code])
    while (at := jpeg.find(marker)) >= 0:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        jpeg = jpeg[:at] + jpeg[end if code != 0xDA else -2 :]
    return jpeg


@pytest.fixture(params=["timm", DALI])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with each loader."""
    if request.param == "dali":
        monkeypatch.setitem(DEFAULTS, "augment", replace(STRONG, rand_augment=None))
    monkeypatch.setitem(DEFAULTS, "backend", request.param)
    return str(request.param)
