"""Images in class folders, `<path>/<split>/<class>/*.jpg`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from featkd.data.config import DataConfig
from featkd.data.images import read_file
from featkd.data.source import ImageSource, in_split
from featkd.data.walk import find_files, is_visible, subfolders, warn_of_repeated_links
from featkd.runtime.names import listed, printable

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}
_ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_LAYOUT = "<path>/<split>/<class>/*.jpg"
_UNLABELLED_LAYOUT = "<path>/<split>/**/*.jpg (data.labels is none)"
_HOLD_OUT = "data.val_split=null and data.val_fraction=0.1 (a tenth of the images validates)"


def layout(config: DataConfig) -> str:
    """Describes the expected files of an image set, for error messages."""
    return _LAYOUT if config.labels == "folders" else _UNLABELLED_LAYOUT


def split_folder(config: DataConfig, split: Literal["train", "val"]) -> str:
    """Returns the folder of a split; with val_split=None both splits share that of training.

    Raises:
        FileNotFoundError: the folder is missing; the message lists the folders that exist.
    """
    expected = f"expected {layout(config)}"
    if not config.path:
        raise FileNotFoundError(f"data.path: not set; give it by --data DIR; {expected}")
    if not os.path.isdir(config.path):
        raise FileNotFoundError(f"data.path: no folder {printable(config.path)}; {expected}")
    if split == "val" and config.val_split is None:
        split = "train"
    name = config.train_split if split == "train" else config.val_split
    assert name is not None
    folder = os.path.normpath(os.path.join(config.path, name))
    if os.path.isdir(folder):
        return folder
    there = subfolders(config.path)
    if config.labels == "none" and split == "train":
        hint = (
            f"folders there: {listed(there) or 'none'}; set data.train_split to one of them, or "
            f'for all images below {printable(config.path)} use data.train_split="." with '
            f"{_HOLD_OUT}"
        )
    elif any(images_in(os.path.join(config.path, first)) for first in there[:1]):
        hint = (
            f"{printable(config.path)} seems to hold the class folders itself ({listed(there)}); "
            f'for such a flat set use data.train_split="." with {_HOLD_OUT}'
        )
    else:
        hint = f"folders there: {listed(there) or 'none'}; set data.{split}_split to one of them"
        if split == "train":
            hint += " (it also defines the classes, so evaluation alone needs it too)"
        else:
            hint += f", or use {_HOLD_OUT}"
    raise FileNotFoundError(
        f"data.{split}_split: no folder {printable(folder)}; {expected}; {hint}"
    )


def images_in(folder: str) -> list[str]:
    """Returns the sorted names of the images directly in a folder."""
    return sorted(name for name in os.listdir(folder) if is_visible(name, IMG_EXTENSIONS))


def describe_files(folder: str) -> str:
    """Describes images and archives that lie in a split folder without class folders."""
    if images := images_in(folder):
        return (
            f"; found {len(images)} image file(s) directly in it ({listed(images, 3)}), which "
            "belong in one folder per class"
        )
    if archives := sorted(x for x in os.listdir(folder) if x.lower().endswith(_ARCHIVES)):
        return f"; found {listed(archives, 3)}, but shards must be uncompressed tar files, *.tar"
    return ""


def no_images(config: DataConfig, folder: str, where: str = "") -> FileNotFoundError:
    """Creates the error for a split folder, or the part `where` of it, without images."""
    found = "" if where else describe_files(folder)
    expected = _LAYOUT if config.labels == "folders" else "images in it or in folders below it"
    return FileNotFoundError(
        f"no images in {where}{printable(folder)}{found}; expected {expected}, with files "
        f"ending in {', '.join(IMG_EXTENSIONS)}"
    )


def find_classes(config: DataConfig) -> list[str]:
    """Returns the names of the training split's class folders, sorted; class i is the i-th.

    torchvision sorts in the same way, and the published models were trained in this order.

    Raises:
        FileNotFoundError: the split or its class folders are missing.
        ValueError: train_split is "." and path holds split folders instead of class folders.
    """
    folder = split_folder(config, "train")
    classes = subfolders(folder)
    if not classes:
        raise FileNotFoundError(
            f"no class folders in {printable(folder)}{describe_files(folder)}; expected "
            f"{_LAYOUT}, or WebDataset tar files"
        )
    if os.path.normpath(config.train_split) == "." and set(classes) <= _SPLIT_NAMES:
        raise ValueError(
            f'data.train_split: got "." but {printable(folder)} holds splits ({listed(classes)}), '
            "not classes; set data.train_split and data.val_split to their names (featkd evaluate: "
            "--train-split and --val-split)"
        )
    return classes


class ImageFiles(ImageSource):
    """`ImageSource` for files below a folder.

    Args:
        folder: the folder.
        classes: class names.
        names: names of the files, relative to the folder.
        targets: their class indices.
    """

    def __init__(
        self, folder: str, classes: list[str], names: Sequence[str], targets: Sequence[int]
    ) -> None:
        super().__init__(folder, classes, names)
        self._targets = np.array(targets, dtype=np.int64)

    def file_size(self, index: int) -> int:
        """See `ImageSource`."""
        try:
            return os.path.getsize(self.name(index))
        except OSError:
            return -1

    def read(self, index: int) -> tuple[bytes, int]:
        """See `ImageSource`."""
        return read_file(self.name(index)), int(self._targets[index])


class FolderSource(ImageFiles):
    """`ImageSource` for class folders.

    Args:
        config: the image set.
        split: "train" or "val".

    Raises:
        FileNotFoundError: a folder is missing or holds no images.
        ValueError: the validation split has classes that the training split lacks, or
            data.val_fraction leaves a split or a class without images.
    """

    def __init__(self, config: DataConfig, split: Literal["train", "val"]) -> None:
        classes, folder = find_classes(config), split_folder(config, split)
        if unknown := sorted(set(subfolders(folder)) - set(classes)):
            raise ValueError(
                f"{printable(folder)} has {len(unknown)} classes that the training split "
                f"lacks: {listed(unknown)}; every class needs a folder in the training split"
            )
        names: list[str] = []
        targets: list[int] = []
        links: list[str] = []
        for target, name in enumerate(classes):
            if os.path.isdir(place := os.path.join(folder, name)):
                paths, repeated = find_files(place, IMG_EXTENSIONS, folder)
                names += [os.path.relpath(path, folder) for path in paths]
                targets += [target] * len(paths)
                links += repeated
        warn_of_repeated_links(links)
        if not names:
            raise no_images(config, folder)
        if split == "train" and (empty := _missing_classes(classes, targets)):
            raise no_images(config, folder, f"the class folders {listed(empty)} of ")
        kept = in_split(names, config, split, folder)
        names, targets = [names[i] for i in kept], [targets[i] for i in kept]
        if split == "train" and (empty := _missing_classes(classes, targets)):
            raise ValueError(
                f"data.val_fraction: {config.held_out:g} leaves no training images of the classes "
                f"{listed(empty)} of {printable(folder)}; use a smaller fraction, or folders for "
                "both splits"
            )
        if split == "val" and (empty := _missing_classes(classes, targets)):
            warnings.warn(
                f"no validation images of the classes {listed(empty)} in {printable(folder)}: "
                "accuracies say nothing about them",
                stacklevel=2,
            )
        super().__init__(folder, classes, names, targets)


def _missing_classes(classes: list[str], targets: list[int]) -> list[str]:
    present = set(targets)
    return [name for target, name in enumerate(classes) if target not in present]
