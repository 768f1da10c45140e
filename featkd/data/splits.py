"""Check for validation images that are training images too."""

from __future__ import annotations

import os

from featkd.data.config import DataConfig
from featkd.data.folder import split_folder
from featkd.data.shards import TarSource, tar_files
from featkd.data.source import ImageSource
from featkd.data.walk import is_hidden
from featkd.runtime.files import open_regular
from featkd.runtime.names import listed, printable

_MAX_COMPARED = 1000  # files, evenly spaced in the list
_COMPARED_BYTES = 2**20


def shared_images_note(config: DataConfig, validation: ImageSource) -> str:
    """Describes validation images that are also trained on; "" if none are found.

    Compares up to 1000 validation files (or shards) with the training files of the same names.
    """
    if config.val_split is None:
        return ""
    train, val = split_folder(config, "train"), validation.folder
    found = _shared_images(config, validation, train, val)
    return found and (
        f"data.val_split: {found}; the scores do not measure unseen images; use other images, or "
        "data.val_split=null and data.val_fraction=0.1"
    )


def _shared_images(config: DataConfig, validation: ImageSource, train: str, val: str) -> str:
    if os.path.samefile(train, val):
        return f"{printable(val)} is the folder of the training images"
    if isinstance(validation, TarSource):
        names = tar_files(val)
    else:
        labelled = config.labels == "folders"
        if _first_folder(val, train) in validation.classes if labelled else _searches(train, val):
            as_class = ", as a class" if labelled else ""
            return f"{printable(val)} lies below the training images{as_class}"
        if not labelled and _searches(val, train):
            return f"{printable(val)} contains the training images"
        count, step = len(validation), -(-len(validation) // _MAX_COMPARED)
        names = [os.path.relpath(validation.name(i), val) for i in range(0, count, step)]
    shared = [n for n in names if _same_content(os.path.join(train, n), os.path.join(val, n))]
    if not shared:
        return ""
    return (
        f"{len(shared)} of {len(names)} compared files of {printable(val)} are also in "
        f"{printable(train)} ({listed(shared, 3)})"
    )


def _first_folder(below: str, folder: str) -> str:
    """Name of the folder in `folder` that leads to `below`; ".." if none does."""
    return os.path.relpath(os.path.realpath(below), os.path.realpath(folder)).split(os.sep)[0]


def _searches(folder: str, below: str) -> bool:
    """Checks if the images below `below` are among those of `folder`, without labels."""
    first = _first_folder(below, folder)
    return first != os.pardir and not is_hidden(first) and not tar_files(folder)


def _same_content(first: str, second: str) -> bool:
    """Checks if two names are those of one file, or of files that are equal in their first MiB."""
    try:
        one, two = os.stat(first), os.stat(second)
        if (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino):
            return True
        if one.st_size != two.st_size or one.st_size == 0:
            return False
        with open_regular(first) as a, open_regular(second) as b:
            return a.read(_COMPARED_BYTES) == b.read(_COMPARED_BYTES)
    except OSError:
        return False
