"""Images in shards with random access: WebDataset's tar files and TFRecord files.

A shard's index says where each sample lies in it. It is read from the file beside the shard that
DALI's tools wds2idx and tfrecord2idx write (`x.tar` -> `x.idx`, `x.tfrecord` -> `x.tfrecord.idx`),
and where there is none it is made by going through the shard's headers.
"""

from __future__ import annotations

import os
import re
import struct
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from torchvision.datasets.folder import IMG_EXTENSIONS

from featkd.data.config import DataConfig
from featkd.data.images import BadImageError
from featkd.data.names import PackedNames
from featkd.data.tf_example import Example

_RECORD = re.compile(r".+(\.tfrecords?(-\d+-of-\d+)?|-\d{5}-of-\d{5})")
_LENGTH = struct.Struct("<QI")  # before a record: its length and that length's checksum
# Neither checksum is looked at: no dependency computes CRC-32C in compiled code.
_CHECKSUM_BYTES = 4  # after it


class ShardError(ValueError):
    """A shard, its index or the list of classes can't be used; names the file."""


def tar_files(folder: str) -> list[str]:
    """Names of the tar files in a folder, sorted."""
    return sorted(name for name in os.listdir(folder) if name.endswith(".tar"))


def record_files(folder: str) -> list[str]:
    """Names of the TFRecord files in a folder, sorted: `*.tfrecord`, `train-00000-of-01024`."""
    return sorted(name for name in os.listdir(folder) if _RECORD.fullmatch(name))


class _Shards:
    """What both kinds share: pieces of files, by shard, offset and size.

    Attributes:
        classes, folder: see `ImageSource`.
    """

    _places: np.ndarray[Any, np.dtype[np.int64]]
    """(n, ...): shard, offset and size of each image, and what else a kind has."""

    def __init__(self, config: DataConfig, folder: str, shards: Sequence[str]) -> None:
        self.folder = folder
        self.classes = _read_classes(config)
        self._first_label = config.first_label
        self._shards = list(shards)

    def _set_places(self, places: Sequence[tuple[int, ...]], columns: int) -> None:
        if not places:
            raise ShardError(f"{self.folder}: no image in its {len(self._shards)} shards")
        self._places = np.array(places, dtype=np.int64).reshape(-1, columns)

    def __len__(self) -> int:
        return len(self._places)

    def file_size(self, index: int) -> int:
        """See `ImageSource`."""
        return int(self._places[index, 2])

    def _piece(self, shard: int, offset: int, size: int, name: str) -> bytes:
        try:
            with open(os.path.join(self.folder, self._shards[shard]), "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise BadImageError(name, f"{type(error).__name__}: {error}") from error
        if len(content) < size:
            raise BadImageError(name, f"the shard ends {size - len(content)} bytes before it does")
        return content

    def _target(self, label: int, name: str) -> int:
        target = label - self._first_label
        if not 0 <= target < len(self.classes):
            raise ShardError(
                f"{name}: has class {label}; classes.txt has {len(self.classes)} lines and "
                f"data.first_label is {self._first_label}"
            )
        return target


class TarSource(_Shards):
    """`ImageSource` of WebDataset's tar files: `x.jpg` beside `x.cls`, which holds a number.

    Args:
        config: where the list of classes is.
        folder: of the shards.
        shards: their names.

    Raises:
        FileNotFoundError: no list of classes.
        ShardError: a tar file or its index can't be used, a sample is incomplete, a name there
            twice, or no sample in any.
    """

    def __init__(self, config: DataConfig, folder: str, shards: Sequence[str]) -> None:
        super().__init__(config, folder, shards)
        names: list[str] = []
        places: list[tuple[int, int, int, int, int]] = []
        for number, shard in enumerate(shards):
            found: dict[str, int] = {}  # name -> where
            for sample in _tar_samples(os.path.join(folder, shard)):
                image, label = _image_and_label(sample, shard)
                first = found.setdefault(image[0], image[1])
                if first != image[1]:
                    raise ShardError(
                        f"{os.path.join(folder, shard)}: has {image[0]} twice, at bytes {first} "
                        f"and {image[1]}; expected each name once"
                    )
                names.append(f"{shard}/{image[0]}")
                places.append((number, *image[1:], *label[1:]))
        self._names = PackedNames(names)
        # shard, offset and size of the image, offset and size of its class
        self._set_places(places, 5)

    def name(self, index: int) -> str:
        """See `ImageSource`."""
        return os.path.join(self.folder, self._names[index])

    def read(self, index: int) -> tuple[bytes, int]:
        """See `ImageSource`."""
        name = self.name(index)
        shard, offset, size, label_offset, label_size = self._places[index].tolist()
        text = self._piece(shard, label_offset, label_size, name)
        try:
            label = int(text)
        except ValueError as error:
            raise ShardError(f"{name}: expected a number as its .cls, got {text!r}") from error
        return self._piece(shard, offset, size, name), self._target(label, name)


class RecordSource(_Shards):
    """`ImageSource` of TFRecord files of tf.train.Example.

    The features "image/encoded" and "image/class/label" are used, as in TensorFlow's ImageNet
    (whose labels count from 1: data.first_label).

    Args:
        config: where the list of classes is.
        folder: of the shards.
        shards: their names.

    Raises:
        FileNotFoundError: no list of classes.
        ShardError: a file or its index can't be used, or no record is in any.
    """

    def __init__(self, config: DataConfig, folder: str, shards: Sequence[str]) -> None:
        super().__init__(config, folder, shards)
        places = [
            (number, offset, size)
            for number, shard in enumerate(shards)
            for offset, size in _records(os.path.join(folder, shard))
        ]
        self._set_places(places, 3)

    def name(self, index: int) -> str:
        """See `ImageSource`."""
        shard, offset, _ = self._places[index].tolist()
        return f"{os.path.join(self.folder, self._shards[shard])} at byte {offset}"

    def read(self, index: int) -> tuple[bytes, int]:
        """See `ImageSource`."""
        name = self.name(index)
        shard, offset, size = self._places[index].tolist()
        record = self._piece(shard, offset, size, name)
        try:
            features = Example.FromString(record[_LENGTH.size : -_CHECKSUM_BYTES]).features.feature
        except DecodeError as error:
            raise BadImageError(name, f"not a tf.train.Example: {error}") from error
        names = sorted(features)  # a look-up adds the name
        content = features["image/encoded"].bytes_list.value
        label = features["image/class/label"].int64_list.value
        if not content or not label:
            raise ShardError(
                f"{name}: expected the features image/encoded and image/class/label, found "
                f"{', '.join(names) or 'none'}"
            )
        return content[0], self._target(label[0], name)


def _read_classes(config: DataConfig) -> list[str]:
    path = os.path.join(config.path, "classes.txt")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"no file {path}; shards need one, with a class name a line, the first being class "
            "data.first_label"
        )
    with open(path, encoding="utf-8") as file:
        classes = [line.strip() for line in file if line.strip()]
    if len(set(classes)) != len(classes) or not classes:
        raise ShardError(f"{path}: expected one class name a line, each once")
    return classes


