"""Images in class folders: finding them, reading them, and what happens to unreadable ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from featkd.data.augment import build_transform, seeded
from featkd.data.config import DataConfig
from featkd.data.sampler import Key

# Images tried for one training sample before giving up: a run of this many unreadable
# neighbours is a broken disk or mount, not a few broken files.
MAX_TRIES = 16

Read = TypeVar("Read")

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}


class BadImageError(RuntimeError):
    """An image file cannot be read.

    Attributes:
        path: the file.
        cause: what is wrong with it, in words.
    """

    def __init__(self, path: str, cause: str) -> None:
        # Both go into `args`, from which pickle rebuilds the exception in another process.
        super().__init__(path, cause)
        self.path = path
        self.cause = cause

    def __str__(self) -> str:
        return f"cannot read image {self.path}: {self.cause}"


class Sample(NamedTuple):
    """One image (3, H, W) float32, or None where it was dropped; the bad files met on the way."""

    image: Tensor | None
    target: int
    bad: list[BadImageError]


def read_image(path: str) -> Image.Image:
    """Read a file as an RGB image (EXIF orientation ignored, as timm does), and close the file.

    Raises:
        BadImageError: it cannot be opened, is no image, or is cut off.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            if image.mode.startswith("I"):
                # 16-bit grey. Pillow's convert would clip everything above 255 to white.
                grey = np.clip(np.asarray(image), 0, 65535) // 256
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except UnidentifiedImageError as error:
        size = os.path.getsize(path)
        cause = "the file is empty" if size == 0 else f"not a known image format ({size} bytes)"
        raise BadImageError(path, cause) from error
    # Pillow's decoders raise SyntaxError, struct.error, zlib.error, IndexError and more.
    except Exception as error:
        raise BadImageError(path, f"{type(error).__name__}: {error}") from error


def _split_folder(config: DataConfig, split: Literal["train", "val"]) -> str:
    """The folder of a split.

    Raises:
        FileNotFoundError: it isn't there; the message says what is.
    """
    expected = "expected <path>/<split>/<class>/*.jpg"
    if not config.path:
        raise FileNotFoundError(f"data.path: not set; {expected}")
    if not os.path.isdir(config.path):
        raise FileNotFoundError(f"data.path: no folder {config.path}; {expected}")
    name = config.train_split if split == "train" else config.val_split
    folder = os.path.normpath(os.path.join(config.path, name))
    if os.path.isdir(folder):
        return folder
    there = _class_folders(config.path)
    holds_images = any(
        entry.name.lower().endswith(IMG_EXTENSIONS)
        for first in there[:1]
        for entry in os.scandir(os.path.join(config.path, first))
    )
    if holds_images:
        hint = (
            f"{config.path} seems to hold the class folders itself ({_listed(there)}); "
            'for such a flat set give data.train_split="." and data.val_split="."'
        )
    else:
        hint = f"folders there: {_listed(there) or 'none'}; set data.{split}_split to one of them"
        if split == "train":
            hint += " (it also defines the classes, so evaluation alone needs it too)"
    raise FileNotFoundError(f"data.{split}_split: no folder {folder}; {expected}; {hint}")


def _class_folders(folder: str) -> list[str]:
    """Names of the folders in `folder`, sorted, without hidden ones such as .ipynb_checkpoints."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _listed(names: Sequence[str], most: int = 10) -> str:
    """The names, cut after `most` of them."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def find_classes(config: DataConfig) -> list[str]:
    """The class folders of the training split, sorted as text: class i is the i-th.

    This is torchvision's order, with which the published models were trained.

    Raises:
        FileNotFoundError: the split or its class folders are missing.
        ValueError: with train_split ".", path holds split folders, not class folders.
    """
    folder = _split_folder(config, "train")
    classes = _class_folders(folder)
    if not classes:
        raise FileNotFoundError(
            f"no class folders in {folder}; expected one folder of images per class"
        )
    if os.path.normpath(config.train_split) == "." and set(classes) <= _SPLIT_NAMES:
        raise ValueError(
            f'data.train_split: got "." but {folder} holds splits ({_listed(classes)}), '
            "not classes; set data.train_split and data.val_split to their names"
        )
    return classes


