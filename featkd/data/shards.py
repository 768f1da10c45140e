"""Images in WebDataset tar shards, with random access.

The index of a shard lists the position of each sample. It is read from the file that DALI's wds2idx
writes (`x.tar` -> `x.idx`). Without that file it is built by scanning the tar headers.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from featkd.data.config import DataConfig
from featkd.data.images import BadImageError
from featkd.data.source import ImageSource, in_split
from featkd.data.walk import is_hidden
from featkd.runtime.files import open_regular
from featkd.runtime.names import printable


class ShardError(ValueError):
    """A shard, its index or the list of classes cannot be used; the message names the file."""


def tar_files(folder: str) -> list[str]:
    """Returns the names of the tar files in a folder, sorted, without hidden ones."""
    return sorted(n for n in os.listdir(folder) if n.endswith(".tar") and not is_hidden(n))


class TarSource(ImageSource):
    """`ImageSource` for WebDataset tar files; a sample is `x.jpg` and `x.cls`, its class number.

    With data.labels "none" only the image of a sample is read.

    Args:
        config: the image set, for the list of classes, data.labels and data.val_fraction.
        split: "train" or "val".
        folder: folder of the shards.
        shards: names of the shards.

    Raises:
        FileNotFoundError: the list of classes is missing.
        ShardError: a tar file or its index cannot be used, a sample is incomplete, a name occurs
            twice, or the shards contain no sample.
        ValueError: data.val_fraction leaves the split without images.
    """

    def __init__(
        self, config: DataConfig, split: Literal["train", "val"], folder: str, shards: Sequence[str]
    ) -> None:
        labelled = config.labels == "folders"
        classes = _read_classes(config) if labelled else []
        self._first_label = config.first_label
        self._shards = list(shards)
        names: list[str] = []
        positions: list[tuple[int, ...]] = []
        for number, shard in enumerate(shards):
            offsets: dict[str, int] = {}
            path = os.path.join(folder, shard)
            for sample in _tar_samples(path):
                parts = _image_and_label(sample, path, labelled)
                name, offset, _ = parts[0]
                # `tar --append` leaves both files in the archive, and either could be meant.
                if (first := offsets.setdefault(name, offset)) != offset:
                    raise ShardError(
                        f"{path}: has {name} twice, at bytes {first} and {offset}; expected each "
                        "name once"
                    )
                names.append(f"{shard}/{name}")
                positions.append((number, *(x for part in parts for x in part[1:])))
        if not positions:
            raise ShardError(f"{printable(folder)}: no image in its {len(shards)} shards")
        kept = in_split(names, config, split, folder)
        super().__init__(folder, classes, [names[i] for i in kept])
        # columns: shard, offset and size of the image; with labels, offset and size of the label
        self._positions = np.array([positions[i] for i in kept], dtype=np.int64)

    def file_size(self, index: int) -> int:
        """See `ImageSource`."""
        return int(self._positions[index, 2])

    def read(self, index: int) -> tuple[bytes, int]:
        """See `ImageSource`."""
        name = self.name(index)
        shard, offset, size, *label = self._positions[index].tolist()
        target = 0
        if label:
            text = self._read_bytes(shard, label[0], label[1], name)
            try:
                target = int(text) - self._first_label
            except ValueError as error:
                raise ShardError(f"{name}: expected a number as its .cls, got {text!r}") from error
            if not 0 <= target < len(self.classes):
                raise ShardError(
                    f"{name}: has class {int(text)}; classes.txt has {len(self.classes)} lines and "
                    f"data.first_label is {self._first_label}"
                )
        return self._read_bytes(shard, offset, size, name), target

    def _read_bytes(self, shard: int, offset: int, size: int, name: str) -> bytes:
        try:
            with open_regular(os.path.join(self.folder, self._shards[shard])) as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise BadImageError(name, f"{type(error).__name__}: {error}") from error
        if len(content) < size:
            raise BadImageError(name, f"the shard ends {size - len(content)} bytes before it does")
        return content


def _read_classes(config: DataConfig) -> list[str]:
    path = os.path.join(config.path, "classes.txt")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"no file {path}; shards need one, with one class name per line; the first line is "
            "class data.first_label"
        )
    with open(path, encoding="utf-8") as file:
        classes = [line.strip() for line in file if line.strip()]
    if len(set(classes)) != len(classes) or not classes:
        raise ShardError(f"{path}: expected one class name per line, each once")
    return classes


_Member = tuple[str, int, int]  # name, offset and size of a file in an archive


def _image_and_label(sample: Sequence[_Member], shard: str, labelled: bool) -> list[_Member]:
    images = [part for part in sample if part[0].lower().endswith(IMG_EXTENSIONS)]
    labels = [part for part in sample if part[0].endswith(".cls")] if labelled else []
    if len(images) != 1 or len(labels) != labelled:
        raise ShardError(
            f"{shard}: expected one image{' and one .cls' if labelled else ''} per sample, found "
            f"{', '.join(name for name, _, _ in sample)}"
        )
    return images + labels


def _is_hidden_member(name: str) -> bool:
    """Checks for hidden names, such as those of the files that macOS adds."""
    return any(is_hidden(part) for part in name.split("/") if part not in (".", ".."))


def _tar_samples(path: str) -> Iterator[list[_Member]]:
    """Yields the files of each sample: neighbors whose names agree up to the first dot."""
    index = f"{path.removesuffix('.tar')}.idx"
    if os.path.isfile(index):
        yield from _tar_index(index, path)
        return
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = (
                (member.name, member.offset_data, member.size)
                for member in archive
                if member.isfile() and not _is_hidden_member(member.name)
            )
            for _, sample in groupby(members, lambda member: _stem(member[0])):
                yield list(sample)
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{path}: not a readable tar file: {error}") from error


def _stem(name: str) -> str:
    folder, file = os.path.split(name)
    return os.path.join(folder, file.partition(".")[0])


def _tar_index(path: str, archive: str) -> Iterator[list[_Member]]:
    """Reads a wds2idx index: "v1.2 <samples>", then one line per sample.

    A line holds "extension offset size name" for each file of the sample.
    """
    with open(path, encoding="utf-8") as file:
        header = file.readline().split()
        if len(header) != 2 or header[0] != "v1.2" or not header[1].isdecimal():
            raise ShardError(f"{path}: expected a wds2idx index of version v1.2, got {header}")
        count, end = 0, 0
        for count, line in enumerate(file, 1):
            words = line.split()
            try:
                if not words or len(words) % 4:
                    raise ValueError
                members = [
                    (words[i + 3].removeprefix("./"), int(words[i + 1]), int(words[i + 2]))
                    for i in range(0, len(words), 4)
                ]
            except ValueError as error:
                raise ShardError(
                    f"{path}, line {count + 1}: expected extension, offset, size, name; got "
                    f"{line.strip()[:80]!r}"
                ) from error
            end = max(end, *(offset + size for _, offset, size in members))
            if sample := [member for member in members if not _is_hidden_member(member[0])]:
                yield sample
    if count != int(header[1]):
        raise ShardError(f"{path}: has {count} lines, its header says {header[1]}")
    _check_tar_end(path, archive, end)


def _check_tar_end(index: str, archive: str, end: int) -> None:
    """Raises ShardError unless the index ends where its archive ends.

    The index of another archive, or of a shorter version of this one, would drop images silently.
    """
    length = os.path.getsize(archive)
    with open(archive, "rb") as file:
        file.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        following = file.read(tarfile.BLOCKSIZE)
    if end > length or any(following):  # a tar file ends with blocks of zeros
        raise ShardError(
            f"{index}: its samples end at byte {end}, but {archive}, of {length} bytes, "
            f"{'is shorter' if end > length else 'goes on'}; rebuild the index or delete it"
        )