_Component = tuple[str, int, int]  # name, offset, size


def _image_and_label(sample: Sequence[_Component], shard: str) -> tuple[_Component, _Component]:
    images = [part for part in sample if part[0].lower().endswith(IMG_EXTENSIONS)]
    labels = [part for part in sample if part[0].endswith(".cls")]
    if len(images) != 1 or len(labels) != 1:
        raise ShardError(
            f"{shard}: expected one image and one .cls a sample, found "
            f"{', '.join(name for name, _, _ in sample)}"
        )
    return images[0], labels[0]


def _tar_samples(path: str) -> Iterator[list[_Component]]:
    """The components of each sample: neighbours whose names agree up to the file's first dot."""
    index = f"{path.removesuffix('.tar')}.idx"
    if os.path.isfile(index):
        yield from _tar_index(index, path)
        return
    sample: list[_Component] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if sample and _stem(sample[0][0]) != _stem(member.name):
                    yield sample
                    sample = []
                sample.append((member.name, member.offset_data, member.size))
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{path}: not a readable tar file: {error}") from error
    if sample:
        yield sample


def _stem(name: str) -> str:
    folder, file = os.path.split(name)
    return os.path.join(folder, file.partition(".")[0])


def _tar_index(path: str, archive: str) -> Iterator[list[_Component]]:
    """wds2idx's file: "v1.2 <samples>", then a line a sample of "extension offset size name"."""
    with open(path, encoding="utf-8") as file:
        head = file.readline().split()
        if len(head) != 2 or head[0] != "v1.2" or not head[1].isdecimal():
            raise ShardError(f"{path}: expected an index of wds2idx, version v1.2; got {head}")
        count, end = 0, 0
        for count, line in enumerate(file, 1):
            words = line.split()
            try:
                if not words or len(words) % 4:
                    raise ValueError
                sample = [
                    (words[i + 3].removeprefix("./"), int(words[i + 1]), int(words[i + 2]))
                    for i in range(0, len(words), 4)
                ]
            except ValueError as error:
                raise ShardError(
                    f"{path}, line {count + 1}: expected extension, offset, size, name; got "
                    f"{line.strip()[:80]!r}"
                ) from error
            end = max(end, *(offset + size for _, offset, size in sample))
            yield sample
    if count != int(head[1]):
        raise ShardError(f"{path}: has {count} lines, its head says {head[1]}")
    _check_tar_end(path, archive, end)


def _check_tar_end(index: str, archive: str, end: int) -> None:
    """An index that is of another file, or of this one before it grew, would drop images."""
    length = os.path.getsize(archive)
    with open(archive, "rb") as file:
        file.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        following = file.read(tarfile.BLOCKSIZE)
    if end > length or any(following):  # a tar file ends with blocks of zeros
        raise ShardError(
            f"{index}: its samples end at byte {end}, but {archive}, of {length} bytes, "
            f"{'is shorter' if end > length else 'goes on'}; make the index anew, or remove it"
        )


def _records(path: str) -> list[tuple[int, int]]:
    """Offset and size of each record, with its head and tail."""
    index = f"{path}.idx"
    if os.path.isfile(index):
        return _record_index(index, path)
    found, offset, end = [], 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while offset < end:
            file.seek(offset)
            head = file.read(_LENGTH.size)
            size = _CHECKSUM_BYTES + _LENGTH.size
            if len(head) == _LENGTH.size:
                size += _LENGTH.unpack(head)[0]
            if len(head) < _LENGTH.size or offset + size > end:
                raise ShardError(f"{path}: no TFRecord file, or cut off after byte {offset}")
            found.append((offset, size))
            offset += size
    return found


def _record_index(path: str, records: str) -> list[tuple[int, int]]:
    """tfrecord2idx's file: a line "offset size" a record, which together are the whole file."""
    found, end = [], 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                offset, size = map(int, line.split())
            except ValueError as error:
                raise ShardError(
                    f"{path}, line {number}: expected 'offset size', got {line.strip()[:80]!r}"
                ) from error
            if offset != end or size <= 0:
                raise ShardError(
                    f"{path}, line {number}: expected a record at byte {end}, got {size} bytes at "
                    f"{offset}"
                )
            found.append((offset, size))
            end += size
    if end != (length := os.path.getsize(records)):
        raise ShardError(
            f"{path}: its records end at byte {end}, but {records} has {length} bytes; make the "
            "index anew, or remove it"
        )
    return found
