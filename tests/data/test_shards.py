"""Tar shards return the same images and classes as the folders that they were made from."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from featkd.data import AugmentConfig, BadImageError, DataConfig, ImageSet, SampleKey, build_loader
from featkd.data.shards import ShardError
from tests.data.conftest import MakeSet

PLAIN = AugmentConfig(rand_augment=None, repeats=1)


def write_tar(path: Path, files: list[tuple[Path, int]]) -> None:
    labels = path.parent / "labels"
    labels.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, (file, target) in enumerate(files):
            label = labels / "x.cls"
            label.write_text(f"{target}\n")
            archive.add(file, f"{path.stem}/{number:04d}.jpg")
            archive.add(label, f"{path.stem}/{number:04d}.cls")


@pytest.fixture
def both(make_set: MakeSet, tmp_path: Path) -> tuple[Path, Path]:
    """Root of a set in class folders, and of an empty set with the same classes."""
    root = make_set(train=12, val=5)
    other = tmp_path / "shards"
    for split in ("train", "val"):
        (other / split).mkdir(parents=True)
    (other / "classes.txt").write_text("class0\nclass1\nclass2\n")
    return root, other


def files_of(root: Path, split: str) -> list[tuple[Path, int]]:
    dataset = ImageSet(DataConfig(str(root), img_size=8), split)  # type: ignore[arg-type]
    classes = dataset.classes
    names = [Path(dataset.name(i)) for i in range(len(dataset))]
    return [(name, classes.index(name.parent.name)) for name in names]


def fill(root: Path, other: Path) -> None:
    for split in ("train", "val"):
        files = files_of(root, split)
        for number, part in enumerate((files[:3], files[3:])):
            write_tar(other / split / f"{split}-{number:03d}.tar", part)


@pytest.mark.parametrize("backend", ["timm", "dali"])
def test_batches_equal_those_of_the_folders(both, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    root, other = both
    fill(root, other)
    config = DataConfig(str(root), img_size=16, workers=0, augment=PLAIN, backend=backend)
    for split in ("train", "val"):
        loaders = [
            build_loader(c, split=split, batch_size=3)
            for c in (config, replace(config, path=str(other)))
        ]
        assert loaders[0].classes == loaders[1].classes
        for ours, theirs in zip(*loaders, strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.targets, theirs.targets)
        for loader in loaders:
            loader.close()


def test_dalis_index_files_are_used(both):
    """The tar headers are damaged, so only the index can locate the samples."""
    pytest.importorskip("nvidia.dali")
    root, other = both
    fill(root, other)
    config = DataConfig(str(other), img_size=8)
    expected = [ImageSet(config, "val")[SampleKey(0, i, 0)] for i in range(5)]
    tool = Path(sys.executable).parent / "wds2idx"
    for shard in sorted((other / "val").glob("*.tar")):
        index = shard.with_suffix(".idx")
        subprocess.run([sys.executable, tool, shard, index], check=True, capture_output=True)
        content = bytearray(shard.read_bytes())
        content[:8] = b"\xff" * 8
        shard.write_bytes(content)
    dataset = ImageSet(config, "val")
    for number, sample in enumerate(expected):
        found = dataset[SampleKey(0, number, 0)]
        assert torch.equal(found.image, sample.image)
        assert found.target == sample.target


def test_bad_images_in_shards_are_named(both):
    root, other = both
    fill(root, other)
    config = DataConfig(str(other), img_size=8)
    shard = other / "val" / "val-001.tar"
    content = shard.read_bytes()
    with tarfile.open(shard) as archive:
        place = archive.getmember("val-001/0001.jpg").offset_data
    shard.write_bytes(content[:place] + b"no image" + content[place + 8 :])
    with pytest.raises(BadImageError, match=r"val-001/0001.jpg: no image of a supported format"):
        ImageSet(config, "val")[SampleKey(0, 4, 0)]
    dataset = ImageSet(config, "val")
    shard.write_bytes(content[: place + 10])
    with pytest.raises(BadImageError, match=r"0001.jpg: the shard ends \d+ bytes before it does"):
        dataset[SampleKey(0, 4, 0)]
    skipped = ImageSet(replace(config, on_bad_image="skip"), "train")
    assert len(skipped) == 12
    with pytest.raises(ShardError, match=r"val-001.tar: not a readable tar file"):
        ImageSet(config, "val")


def test_labels_count_from_first_label(both):
    root, other = both
    files = files_of(root, "val")
    write_tar(other / "val" / "a.tar", [(file, target + 1) for file, target in files])
    dataset = ImageSet(DataConfig(str(other), img_size=8, first_label=1), "val")
    assert [dataset[SampleKey(0, i, 0)].target for i in range(5)] == [target for _, target in files]


def test_unusable_shards_are_refused_by_name(both):
    root, other = both
    fill(root, other)
    config = DataConfig(str(other), img_size=8)

    with pytest.raises(ShardError, match=r"has class 0; classes.txt has 3 lines.*first_label is 5"):
        ImageSet(replace(config, first_label=5), "val")[SampleKey(0, 0, 0)]
    (other / "classes.txt").write_text("a\na\n")
    with pytest.raises(
        ShardError, match=r"classes.txt: expected one class name per line, each once"
    ):
        ImageSet(config, "val")
    (other / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*classes.txt; shards need one"):
        ImageSet(config, "val")
    (other / "classes.txt").write_text("a\nb\nc\n")

    with tarfile.open(other / "train" / "b.tar", "w") as archive:
        archive.add(files_of(root, "val")[0][0], "b/0.jpg")
    with pytest.raises(
        ShardError, match=r"train/b.tar: expected one image and one .cls per sample"
    ):
        ImageSet(config, "train")
    (other / "train" / "b.idx").write_text("v1.1 1\njpg 512 3\n")
    with pytest.raises(ShardError, match=r"b.idx: expected a wds2idx index of version v1.2"):
        ImageSet(config, "train")
    (other / "train" / "b.idx").unlink()
    write_tar(other / "train" / "b.tar", [])
    label = other / "train" / "labels" / "x.cls"
    label.write_text("one")
    with tarfile.open(other / "train" / "b.tar", "w") as archive:
        archive.add(files_of(root, "val")[0][0], "b/0.jpg")
        archive.add(label, "b/0.cls")
    dataset = ImageSet(config, "train")
    with pytest.raises(
        ShardError, match=r"b.tar/b/0.jpg: expected a number as its .cls, got b'one'"
    ):
        dataset[SampleKey(0, 0, 0)]


def test_an_index_of_another_archive_is_refused(both):
    root, other = both
    shard = other / "val" / "a.tar"
    write_tar(shard, files_of(root, "val"))
    config = DataConfig(str(other), img_size=8)
    lines = []
    with tarfile.open(shard) as archive:
        members = archive.getmembers()
    for pair in zip(members[::2], members[1::2], strict=True):
        words = [(m.name[-3:], m.offset_data, m.size, m.name) for m in pair]
        lines.append(" ".join(str(word) for part in words for word in part) + "\n")
    index = shard.with_suffix(".idx")
    index.write_text("".join(["v1.2 5\n", *lines]))
    assert len(ImageSet(config, "val")) == 5
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
        with pytest.raises(ShardError, match=message):
            ImageSet(config, "val")


def test_a_duplicate_name_is_refused(both):
    """`tar --append` leaves both files in the archive, and either could be meant."""
    root, other = both
    files = files_of(root, "val")
    shard = other / "val" / "a.tar"
    write_tar(shard, files)
    label = other / "val" / "labels" / "x.cls"
    with tarfile.open(shard, "a") as archive:
        archive.add(files[0][0], "a/0001.jpg")
        archive.add(label, "a/0001.cls")
    config = DataConfig(str(other), img_size=8)
    with pytest.raises(ShardError, match=r"a.tar: has a/0001.jpg twice, at bytes \d+ and \d+; exp"):
        ImageSet(config, "val")
    with tarfile.open(shard, "w") as archive:
        for name in ("b.jpg", "b.cls", "b.jpg"):
            archive.add(label if name == "b.cls" else files[0][0], name)
    with pytest.raises(ShardError, match=r"one .cls per sample, found b.jpg, b.cls, b.jpg"):
        ImageSet(config, "val")


def test_shards_without_an_image_are_refused(both):
    _, other = both
    with tarfile.open(other / "train" / "a.tar", "w"):
        pass
    with pytest.raises(ShardError, match=r"train: no image in its 1 shards"):
        ImageSet(DataConfig(str(other), img_size=8), "train")


@pytest.mark.parametrize(("backend", "workers"), [("timm", 0), ("timm", 1), ("dali", 1)])
def test_an_error_in_a_shard_reads_the_same_from_any_loader(both, backend, workers):
    """From a worker too: without the worker's traceback, and after the preceding batches."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    root, other = both
    files = files_of(root, "val")
    write_tar(other / "val" / "a.tar", [*files[:2], (files[2][0], 7)])
    write_tar(other / "train" / "a.tar", files)
    config = DataConfig(str(other), img_size=8, workers=workers, backend=backend)
    loader = build_loader(config, split="val", batch_size=1)
    batches = iter(loader)
    assert [next(batches).targets.tolist() for _ in range(2)] == [[0], [0]]
    with pytest.raises(ShardError) as raised:
        next(batches)
    loader.close()
    assert str(raised.value) == (
        f"{other}/val/a.tar/a/0002.jpg: has class 7; classes.txt has 3 lines and "
        "data.first_label is 0"
    )


