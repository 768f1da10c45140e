"""Images in class folders, `<path>/<split>/<class>/*.jpg`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from featkd.data.config import DataConfig
from featkd.data.images import read_file
from featkd.data.names import PackedNames

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}


def split_folder(config: DataConfig, split: Literal["train", "val"]) -> str:
    """Returns the folder of a split.

    Raises:
        FileNotFoundError: the folder is missing; the message lists the folders that exist.
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
            'for such a flat set use data.train_split="." and data.val_split="."'
        )
    else:
        hint = f"folders there: {_listed(there) or 'none'}; set data.{split}_split to one of them"
        if split == "train":
            hint += " (it also defines the classes, so evaluation alone needs it too)"
    raise FileNotFoundError(f"data.{split}_split: no folder {folder}; {expected}; {hint}")


def _class_folders(folder: str) -> list[str]:
    """Returns the sorted names of the folders in `folder`, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _listed(names: Sequence[str], most: int = 10) -> str:
    """Joins the names; lists at most `most` of them."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def find_classes(config: DataConfig) -> list[str]:
    """Returns the names of the training split's class folders, sorted; class i is the i-th.

    torchvision sorts in the same way, and the published models were trained in this order.

    Raises:
        FileNotFoundError: the split or its class folders are missing.
        ValueError: train_split is "." and path holds split folders instead of class folders.
    """
    folder = split_folder(config, "train")
    classes = _class_folders(folder)
    if not classes:
        raise FileNotFoundError(
            f"no class folders in {folder}; expected one folder of images per class, or WebDataset "
            "tar files"
        )
    if os.path.normpath(config.train_split) == "." and set(classes) <= _SPLIT_NAMES:
        raise ValueError(
            f'data.train_split: got "." but {folder} holds splits ({_listed(classes)}), '
            "not classes; set data.train_split and data.val_split to their names"
        )
    return classes


class FolderSource:
    """`ImageSource` for class folders.

    Args:
        config: the image set.
        split: "train" or "val".

    Raises:
        FileNotFoundError: a folder is missing or holds no images.
        ValueError: the validation split has classes that the training split lacks.
    """

    def __init__(self, config: DataConfig, split: Literal["train", "val"]) -> None:
        self.classes = find_classes(config)
        self.folder = split_folder(config, split)
        names, targets = self._find_images(training=split == "train")
        self._names = PackedNames(names)
        self._targets = np.array(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._targets)

    def name(self, index: int) -> str:
        """See `ImageSource`."""
        return os.path.join(self.folder, self._names[index])

    def file_size(self, index: int) -> int:
        """See `ImageSource`."""
        try:
            return os.path.getsize(self.name(index))
        except OSError:
            return -1

    def read(self, index: int) -> tuple[bytes, int]:
        """See `ImageSource`."""
        return read_file(self.name(index)), int(self._targets[index])

    def _find_images(self, *, training: bool) -> tuple[list[str], list[int]]:
        """Returns the files, relative to the split folder and sorted, and their class indices."""
        unknown = sorted(set(_class_folders(self.folder)) - set(self.classes))
        if unknown:
            raise ValueError(
                f"{self.folder} has {len(unknown)} classes that the training split lacks: "
                f"{_listed(unknown)}; every class needs a folder in the training split"
            )
        index = {name: number for number, name in enumerate(self.classes)}
        found = make_dataset(self.folder, index, IMG_EXTENSIONS, allow_empty=True)
        counts = np.bincount([target for _, target in found], minlength=len(index))
        empty = [name for name, count in zip(self.classes, counts, strict=True) if count == 0]
        if not found or (training and empty):
            where = f"the class folders {_listed(empty)} of " if found else ""
            raise FileNotFoundError(
                f"no images in {where}{self.folder}; expected files ending in "
                f"{', '.join(IMG_EXTENSIONS)}"
            )
        return (
            [os.path.relpath(path, self.folder) for path, _ in found],
            [target for _, target in found],
        )
