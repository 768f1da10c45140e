"""Images of a split, addressed by key, with the handling of unreadable files."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from featkd.data.augment import TrainTransform, build_transform
from featkd.data.config import DataConfig
from featkd.data.folder import FolderSource, images_in, split_folder
from featkd.data.images import BadImageError, decode_image
from featkd.data.sampler import SampleKey
from featkd.data.shards import ShardError, TarSource, tar_files
from featkd.data.source import ImageSource
from featkd.data.splits import shared_images_note
from featkd.data.unlabelled import UnlabelledFolder
from featkd.data.walk import subfolders
from featkd.runtime.names import listed, printable

# Number of images tried for one training sample. More unreadable neighbors than this point to a
# broken disk or mount, not to a few broken files.
MAX_TRIES = 16

# Number of images, evenly spaced in the list, whose content the fingerprint covers.
FINGERPRINT_CONTENTS = 64

# Errors in the data itself, which the command line prints without a traceback.
DataError = BadImageError | ShardError
DATA_ERRORS = (BadImageError, ShardError)


def open_source(config: DataConfig, split: Literal["train", "val"]) -> ImageSource:
    """Opens the images of a split: tar shards if its folder holds any, otherwise image files.

    Raises:
        FileNotFoundError: a folder is missing or holds no images.
        ValueError: the images cannot be used; the message gives the reason.
    """
    if config.path:
        folder = split_folder(config, split)
        if tars := tar_files(folder):
            _check_unambiguous(config, folder, tars)
            return TarSource(config, split, folder, tars)
    return (FolderSource if config.labels == "folders" else UnlabelledFolder)(config, split)


def _check_unambiguous(config: DataConfig, folder: str, tars: Sequence[str]) -> None:
    """Raises ValueError if a folder may hold shards or images; classes.txt means shards."""
    labelled = config.labels == "folders"
    if labelled and os.path.isfile(os.path.join(config.path, "classes.txt")):
        return
    folders = subfolders(folder)
    images = any(images_in(os.path.join(folder, name)) for name in folders)
    if not images and (labelled or not images_in(folder)):
        return
    beside, advice = "images", "either shards or images; move the others away"
    if labelled:
        beside = f"folders ({listed(folders, 3)})"
        advice = (
            "either class folders (then move the tar files away) or shards (then write the class "
            "names to <data.path>/classes.txt, one per line)"
        )
    raise ValueError(
        f"{printable(folder)}: found tar files ({listed(tars, 3)}) beside {beside}; expected "
        f"{advice}"
    )


class Sample(NamedTuple):
    """One sample of a data set.

    Attributes:
        image: (3, H, W) uint8, not normalized (or what `ImageSet.decode` was asked for); None if
            the image was unreadable and is left out.
        target: class index.
        bad: errors of the unreadable files that were tried.
        key: key of the sample.
        source_index: index of the image that was loaded; see `Batch.source_index`.
    """

    image: Any
    target: int
    bad: list[BadImageError]
    key: SampleKey
    source_index: int


class ImageSet(Dataset[Sample]):
    """Images of one split, addressed by `SampleKey`.

    All randomness of a sample derives from (seed, key). It does not depend on the rank, the worker,
    the batch or a restart.

    Args:
        config: the image set and its preprocessing.
        split: "train" or "val".
        seed: seed of the run.
        training: transform and replace images as in training; by default in the training split.

    Attributes:
        classes: class names, which targets index; empty without labels, and targets are 0.
        folder: folder of the split.
        config, seed, training: see the arguments.

    Raises:
        FileNotFoundError: a folder is missing or holds no images.
        ValueError: the validation split has classes that the training split lacks, or shards
            cannot be used.
    """

    def __init__(
        self,
        config: DataConfig,
        split: Literal["train", "val"],
        seed: int = 0,
        *,
        training: bool | None = None,
    ) -> None:
        source = open_source(config, split)
        if split == "val" and (note := shared_images_note(config, source)):
            warnings.warn(note, stacklevel=2)
        self._source = source
        self.classes, self.folder = source.classes, source.folder
        self.config = config
        self.training = split == "train" if training is None else training
        self.seed = seed
        self.skip = config.on_bad_image == "skip"
        self._train_transform = TrainTransform(config, seed) if self.training else None
        self._transform = build_transform(config, normalize=False)

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        """Returns the name of the file of image `index`, 0 <= index < len(self)."""
        return self._source.name(index)

    def fingerprint(self) -> str:
        """Returns a SHA-256 digest that identifies the images.

        It covers the class names, the names (relative to `folder`) and sizes of all files, and the
        contents of FINGERPRINT_CONTENTS files, evenly spaced in the list.

        Raises:
            ShardError: a shard cannot be used.
        """
        digest = hashlib.sha256(os.fsencode("\n".join(self.classes)))
        for index in range(len(self)):
            name = self.name(index).removeprefix(self.folder + os.sep)
            digest.update(b"\0" + os.fsencode(name) + b"\0%d" % self._source.file_size(index))
        contents = min(FINGERPRINT_CONTENTS, len(self))
        for i in range(contents):
            try:
                content = self._source.read(i * len(self) // contents)[0]
            except BadImageError:
                content = b""
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def __getitem__(self, key: SampleKey) -> Sample:
        """Reads and transforms the image of a key.

        With on_bad_image="skip", an unreadable image is replaced in training by the next readable
        one, within MAX_TRIES images, which gets the augmentation of `key`. In evaluation the
        sample has no image.

        Raises:
            BadImageError: an image is unreadable with on_bad_image="error", or MAX_TRIES images in
                a row are unreadable.
        """
        sample = self.decode(key, decode_image)
        if sample.image is None:
            return sample
        return sample._replace(image=self._transformed(sample.image, sample.source_index, key))

    def decode(self, key: SampleKey, decoder: Callable[[bytes, str], Any]) -> Sample:
        """Decodes the image of a key, or the next readable one; see `__getitem__`.

        Args:
            key: key of the sample.
            decoder: returns the sample's image for a file's content and name, or raises
                BadImageError.

        Raises:
            BadImageError: see `__getitem__`.
        """
        bad: list[BadImageError] = []
        tries = min(MAX_TRIES, len(self)) if self.training and self.skip else 1
        for offset in range(tries):
            index = (key.image + offset) % len(self)
            try:
                content, target = self._source.read(index)
                return Sample(decoder(content, self.name(index)), target, bad, key, index)
            except BadImageError as error:
                if not self.skip:
                    raise
                bad.append(error)
        if self.training:
            raise BadImageError(
                bad[0].path, f"{bad[0].cause} (and so are the {tries - 1} images after it)"
            )
        return Sample(None, 0, bad, key, key.image)

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Sample] | DataError:
        """Returns the samples of a batch; torch's DataLoader calls this method if it exists.

        Errors in the data are returned, not raised: DataLoader would pass on only the text of a
        worker's exception, with the worker's traceback.
        """
        try:
            return [self[key] for key in keys]
        except DATA_ERRORS as error:
            return error

    def _transformed(self, image: Image.Image, index: int, key: SampleKey) -> Tensor:
        try:
            if self._train_transform is None:
                return self._transform(image)
            return self._train_transform(image, key)
        except Exception as error:
            # Not a BadImageError, because "skip" must not hide a broken transform.
            raise RuntimeError(
                f"transform failed on {printable(self.name(index))} (seed {self.seed}, {key}): "
                f"{error}"
            ) from error
