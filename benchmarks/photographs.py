"""Images that the benchmarks of loaders and training read."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from featkd.data import DataConfig
from featkd.data.folder import FolderSource

MADE = 64  # most images to generate
_MADE_SIZE = (500, 375)  # width and height of a typical photograph of ImageNet
_MADE_QUALITY = 90


@dataclass(frozen=True)
class Photographs:
    """An image set, the paths of its training images, and a description."""

    data: DataConfig
    paths: list[str]
    about: str


@contextmanager
def photographs(folder: str | None, data: DataConfig, wanted: int) -> Iterator[Photographs]:
    """Links the photographs of a folder, or generated images, into an image set of `wanted` images.

    Each is linked as often as it takes, so that an epoch is long enough to time, and every loader
    opens and decodes each link.

    Args:
        folder: folder of class folders, or with a folder `train` of them; None generates images.
        data: configuration to use, except for its folders.
        wanted: least number of images per epoch.

    Raises:
        FileNotFoundError: the folder is missing or has no images.
    """
    with tempfile.TemporaryDirectory(prefix="featkd-bench-") as temporary:
        root = Path(temporary)
        if folder is None:
            made = min(wanted, MADE)
            source = _made(root / "made", made)
            width, height = _MADE_SIZE
            about = f"{made} generated JPEGs of {width} x {height}, no photographs (see --data)"
        else:
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"--data: no folder {folder}")
            source = Path(folder) / "train" if (Path(folder) / "train").is_dir() else Path(folder)
            about = f"the images of {source}"
        flat = replace(data, path=str(source), train_split=".", val_split=".")
        images = FolderSource(flat, "train")
        found = [images.name(index) for index in range(len(images))]
        paths = found[:: max(1, len(found) // wanted)]  # every class of a large set
        times = -(-wanted // len(paths))
        repeated = root / "repeated"
        for number in range(times):
            for index, path in enumerate(paths):
                link = repeated / Path(path).parent.name / f"{number}-{index}{Path(path).suffix}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(Path(path).resolve())
        about += f" ({len(paths)}, {times} times each)"
        with warnings.catch_warnings():
            # the validation images are the training images, and nothing is evaluated
            warnings.filterwarnings("ignore", message="data.val_split: ")
            yield Photographs(replace(flat, path=str(repeated)), paths, about)


def _made(folder: Path, count: int) -> Path:
    """Generates smooth shapes with noise, as JPEGs of about the bytes of a photograph."""
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