class ImageFolder(Dataset[Sample]):
    """The images of one split, addressed by `Key`.

    Everything random in a sample derives from (seed, key): not from rank, worker, batch or
    restart. File names lie in one bytes object: a list of a million strings would be copied
    page by page into every worker as its reference counts are touched.

    Args:
        config: where the images are and how they are transformed.
        split: "train" or "val".
        seed: seed of the run.

    Attributes:
        classes: class names; targets index them.

    Raises:
        FileNotFoundError: a folder is missing or holds no images.
        ValueError: validation has classes that training has not.
    """

    def __init__(self, config: DataConfig, split: Literal["train", "val"], seed: int = 0) -> None:
        self.classes = find_classes(config)
        self.folder = _split_folder(config, split)
        self.training = split == "train"
        self.seed = seed
        self.skip = config.on_bad_image == "skip"
        self.transform = build_transform(config, training=self.training)
        names, targets = self._find_images()
        encoded = [os.fsencode(name) for name in names]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._targets = np.array(targets, dtype=np.int64)

    def _find_images(self) -> tuple[list[str], list[int]]:
        """Paths relative to the split's folder, by class and name, and their class indices."""
        odd = sorted(set(_class_folders(self.folder)) - set(self.classes))
        if odd:
            raise ValueError(
                f"{self.folder} has {len(odd)} classes that the training split has not: "
                f"{_listed(odd)}; every class needs a folder in the training split"
            )
        index = {name: number for number, name in enumerate(self.classes)}
        found = make_dataset(self.folder, index, IMG_EXTENSIONS, allow_empty=True)
        counts = np.bincount([target for _, target in found], minlength=len(index))
        empty = [name for name, count in zip(self.classes, counts, strict=True) if count == 0]
        if not found or (self.training and empty):
            where = f"the class folders {_listed(empty)} of " if found else ""
            raise FileNotFoundError(
                f"no images in {where}{self.folder}; expected files ending in "
                f"{', '.join(IMG_EXTENSIONS)}"
            )
        return (
            [os.path.relpath(path, self.folder) for path, _ in found],
            [target for _, target in found],
        )

    def __len__(self) -> int:
        return len(self._targets)

    def path(self, index: int) -> str:
        """The file of image `index`, 0 <= index < len(self)."""
        start = self._ends[index - 1] if index else 0
        return os.path.join(self.folder, os.fsdecode(self._names[start : self._ends[index]]))

    def target(self, index: int) -> int:
        """The class index of image `index`."""
        return int(self._targets[index])

    def __getitem__(self, key: Key) -> Sample:
        """Read and transform the image of a key.

        An unreadable image under "skip": training takes the next readable one of the list in
        its place, at most MAX_TRIES images in all, with the augmentation of the key asked for;
        evaluation gives a Sample without an image.

        Raises:
            BadImageError: unreadable under "error", or MAX_TRIES unreadable images in a row.
        """
        image, index, bad = self.readable(key, read_image)
        transformed = None if image is None else self._transformed(image, index, key)
        return Sample(transformed, self.target(index), bad)

    def readable(
        self, key: Key, read: Callable[[str], Read]
    ) -> tuple[Read | None, int, list[BadImageError]]:
        """What `read` makes of a key's file, or of the next readable one; see `__getitem__`.

        Returns:
            The result, or None where the image is left out; which image it is of; the errors of
            those before it.

        Raises:
            BadImageError: unreadable under "error", or MAX_TRIES unreadable images in a row.
        """
        bad: list[BadImageError] = []
        tries = min(MAX_TRIES, len(self)) if self.training and self.skip else 1
        for offset in range(tries):
            index = (key.image + offset) % len(self)
            try:
                return read(self.path(index)), index, bad
            except BadImageError as error:
                if not self.skip:
                    raise
                bad.append(error)
        if self.training:
            raise BadImageError(
                bad[0].path, f"{bad[0].cause} (and so are the {tries - 1} images after it)"
            )
        return None, key.image, bad

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample] | BadImageError:
        """The samples of a batch; torch's DataLoader calls this where it exists.

        A BadImageError is returned, not raised: DataLoader would hand on only the text of what a
        worker raises, and rebuild the exception from it without path and cause.
        """
        try:
            return [self[key] for key in keys]
        except BadImageError as error:
            return error

    def _transformed(self, image: Image.Image, index: int, key: Key) -> Tensor:
        try:
            if not self.training:
                return self.transform(image)
            with seeded(self.seed, key):
                return self.transform(image)
        except Exception as error:
            # Not a BadImageError: the file is fine, and "skip" must not hide a broken transform.
            raise RuntimeError(
                f"transform failed on {self.path(index)} (seed {self.seed}, {key}): {error}"
            ) from error
