"""Keys of batches, ranges of an epoch, and fingerprints of image sets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from featkd.data import EpochSampler
from featkd.data.factory import build_loader_for
from featkd.data.loader import as_tensor
from featkd.data.sampler import RangeSampler
from tests.data.conftest import MakeSet, spoil
from tests.data.loading import image_set, loading


@pytest.mark.usefixtures("backend")
def test_batches_have_their_keys(make_set: MakeSet) -> None:
    """In training an unreadable image keeps its key, and another image takes its place."""
    root = make_set(train=22, val=7)
    for number in (1, 2, 4):
        spoil(root / "train" / "class0" / f"00{number}.jpg", "text")
    spoil(root / "val" / "class0" / "001.jpg", "text")
    sampler = EpochSampler(22, training=True, seed=3)
    with loading(root, seed=3, on_bad_image="skip") as loader:
        for start in (0, 1):
            loader.set_epoch(5, start)
            sampler.set_epoch(5, 4 * start)
            upcoming = list(loader.upcoming())
            batches = list(loader)
            assert len(upcoming) == len(batches)
            assert all(map(torch.equal, upcoming, (batch.keys for batch in batches)))
            keys = torch.cat([batch.keys for batch in batches])
            assert keys.dtype == torch.int64
            assert torch.equal(keys, as_tensor(list(sampler))[: len(keys)])
            assert [len(batch.keys) for batch in batches] == [4] * (5 - start)
        assert loader.bad_images
    with loading(root, "val", on_bad_image="skip") as loader:
        assert torch.cat([batch.keys for batch in loader])[:, 1].tolist() == [0, 2, 3, 4, 5, 6]


def test_ranges_equal_those_of_the_whole_epoch(make_set: MakeSet, backend: str) -> None:
    root = make_set(train=22)
    with loading(root, batch_size=2, seed=3) as whole:
        whole.set_epoch(4)
        batches = list(whole)
        images = torch.cat([batch.images for batch in batches])
        keys = torch.cat([batch.keys for batch in batches])
        sampler = RangeSampler(22, repeats=1, seed=3)
        loader = build_loader_for(whole.dataset, sampler, batch_size=4, device="cpu")
    sampler.set_ranges(4, [range(4, 12), range(16, 22)])
    batches = list(loader)
    loader.close()
    taken = [*range(4, 12), *range(16, 22)]
    assert [len(batch.targets) for batch in batches] == [4, 4, 4, 2]
    assert torch.equal(torch.cat([batch.keys for batch in batches]), keys[taken])
    torch.testing.assert_close(torch.cat([batch.images for batch in batches]), images[taken])


def test_a_fingerprint_covers_names_sizes_classes_and_some_contents(
    make_set: MakeSet, tmp_path: Path
) -> None:
    root = make_set(train=6)

    before = image_set(root).fingerprint()
    moved = tmp_path / "moved"
    root.rename(moved)
    assert image_set(moved).fingerprint() == before
    image = moved / "train" / "class1" / "002.jpg"
    found = {before}
    content = image.read_bytes()
    image.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found.add(image_set(moved).fingerprint())
    with image.open("ab") as file:
        file.write(b"\0")
    found.add(image_set(moved).fingerprint())
    image.rename(image.with_name("2.jpg"))
    found.add(image_set(moved).fingerprint())
    os.symlink("nowhere.jpg", image)  # dangling, which the fingerprint must not fail on
    found.add(image_set(moved).fingerprint())
    (moved / "train" / "class2").rename(moved / "train" / "class3")
    found.add(image_set(moved).fingerprint())
    assert len(found) == 6
