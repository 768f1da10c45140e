"""Keys of batches, ranges of an epoch, and fingerprints of image sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from featkd.data import AugmentConfig, DataConfig, EpochSampler, ImageSet, build_loader
from featkd.data.factory import build_loader_for
from featkd.data.loader import as_tensor
from featkd.data.sampler import RangeSampler
from tests.data.conftest import MakeSet

Spoil = Callable[[Path, str], None]


@pytest.fixture(params=["timm", "dali"])
def config(request: pytest.FixtureRequest) -> Callable[..., DataConfig]:
    """config(root, **fields) for each loader."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    augment = AugmentConfig(rand_augment=None, repeats=1)

    def make(root: Path, **fields: Any) -> DataConfig:
        fields = {"img_size": 16, "workers": 0, "augment": augment, **fields}
        return DataConfig(str(root), backend=request.param, **fields)

    return make


def test_batches_have_their_keys(make_set: MakeSet, spoil: Spoil, config) -> None:
    """In training an unreadable image keeps its key, and another image takes its place."""
    root = make_set(train=22, val=7)
    for number in (1, 2, 4):
        spoil(root / "train" / "class0" / f"00{number}.jpg", "text")
    spoil(root / "val" / "class0" / "001.jpg", "text")
    options = config(root, on_bad_image="skip")
    loader = build_loader(options, split="train", batch_size=4, seed=3)
    sampler = EpochSampler(22, training=True, seed=3)
    for start in (0, 1):
        loader.set_epoch(5, start)
        sampler.set_epoch(5, 4 * start)
        batches = list(loader)
        keys = torch.cat([batch.keys for batch in batches])
        assert keys.dtype == torch.int64
        assert torch.equal(keys, as_tensor(list(sampler))[: len(keys)])
        assert [len(batch.keys) for batch in batches] == [4] * (5 - start)
    loader.close()
    assert loader.bad_images
    loader = build_loader(options, split="val", batch_size=4)
    assert torch.cat([batch.keys for batch in loader])[:, 1].tolist() == [0, 2, 3, 4, 5, 6]
    loader.close()


def test_ranges_equal_those_of_the_whole_epoch(make_set: MakeSet, config) -> None:
    root = make_set(train=22)
    options = config(root)
    whole = build_loader(options, split="train", batch_size=2, seed=3)
    whole.set_epoch(4)
    images = torch.cat([batch.images for batch in whole])
    keys = torch.cat([batch.keys for batch in whole])
    whole.close()
    sampler = RangeSampler(22, repeats=1, seed=3)
    loader = build_loader_for(
        ImageSet(options, "train", 3), sampler, batch_size=4, device=torch.device("cpu")
    )
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

    def fingerprint(folder: Path) -> str:
        return ImageSet(DataConfig(str(folder)), "train").fingerprint()

    before = fingerprint(root)
    moved = tmp_path / "moved"
    root.rename(moved)
    assert fingerprint(moved) == before
    image = moved / "train" / "class1" / "002.jpg"
    found = {before}
    content = image.read_bytes()
    image.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found.add(fingerprint(moved))
    with image.open("ab") as file:
        file.write(b"\0")
    found.add(fingerprint(moved))
    image.rename(image.with_name("2.jpg"))
    found.add(fingerprint(moved))
    os.symlink("nowhere.jpg", image)  # dangling, which the fingerprint must not fail on
    found.add(fingerprint(moved))
    (moved / "train" / "class2").rename(moved / "train" / "class3")
    found.add(fingerprint(moved))
    assert len(found) == 6
