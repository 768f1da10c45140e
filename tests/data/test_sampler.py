"""Order of keys: each image once, resumable, repeats spread over ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler

from featkd.data import EpochSampler, SampleKey

sizes = st.one_of(st.integers(1, 60), st.integers(250, 530))


def all_ranks(n: int, world: int, epoch: int = 0, **options: Any) -> list[list[SampleKey]]:
    ranks = []
    for rank in range(world):
        sampler = EpochSampler(n, rank=rank, world_size=world, **options)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    return ranks


def interleaved(ranks: list[list[SampleKey]]) -> list[SampleKey]:
    """Returns the common sequence of positions, from ranks of equal length."""
    return [key for step in zip(*ranks, strict=True) for key in step]


@given(n=sizes, world=st.integers(1, 9), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 500))
@settings(max_examples=60, deadline=None)
def test_training_sees_every_image_once(n: int, world: int, seed: int, epoch: int) -> None:
    keys = interleaved(all_ranks(n, world, epoch, training=True, seed=seed))
    assert sorted(key.image for key in keys if key.copy == 0) == list(range(n))
    assert len(set(keys)) == len(keys)  # padding adds new copies, augmented differently
    assert len(keys) - n < world
    assert {key.epoch for key in keys} == {epoch}


@given(n=sizes, world=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_evaluation_counts_every_image_once(n: int, world: int) -> None:
    ranks = all_ranks(n, world, training=False)
    assert sorted(key.image for rank in ranks for key in rank) == list(range(n))
    assert all(rank == sorted(rank) for rank in ranks)
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@given(n=sizes, world=st.integers(1, 9), repeats=st.integers(2, 4), epoch=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_repeated_augmentation_equals_deits(n: int, world: int, repeats: int, epoch: int) -> None:
    ranks = all_ranks(n, world, epoch, training=True, repeats=repeats, seed=3)
    keys = interleaved(ranks)
    assert len(set(keys)) == len(keys)
    published = RepeatAugSampler(range(n), num_replicas=world, rank=0, num_repeats=repeats)
    assert len(ranks[0]) == len(published)
    if n >= 256:
        assert len(ranks[0]) == n // 256 * 256 // world
    # each image `repeats` times in a row, in a shuffled order
    order = [key.image for key in keys[::repeats]]
    expected = np.repeat(order, repeats)[: len(keys)]
    assert [key.image for key in keys] == expected.tolist()
    assert [key.copy % repeats for key in keys] == [i % repeats for i in range(len(keys))]
    assert len(set(order[:n])) == len(order[:n])


@pytest.mark.parametrize("options", [{"training": True}, {"training": True, "repeats": 3}])
def test_world_sizes_share_one_sequence(options: dict[str, Any]) -> None:
    alone = interleaved(all_ranks(512, 1, **options))
    for world in (2, 4, 8):
        assert interleaved(all_ranks(512, world, **options)) == alone


@given(
    n=sizes,
    world=st.integers(1, 4),
    repeats=st.integers(1, 3),
    data=st.data(),
    training=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_late_start_yields_the_rest(
    n: int, world: int, repeats: int, data: st.DataObject, training: bool
) -> None:
    options: dict[str, Any] = {"training": training, "repeats": repeats if training else 1}
    whole = all_ranks(n, world, 7, **options)[0]
    start = data.draw(st.integers(0, len(whole)))
    sampler = EpochSampler(n, world_size=world, **options)
    sampler.set_epoch(7, start)
    assert list(sampler) == whole[start:]
    assert len(sampler) == len(whole)


def test_order_depends_only_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [key.image for key in all_ranks(40, 1, epoch, training=True, seed=seed)[0]]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert order(1, 1) == orders[3]
    assert orders[0] != list(range(40))


def test_cycled_epochs_have_the_pixels_of_a_view_in_another_order() -> None:
    """With repeats, in the order of the view: another order would have other images."""

    def keys(epoch: int, **options: Any) -> list[SampleKey]:
        return all_ranks(48, 1, epoch, training=True, **options)[0]

    assert keys(1, views=2) == keys(1)
    third, first = keys(2, views=2), keys(0)
    assert third != first
    assert sorted(third) == sorted(first)
    assert [key.image for key in third] == [key.image for key in keys(2)]
    assert keys(2, views=2, repeats=3) == keys(0, repeats=3)


def test_an_iterator_keeps_its_epoch() -> None:
    sampler = EpochSampler(5, training=False)
    running = iter(sampler)
    sampler.set_epoch(1)
    assert {key.epoch for key in running} == {0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "num_images: expected >= 1, got 0"),
        ({"world_size": 0}, "world_size: expected >= 1, got 0"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 <= rank < world_size = 2, got 2"),
        ({"rank": -1}, "rank: .*, got -1"),
        ({"repeats": 0}, "repeats: expected a whole number >= 1, got 0"),
        ({"repeats": 2, "training": False}, "repeats: expected 1 in evaluation, got 2"),
        ({"seed": -1}, "seed: .*, got -1"),
        ({"seed": 2**63}, "seed: "),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochSampler(**{"num_images": 4, "training": True, **options})


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 5)])
def test_set_epoch_errors(epoch: int, start: int) -> None:
    with pytest.raises(ValueError, match=r"epoch: .*-1|start: expected 0 <= start <= 4, got"):
        EpochSampler(4, training=True).set_epoch(epoch, start)
