"""The images of a split, addressed by key, and what happens to unreadable ones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from featkd.data.augment import build_transform, seeded
from featkd.data.config import DataConfig
from featkd.data.folder import FolderSource, split_folder
from featkd.data.images import BadImageError, decode_image
from featkd.data.sampler import Key
from featkd.data.shards import RecordSource, ShardError, TarSource, record_files, tar_files

# Images tried for one training sample before giving up: a run of this many unreadable
# neighbours is a broken disk or mount, not a few broken files.
MAX_TRIES = 16

# Images, evenly over the list, whose contents a fingerprint is of
FINGERPRINT_CONTENTS = 64

# What is wrong with the data themselves, and its user should read without a traceback.
DataError = BadImageError | ShardError
DATA_ERRORS = (BadImageError, ShardError)

Read = TypeVar("Read")


class ImageSource(Protocol):
    """Numbered files with classes, wherever they are stored; a picklable object.

    Attributes:
        classes: class names; targets index them.
        folder: where the files are.
    """

    classes: list[str]
    folder: str

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The file of an image, 0 <= index < len(self), as messages call it."""
        ...

    def size(self, index: int) -> int:
        """Bytes of the image's file, -1 where there is none."""
        ...

    def read(self, index: int) -> tuple[bytes, int]:
        """The content of an image's file, and its class index.

        Raises:
            BadImageError: it cannot be read.
        """
        ...


def open_source(config: DataConfig, split: Literal["train", "val"]) -> ImageSource:
    """Find the images of a split: tar or TFRecord files in its folder, else class folders.

    Raises:
        FileNotFoundError: a folder is missing or holds no images.
        ValueError: what is there can't be used; says why.
    """
    if config.path:
        folder = split_folder(config, split)
        tars, records = tar_files(folder), record_files(folder)
        if tars and records:
            raise ValueError(
                f"{folder}: holds both tar and TFRecord files ({tars[0]}, {records[0]}); "
                "expected one kind"
            )
        if tars:
            return TarSource(config, folder, tars)
        if records:
            return RecordSource(config, folder, records)
    return FolderSource(config, split)


class Sample(NamedTuple):
    """One image (3, H, W) float32, or None where it was dropped; the bad files met on the way.

    `shown` is the image's number: not its key's where another takes its place.
    """

    image: Tensor | None
    target: int
    bad: list[BadImageError]
    key: Key
    shown: int


class ImageSet(Dataset[Sample]):
    """The images of one split, addressed by `Key`.

    Everything random in a sample derives from (seed, key): not from rank, worker, batch or
    restart.

    Args:
        config: where the images are and how they are transformed.
        split: "train" or "val".
        seed: seed of the run.

    Attributes:
        classes: class names; targets index them.
        folder: of the split.

    Raises:
        FileNotFoundError: a folder is missing or holds no images.
        ValueError: validation has classes that training has not, or shards can't be used.
    """

    def __init__(self, config: DataConfig, split: Literal["train", "val"], seed: int = 0) -> None:
        self._source = open_source(config, split)
        self.classes = self._source.classes
        self.folder = self._source.folder
        self.training = split == "train"
        self.seed = seed
        self.skip = config.on_bad_image == "skip"
        self.transform = build_transform(config, training=self.training)

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        """The file of image `index`, 0 <= index < len(self)."""
        return self._source.name(index)

    def fingerprint(self) -> str:
        """SHA-256 of the classes, of the names below `folder` and sizes of all files, and of the
        contents of FINGERPRINT_CONTENTS files, evenly over the list.

        Raises:
            ShardError: a shard can't be used.
        """
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for index in range(len(self)):
            name = self.name(index).removeprefix(self.folder + os.sep)
            digest.update(b"\0" + os.fsencode(name) + b"\0%d" % self._source.size(index))
        contents = min(FINGERPRINT_CONTENTS, len(self))
        for i in range(contents):
            try:
                content = self._source.read(i * len(self) // contents)[0]
            except BadImageError:
                content = b""
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def __getitem__(self, key: Key) -> Sample:
        """Read and transform the image of a key.

        An unreadable image under "skip": training takes the next readable one of the list in
        its place, at most MAX_TRIES images in all, with the augmentation of the key asked for;
        evaluation gives a Sample without an image.

        Raises:
            BadImageError: unreadable under "error", or MAX_TRIES unreadable images in a row.
        """
        found, bad = self.readable(key, decode_image)
        if found is None:
            return Sample(None, 0, bad, key, key.image)
        image, target, index = found
        return Sample(self._transformed(image, index, key), target, bad, key, index)

    def readable(
        self, key: Key, decode: Callable[[bytes, str], Read]
    ) -> tuple[tuple[Read, int, int] | None, list[BadImageError]]:
        """What `decode` makes of a key's file, or of the next readable one; see `__getitem__`.

        Args:
            key: of the sample.
            decode: called with a file's content and name; raises BadImageError.

        Returns:
            The result, the class and the number of the image it is of, or None where the image is
            left out; and the errors of those before it.

        Raises:
            BadImageError: unreadable under "error", or MAX_TRIES unreadable images in a row.
        """
        bad: list[BadImageError] = []
        tries = min(MAX_TRIES, len(self)) if self.training and self.skip else 1
        for offset in range(tries):
            index = (key.image + offset) % len(self)
            try:
                content, target = self._source.read(index)
                return (decode(content, self.name(index)), target, index), bad
            except BadImageError as error:
                if not self.skip:
                    raise
                bad.append(error)
        if self.training:
            raise BadImageError(
                bad[0].path, f"{bad[0].cause} (and so are the {tries - 1} images after it)"
            )
        return None, bad

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample] | DataError:
        """The samples of a batch; torch's DataLoader calls this where it exists.

        What the data are to blame for is returned, not raised: DataLoader would hand on only the
        text of what a worker raises, with its traceback, and rebuild the exception from that.
        """
        try:
            return [self[key] for key in keys]
        except DATA_ERRORS as error:
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
                f"transform failed on {self.name(index)} (seed {self.seed}, {key}): {error}"
            ) from error
