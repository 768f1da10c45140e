"""Unreadable images are named, and raise an error or are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featkd.data import BadImageError
from tests.data.conftest import MakeSet, spoil
from tests.data.loading import loading, same

# ways to spoil a file, and workers
SPOILT = [(how, workers) for how in ("truncated", "empty", "text") for workers in (0, 2)]
SPOILT += [(how, 0) for how in ("no tables", "other tables", "no scan", "hole")]


def test_batches_without_a_readable_image_count(backend: str, make_set: MakeSet) -> None:
    """Evaluation skips them between other batches and at the end."""
    root = make_set(val=14)
    images = sorted((root / "val").rglob("*.jpg"))
    for number in (2, 3, 4, 5, 10, 11, 12, 13):
        spoil(images[number], "text")
    with loading(root, "val", 2, on_bad_image="skip") as loader:
        batches, states = [], []
        for batch in loader:
            batches.append(batch)
            states.append(loader.state_dict())
        assert [state["batch"] for state in states] == [1, 4, 5]
        assert loader.state_dict()["batch"] == len(loader) == 7
        assert len(loader.bad_images) == 8
    for done, state in enumerate(states, start=1):
        with loading(root, "val", 2, on_bad_image="skip") as other:
            other.load_state_dict(state)
            assert same(batches[done:], list(other))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("how", "workers"), SPOILT)
def test_a_bad_image_under_error(make_set: MakeSet, workers: int, how: str) -> None:
    root = make_set(val=8, classes=1)
    bad = root / "val/class0/005.jpg"
    content = bad.read_bytes()
    spoil(bad, how)
    with loading(root, "val", 2, workers=workers) as loader:
        batches = iter(loader)
        assert [len(next(batches).targets) for _ in range(2)] == [2, 2]
        with pytest.raises(BadImageError, match=f"cannot read image {bad}: ") as raised:
            next(batches)
        assert raised.value.path == str(bad)
        bad.write_bytes(content)
        assert len(list(loader)) == 4  # the workers are still running


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("how", "workers"), SPOILT)
def test_bad_images_under_skip(make_set: MakeSet, workers: int, how: str) -> None:
    root = make_set(train=8, val=9, classes=1)
    for name in ("train/class0/007", "val/class0/000", "val/class0/001", "val/class0/003"):
        spoil(root / f"{name}.jpg", how)
    skip: dict[str, Any] = {"on_bad_image": "skip", "workers": workers}
    with loading(root, "train", 4, **skip) as loader:
        for epoch in range(2):
            loader.set_epoch(epoch)
            batches = list(loader)
            assert [len(batch.targets) for batch in batches] == [4, 4]
            assert [path for batch in batches for path in batch.bad] == [
                str(root / "train/class0/007.jpg")
            ]
        assert list(loader.bad_images) == [str(root / "train/class0/007.jpg")]
        assert all(loader.bad_images.values())
    with loading(root, "val", 2, **skip) as loader:
        batches = list(loader)
        # The first batch has no readable image, so the next one lists its files.
        assert [len(batch.targets) for batch in batches] == [1, 2, 2, 1]
        names = [[Path(path).stem for path in batch.bad] for batch in batches]
        assert names == [["000", "001", "003"], [], [], []]
        assert len(loader.bad_images) == 3


@pytest.mark.usefixtures("backend")
def test_a_split_of_bad_images_gives_no_batch(make_set: MakeSet) -> None:
    root = make_set(val=3, classes=1)
    for path in (root / "val/class0").iterdir():
        spoil(path, "empty")
    with loading(root, "val", 2, on_bad_image="skip") as loader:
        assert list(loader) == []
        assert set(loader.bad_images.values()) == {"the file is empty"}
        assert len(loader.bad_images) == 3
