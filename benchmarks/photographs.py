"""The images that the loaders' and the training's benchmarks read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder

from featkd.data import DataConfig

MADE = 64  # images that are made at most where there are none
_MADE_SIZE = (500, 375)  # width and height of a typical photograph of ImageNet
_MADE_QUALITY = 90


@dataclass(frozen=True)
class Photographs:
    """An image set, the paths of its training images, and what to say of it."""

    data: DataConfig
    paths: list[str]
    about: str


@contextmanager
def photographs(folder: str | None, data: DataConfig, wanted: int) -> Iterator[Photographs]:
    """Photographs of a folder, or made ones, repeated until there are `wanted` of them.

    They are repeated as links in a folder of their own, so that an epoch is long enough to time and
    every loader opens and decodes each of them anew.

    Args:
        folder: class folders, or a folder `train` of class folders; None makes images.
        data: everything but the folders.
        wanted: images of an epoch, at least.

    Raises:
        FileNotFoundError: the folder is missing or holds no images.
    """
    with tempfile.TemporaryDirectory(prefix="featkd-bench-") as temporary:
        root = Path(temporary)
        if folder is None:
            made = min(wanted, MADE)
            source = _made(root / "made", made)
            width, height = _MADE_SIZE
            about = f"{made} made JPEGs of {width} x {height} (no --data), which are no photographs"
        else:
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"--data: no folder {folder}")
            source = Path(folder) / "train" if (Path(folder) / "train").is_dir() else Path(folder)
            about = f"the images of {source}"
        flat = replace(data, path=str(source), train_split=".", val_split=".")
        found = [path for path, _ in ImageFolder(source).imgs]
        paths = found[:: max(1, len(found) // wanted)]  # of a large set, some of every class
        times = -(-wanted // len(paths))
        repeated = root / "repeated"
        for number in range(times):
            for index, path in enumerate(paths):
                link = repeated / Path(path).parent.name / f"{number}-{index}{Path(path).suffix}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(Path(path).resolve())
        about += f" ({len(paths)}, {times} times each)"
        yield Photographs(replace(flat, path=str(repeated)), paths, about)


def _made(folder: Path, count: int) -> Path:
    """Smooth shapes with some noise: as JPEG about as many bytes as a photograph of that size."""
    rng = np.random.default_rng(0)
    width, height = _MADE_SIZE
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + rng.normal(0, 16, (height, width, 1))
        place = folder / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(place / f"{number}.jpg", quality=_MADE_QUALITY)
    return folder
