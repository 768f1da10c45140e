"""Tar shards return the same images and classes as the folders that they were made from."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from featkd.data import AugmentConfig, BadImageError, SampleKey
from featkd.data.shards import ShardError
from tests.data.conftest import MakeSet
from tests.data.loading import DALI, image_set, loading, names, refused, same

PLAIN = AugmentConfig(rand_augment=None, repeats=1)


def write_tar(path: Path, files: list[tuple[Path, int | str]]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, (file, label) in enumerate(files):
            archive.add(file, f"{path.stem}/{number:04d}.jpg")
            add(archive, f"{path.stem}/{number:04d}.cls", f"{label}\n".encode())


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def both(make_set: MakeSet, tmp_path: Path) -> tuple[Path, Path]:
    """Root of a set in class folders, and of an empty set with the same classes."""
    root = make_set(train=12, val=5)
    other = tmp_path / "shards"
    for split in ("train", "val"):
        (other / split).mkdir(parents=True)
    (other / "classes.txt").write_text("class0\nclass1\nclass2\n")
    return root, other


@pytest.fixture
def shards(both: tuple[Path, Path]) -> Path:
    """Root of the set in shards, two for each split."""
    root, other = both
    for split in ("train", "val"):
        files = files_of(root, split)
        for number, part in enumerate((files[:3], files[3:])):
            write_tar(other / split / f"{split}-{number:03d}.tar", part)
    return other


def files_of(root: Path, split: Any = "val") -> list[tuple[Path, int]]:
    files = [root / name for name in names(root, split)]
    return [(file, int(file.parent.name[-1])) for file in files]


@pytest.mark.parametrize("backend", ["timm", DALI])
@pytest.mark.parametrize("split", ["train", "val"])
def test_batches_equal_those_of_the_folders(both, shards, backend, split):
    options = {"batch_size": 3, "augment": PLAIN, "backend": backend}
    with loading(both[0], split, **options) as folders, loading(shards, split, **options) as tars:
        assert folders.classes == tars.classes
        assert same(list(folders), list(tars))


def test_dalis_index_files_are_used(shards):
    """The tar headers are damaged, so only the index can locate the samples."""
    pytest.importorskip("nvidia.dali")
    expected = [image_set(shards, "val")[SampleKey(0, i, 0)] for i in range(5)]
    tool = Path(sys.executable).parent / "wds2idx"
    for shard in sorted((shards / "val").glob("*.tar")):
        index = shard.with_suffix(".idx")
        subprocess.run([sys.executable, tool, shard, index], check=True, capture_output=True)
        content = bytearray(shard.read_bytes())
        content[:8] = b"\xff" * 8
        shard.write_bytes(content)
    dataset = image_set(shards, "val")
    for number, sample in enumerate(expected):
        found = dataset[SampleKey(0, number, 0)]
        assert torch.equal(found.image, sample.image)
        assert found.target == sample.target


def test_bad_images_in_shards_are_named(shards):
    shard = shards / "val" / "val-001.tar"
    content = shard.read_bytes()
    with tarfile.open(shard) as archive:
        place = archive.getmember("val-001/0001.jpg").offset_data
    shard.write_bytes(content[:place] + b"no image" + content[place + 8 :])
    dataset = image_set(shards, "val")
    with pytest.raises(BadImageError, match=r"val-001/0001.jpg: no image of a supported format"):
        dataset[SampleKey(0, 4, 0)]
    shard.write_bytes(content[: place + 10])
    with pytest.raises(BadImageError, match=r"0001.jpg: the shard ends \d+ bytes before it does"):
        dataset[SampleKey(0, 4, 0)]
    assert len(names(shards, on_bad_image="skip")) == 12
    refused(ShardError, r"val-001.tar: not a readable tar file", shards, "val")


def test_labels_count_from_first_label(both):
    root, other = both
    files = files_of(root)
    write_tar(other / "val" / "a.tar", [(file, target + 1) for file, target in files])
    dataset = image_set(other, "val", first_label=1)
    assert [dataset[SampleKey(0, i, 0)].target for i in range(5)] == [target for _, target in files]


def test_unusable_shards_are_refused_by_name(both, shards):
    with pytest.raises(ShardError, match=r"has class 0; classes.txt has 3 lines.*first_label is 5"):
        image_set(shards, "val", first_label=5)[SampleKey(0, 0, 0)]
    (shards / "classes.txt").write_text("a\na\n")
    refused(ShardError, "classes.txt: expected one class name per line, each once", shards, "val")
    (shards / "classes.txt").unlink()
    refused(FileNotFoundError, r"no file .*classes.txt; shards need one", shards, "val")
    (shards / "classes.txt").write_text("a\nb\nc\n")

    picture, _ = files_of(both[0])[0]
    with tarfile.open(shards / "train" / "b.tar", "w") as archive:
        archive.add(picture, "b/0.jpg")
    refused(ShardError, r"train/b.tar: expected one image and one .cls per sample", shards)
    (shards / "train" / "b.idx").write_text("v1.1 1\njpg 512 3\n")
    refused(ShardError, r"b.idx: expected a wds2idx index of version v1.2", shards)
    (shards / "train" / "b.idx").unlink()
    write_tar(shards / "train" / "b.tar", [(picture, "one")])
    message = r"b.tar/b/0000.jpg: expected a number as its .cls, got b'one\\n'"
    with pytest.raises(ShardError, match=message):
        image_set(shards)[SampleKey(0, 0, 0)]


def test_an_index_of_another_archive_is_refused(both):
    root, other = both
    shard = other / "val" / "a.tar"
    write_tar(shard, files_of(root))
    lines = []
    with tarfile.open(shard) as archive:
        members = archive.getmembers()
    for pair in zip(members[::2], members[1::2], strict=True):
        words = [(m.name[-3:], m.offset_data, m.size, m.name) for m in pair]
        lines.append(" ".join(str(word) for part in words for word in part) + "\n")
    index = shard.with_suffix(".idx")
    index.write_text("".join(["v1.2 5\n", *lines]))
    assert len(names(other, "val")) == 5
    longer = lines[4].replace(str(members[-1].offset_data), str(shard.stat().st_size))
    for wrong, message in {
        "v1.2 0\n": "a.idx: its samples end at byte 0, but .*a.tar, of .* goes on; rebuild",
        "".join(["v1.2 4\n", *lines[:4]]): r"a.idx: its samples end .* goes on",
        "".join(["v1.2 5\n", *lines[:4], longer]): r"a.idx: its samples end .* is shorter",
        "".join(["v1.2 5\n", *lines[:4]]): "a.idx: has 4 lines, its header says 5",
        "v1.2 five\n": "a.idx: expected a wds2idx index",
        "v1.2 1\njpg x 3 0.jpg\n": "a.idx, line 2: expected extension, offset, size, name; got",
    }.items():
        index.write_text(wrong)
        refused(ShardError, message, other, "val")


def test_a_duplicate_name_is_refused(both):
    """`tar --append` leaves both files in the archive, and either could be meant."""
    root, other = both
    files = files_of(root)
    shard = other / "val" / "a.tar"
    write_tar(shard, files)
    with tarfile.open(shard, "a") as archive:
        add(archive, "a/0001.jpg", b"another")
        add(archive, "a/0001.cls", b"1")
    refused(ShardError, r"a.tar: has a/0001.jpg twice, at bytes \d+ and \d+; exp", other, "val")
    with tarfile.open(shard, "w") as archive:
        for name in ("b.jpg", "b.cls", "b.jpg"):
            add(archive, name, b"1")
    refused(ShardError, r"one .cls per sample, found b.jpg, b.cls, b.jpg", other, "val")


def test_shards_without_an_image_are_refused(both):
    write_tar(both[1] / "train" / "a.tar", [])
    refused(ShardError, r"train: no image in its 1 shards", both[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_shard_reads_the_same_from_any_loader(both, backend, workers):
    """From a worker too: without the worker's traceback, and after the preceding batches."""
    root, other = both
    files = files_of(root)
    write_tar(other / "val" / "a.tar", [*files[:2], (files[2][0], 7)])
    write_tar(other / "train" / "a.tar", files)
    with loading(other, "val", 1, workers=workers) as loader:
        batches = iter(loader)
        assert [next(batches).targets.tolist() for _ in range(2)] == [[0], [0]]
        with pytest.raises(ShardError) as raised:
            next(batches)
    assert str(raised.value) == (
        f"{other}/val/a.tar/a/0002.jpg: has class 7; classes.txt has 3 lines and "
        "data.first_label is 0"
    )


def test_hidden_files_and_fifos_beside_samples(shards) -> None:
    """macOS adds `._x.jpg` next to `x.jpg` to an archive."""
    expected = names(shards, "val")
    shard = shards / "val/val-001.tar"
    with tarfile.open(shard) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(shard, "w") as archive:
        for path, content in members:
            folder, _, name = path.rpartition("/")
            add(archive, f"{folder}/._{name}", content)
            add(archive, f"./{folder}/{name}", content)
    (shards / "val/.hidden.tar").write_bytes(b"no archive")
    assert names(shards, "val") == expected
    os.mkfifo(shards / "val/z.tar")
    message = r"z\.tar: not a readable tar file: a FIFO, not a regular"
    refused(ShardError, message, shards, "val")


def test_held_out_samples(shards) -> None:
    train, val = (names(shards, x, val_split=None, val_fraction=0.4) for x in ("train", "val"))
    assert all((train, val))
    assert sorted(train + val) == names(shards)
    message = r"data\.val_fraction: 1e-09 .* use a larger fraction"
    refused(ValueError, message, shards, "val", val_split=None, val_fraction=1e-9)
