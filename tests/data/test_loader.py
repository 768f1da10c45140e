"""Batches are equal for any number of workers and ranks, and resumable."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featkd.data import AugmentConfig, Batch, build_loader
from tests.data.conftest import MakeSet
from tests.data.loading import DEFAULTS, Split, alive, config, loading, same


def pixels(batches: list[Batch]) -> list[bytes]:
    return [image.numpy().tobytes() for batch in batches for image in batch.images]


@pytest.mark.usefixtures("backend")
def test_a_batch(make_set: MakeSet) -> None:
    with loading(make_set(train=14)) as loader:
        batches = list(loader)
        assert len(loader) == len(batches) == 3  # the last, partial one is dropped
        assert loader.num_samples == 14
        assert loader.classes == ["class0", "class1", "class2"]
        for batch in batches:
            assert batch.images.shape == (4, 3, 16, 16)
            assert batch.images.dtype == torch.float32
            assert batch.images.is_contiguous()
            assert (batch.targets.shape, batch.targets.dtype) == ((4,), torch.int64)
            assert batch.bad == []


@pytest.mark.usefixtures("backend")
def test_evaluation_keeps_the_partial_batch(make_set: MakeSet) -> None:
    with loading(make_set(val=14), "val") as loader:
        assert len(loader) == 4
        assert [len(batch.targets) for batch in loader] == [4, 4, 4, 2]
        loader.set_epoch(9)
        targets = torch.cat([batch.targets for batch in loader]).tolist()
        assert targets == [0] * 5 + [1] * 5 + [2] * 4


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_number_of_workers_changes_nothing(make_set: MakeSet, split: Split) -> None:
    root = make_set(train=20, val=9)
    seen = []
    for workers in (0, 1, 2):
        with loading(root, split, workers=workers, seed=7) as loader:
            epochs = []
            for epoch in (0, 1, 0):
                loader.set_epoch(epoch)
                epochs.append(list(loader))
            assert same(epochs[0], epochs[2])
            assert same(epochs[0], epochs[1]) == (split == "val")
            seen.append(epochs[0] + epochs[1])
    assert same(seen[0], seen[1])
    assert same(seen[0], seen[2])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_number_of_ranks_changes_no_pixel(make_set: MakeSet, repeats: int) -> None:
    """All ranks together have equal augmented images for each world size."""
    root = make_set(train=16)
    augment = replace(DEFAULTS["augment"], repeats=repeats)
    unions = []
    for world_size in (1, 2, 4):
        images = []
        for rank in range(world_size):
            with loading(root, rank=rank, world_size=world_size, augment=augment) as loader:
                loader.set_epoch(3)
                images += pixels(list(loader))
        unions.append(sorted(images))
    assert len(unions[0]) == len(set(unions[0])) == 16
    assert unions[0] == unions[1] == unions[2]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_epoch_resumes_where_it_stopped(make_set: MakeSet, workers: int, split: Split) -> None:
    root = make_set(train=22, val=22)
    with loading(root, split, workers=workers) as loader:
        loader.set_epoch(5)
        whole = list(loader)
    with loading(root, split, workers=workers) as loader:
        for start in (2, len(whole), 0):
            loader.set_epoch(5, start_batch=start)
            assert same(list(loader), whole[start:])
            assert len(loader) == len(whole)
        loader.set_epoch(6, start_batch=1)
        assert len(list(loader)) == len(whole) - 1


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_is_the_next_batch(make_set: MakeSet, workers: int) -> None:
    """A new loader continues after each batch; batches prefetched by workers do not count."""
    with loading(make_set(train=22), workers=workers) as loader:
        loader.set_epoch(5)
        assert loader.state_dict()["batch"] == 0
        whole = list(loader)
        assert loader.state_dict()["batch"] == len(whole) == 5
        states = [loader.state_dict() for _ in loader]  # again, without set_epoch
        loader.set_epoch(7, 1)
        running = iter(loader)
        next(running)
        loader.set_epoch(8, 2)
        next(running)  # still of epoch 7
        assert loader.state_dict() == {
            "epoch": 8, "batch": 2, "batch_size": 4, "world_size": 1, "seed": 0, "repeats": 1,
            "shuffle_epoch": 8, "num_images": 22, "augmentation_version": 2,
        }  # fmt: skip
    assert [(state["epoch"], state["batch"]) for state in states] == [(5, k) for k in range(1, 6)]
    with loading(make_set(train=22)) as other:
        for given, state in enumerate(states, start=1):
            other.load_state_dict(state)
            assert other.state_dict() == state
            assert same(list(other), whole[given:])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_state_serves_other_batches_and_ranks(make_set: MakeSet, repeats: int) -> None:
    """12 images on 1 rank and the rest on 1, 2 or 3 ranks cover each image once."""
    root = make_set(train=36)
    augment = replace(DEFAULTS["augment"], repeats=repeats)
    with loading(root, augment=augment) as loader:
        loader.set_epoch(2)
        whole = pixels(list(loader))
        state = [loader.state_dict() for _ in loader][2]
    assert len(set(whole)) == 36
    for world_size, batch_size in ((1, 6), (1, 3), (2, 6), (3, 4), (2, 2)):
        rest: list[bytes] = []
        for rank in range(world_size):
            with loading(
                root, "train", batch_size, rank=rank, world_size=world_size, augment=augment
            ) as other:
                other.load_state_dict(state)
                assert other.state_dict()["batch"] == 12 // (world_size * batch_size)
                rest += pixels(list(other))
        assert sorted(rest) == sorted(whole[12:])


def test_a_state_of_another_order_is_refused(make_set: MakeSet) -> None:
    with loading(make_set(train=20)) as loader:
        state = [loader.state_dict() for _ in loader][2]
        for name, value in (("num_images", 21), ("seed", 1), ("repeats", 3)):
            with pytest.raises(ValueError, match=f"{name}: {value} when .* epoch 0, now .* expect"):
                loader.load_state_dict({**state, name: value})
            loader.load_state_dict({**state, name: value, "batch": 0, "epoch": 3})  # allowed
            assert loader.state_dict()["epoch"] == 3
    message = r"after 12 images .* batches of 8 on 1 ranks; .* divide 12"
    with loading(make_set(train=20), "train", 8) as other, pytest.raises(ValueError, match=message):
        other.load_state_dict(state)


def test_an_epoch_in_another_order_is_refused(make_set: MakeSet) -> None:
    """Within an epoch, from a run without views to one that repeats the order of view 0."""
    root, augment = make_set(train=20), replace(DEFAULTS["augment"], repeats=3)
    with loading(root, augment=augment) as plain, loading(root, augment=augment, views=1) as other:
        plain.set_epoch(0, 1)
        other.load_state_dict(plain.state_dict())
        plain.set_epoch(1, 1)
        with pytest.raises(ValueError, match="shuffle_epoch: 1 when"):
            other.load_state_dict(plain.state_dict())


def test_states_of_older_versions_are_read(make_set: MakeSet) -> None:
    """They name the shuffle epoch "ordered_as", or lack it."""
    augment = replace(DEFAULTS["augment"], repeats=3)
    with loading(make_set(train=20), augment=augment, views=2) as loader:
        loader.set_epoch(3, 1)
        state = loader.state_dict()
        assert state.pop("shuffle_epoch") == 1
        loader.set_epoch(0)
        loader.load_state_dict({**state, "ordered_as": 1})
        assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (3, 1)
        for older, stored in (({**state, "ordered_as": 0}, 0), (state, 3)):
            with pytest.raises(ValueError, match=f"shuffle_epoch: {stored} when .* now 1"):
                loader.load_state_dict(older)


@pytest.mark.usefixtures("backend")
def test_evaluation_counts_each_image_once(make_set: MakeSet) -> None:
    """There are more ranks than images, so some have no batch."""
    root = make_set(val=5, classes=5)
    targets = []
    for rank in range(7):
        with loading(root, "val", 2, rank=rank, world_size=7) as loader:
            batches = list(loader)
            assert len(batches) == len(loader)
            targets += [target for batch in batches for target in batch.targets.tolist()]
    assert sorted(targets) == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generators_are_unchanged(make_set: MakeSet, workers: int) -> None:
    def states() -> tuple[Any, str, Tensor]:
        return random.getstate(), repr(np.random.get_state()), torch.get_rng_state()

    jitter = {"augment": AugmentConfig(rand_augment=None, color_jitter=0.4), "backend": "timm"}
    for options in ({}, jitter):
        with loading(make_set(), workers=workers, **options) as loader:
            before = states()
            for epoch in range(2):
                loader.set_epoch(epoch)
                list(loader)
            after = states()
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])


@pytest.mark.usefixtures("backend")
def test_break_and_restart(make_set: MakeSet) -> None:
    with loading(make_set(train=40), workers=2) as loader:
        whole = list(loader)
        pids = alive()
        for stop in (1, 3):
            for number, batch in enumerate(loader, start=1):
                if number == stop:
                    assert same([batch], [whole[stop - 1]])
                    break
        assert same(list(loader), whole)
        assert alive() == pids  # the same workers
        loader.set_epoch(1)
        assert not same(list(loader), whole)


@pytest.mark.usefixtures("backend")
def test_an_older_iterator_ends_and_leaves_the_newer_one_alone(make_set: MakeSet) -> None:
    with loading(make_set(train=40), workers=1) as loader:
        whole = list(loader)
        late, newer = iter(loader), iter(loader)
        first = next(newer)
        with pytest.raises(RuntimeError, match="a newer iteration of this loader has begun"):
            next(late)
        assert same([first, *newer], whole)
        begun = iter(loader)
        next(begun)
        newer = iter(loader)
        with pytest.raises(RuntimeError, match="a newer iteration of this loader has begun"):
            next(begun)
        assert same(list(newer), whole)


def test_errors(make_set: MakeSet) -> None:
    root = make_set(train=12)
    for message, options in (
        ("split: expected train or val, got 'test'", {"split": "test"}),
        ("batch_size: expected >= 1, got 0", {"batch_size": 0}),
        (
            r"batch_size: expected at most 12, .*\(12 training images in .*; got 13",
            {"batch_size": 13},
        ),
        (
            r"batch_size: expected at most 6, .* per process .*, 2 processes\); got 8",
            {"batch_size": 8, "world_size": 2},
        ),
        ("rank: expected 0 <= rank < world_size = 2, got 2", {"rank": 2, "world_size": 2}),
        ("seed: ", {"seed": -1}),
    ):
        with pytest.raises(ValueError, match=message):
            build_loader(config(root), **{"split": "train", "batch_size": 4, **options})
    with loading(root) as loader:
        for start in (-1, 4):
            with pytest.raises(ValueError, match=rf"start_batch: expected 0\.\.3, got {start}"):
                loader.set_epoch(0, start)
        with pytest.raises(ValueError, match="epoch: expected >= 0, got -1"):
            loader.set_epoch(-1)
