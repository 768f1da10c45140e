"""Images without labels: all images in a folder and the folders below it."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from featkd.data.config import DataConfig
from featkd.data.folder import ImageFiles, images_in, no_images, split_folder
from featkd.data.source import in_split
from featkd.data.walk import find_files, warn_of_repeated_links


class UnlabelledFolder(ImageFiles):
    """`ImageSource` for data.labels "none".

    Training images have no classes. The images of a validation split do if all lie in class
    folders, and two classes or more have two images or more, which is what kNN needs. Held-out
    training images have none: their folders can be anything.

    Args:
        config: the image set.
        split: "train" or "val".

    Raises:
        FileNotFoundError: a folder is missing or holds no images.
        ValueError: data.val_fraction leaves the split without images.
    """

    def __init__(self, config: DataConfig, split: Literal["train", "val"]) -> None:
        folder = split_folder(config, split)
        paths, repeated = find_files(folder, IMG_EXTENSIONS)
        warn_of_repeated_links(repeated)
        if not paths:
            raise no_images(config, folder)
        names = [os.path.relpath(path, folder) for path in paths]
        names = [names[i] for i in in_split(names, config, split, folder)]
        classes: list[str] = []
        targets = [0] * len(names)
        if split == "val" and config.held_out is None and not images_in(folder):
            folders = [name.split(os.sep, 1)[0] for name in names]
            found, numbers, counts = np.unique(folders, return_inverse=True, return_counts=True)
            if (counts >= 2).sum() >= 2:
                classes, targets = found.tolist(), numbers.tolist()
        super().__init__(folder, classes, names, targets)