def test_hidden_files_and_fifos_beside_samples(both: tuple[Path, Path]) -> None:
    """macOS adds `._x.jpg` next to `x.jpg` to an archive."""
    root, other = both
    fill(root, other)
    config = DataConfig(str(other), img_size=8)
    expected = ImageSet(config, "val")
    names = [expected.name(index) for index in range(len(expected))]
    shard = other / "val/val-001.tar"
    with tarfile.open(shard) as archive:
        members = [(m, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as archive:
        for member, content in members:
            folder, _, name = member.name.rpartition("/")
            for stored in (f"{folder}/._{name}", f"./{folder}/{name}"):
                member.name = stored
                archive.addfile(member, io.BytesIO(content))
    (other / "val/.hidden.tar").write_bytes(b"no archive")
    again = ImageSet(config, "val")
    assert [again.name(index).replace("/./", "/") for index in range(len(again))] == names
    os.mkfifo(other / "val/z.tar")
    with pytest.raises(ShardError, match=r"z\.tar: not a readable tar file: a FIFO, not a regular"):
        ImageSet(config, "val")


def test_held_out_samples(both: tuple[Path, Path]) -> None:
    root, other = both
    fill(root, other)
    held = DataConfig(str(other), img_size=8, val_split=None, val_fraction=0.4)
    both_splits = []
    for split in ("train", "val"):
        dataset = ImageSet(held, split)  # type: ignore[arg-type]
        both_splits.append({dataset.name(index) for index in range(len(dataset))})
    assert all(both_splits)
    assert len(both_splits[0]) + len(both_splits[1]) == len(both_splits[0] | both_splits[1]) == 12
    with pytest.raises(ValueError, match=r"data\.val_fraction: 1e-09 .* use a larger fraction"):
        ImageSet(replace(held, val_fraction=1e-9), "val")
