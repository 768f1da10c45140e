"""Augmentation parameters: timm's distributions, and draws that depend only on seed and key."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import auto_augment
from timm.data.auto_augment import LEVEL_TO_ARG
from timm.data.transforms import RandomResizedCropAndInterpolation

from featkd.data import AugmentConfig, DataConfig
from featkd.data.augment_params import AugmentParamSampler
from featkd.data.rand_augment import _ARGUMENTS, OPERATIONS, timm_rand_augment

COUNT = 4000
KEYS = np.array([(epoch, image, 0) for epoch in range(2) for image in range(COUNT // 2)])
PLAIN = AugmentConfig(rand_augment=None, repeats=1)


def distance(first: Any, second: Any) -> float:
    """Largest difference of two empirical distribution functions, 1 at its 0.1 % point."""
    first, second = np.sort(first), np.sort(second)
    values = np.concatenate((first, second))
    shares = [np.searchsorted(x, values, "right") / len(x) for x in (first, second)]
    limit = 1.95 * (1 / len(first) + 1 / len(second)) ** 0.5
    return float(np.abs(shares[0] - shares[1]).max() / limit)


def timms_crops(size: tuple[int, int], augment: AugmentConfig) -> np.ndarray[Any, Any]:
    image = torch.empty(1).expand(1, size[1], size[0])
    draw = RandomResizedCropAndInterpolation.get_params
    random.seed(1)
    return np.array([draw(image, augment.scale, augment.ratio) for _ in range(COUNT)])


@pytest.mark.parametrize(
    ("size", "augment"),
    [
        ((500, 375), PLAIN),
        ((375, 500), replace(PLAIN, scale=(0.3, 0.6), ratio=(0.5, 1.5))),
        ((60, 300), PLAIN),  # no window fits in 2 % of the images
        ((300, 60), replace(PLAIN, scale=(0.6, 1.0))),  # no window fits at all
        ((9, 7), PLAIN),
    ],
    ids=str,
)
def test_windows_are_distributed_as_timms(size: tuple[int, int], augment: AugmentConfig) -> None:
    sampler = AugmentParamSampler(DataConfig(augment=augment), seed=3)
    params = sampler.sample(np.tile(size, (COUNT, 1)), KEYS)
    ours, theirs = params.source_box.astype(float), timms_crops(size, augment).astype(float)
    top, left, height, width = ours.T
    assert min(height.min(), width.min()) >= 1
    assert min(top.min(), left.min()) >= 0
    assert (top + height).max() <= size[1]
    assert (left + width).max() <= size[0]
    for measure in (
        *(partial(np.take, indices=column, axis=1) for column in range(4)),
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] / np.maximum(1, size[1] - box[:, 2]),
    ):
        assert distance(measure(ours), measure(theirs)) < 1


@pytest.mark.parametrize("hflip", [0.0, 0.2, 1.0])
def test_flips_have_their_probability(hflip: float) -> None:
    sampler = AugmentParamSampler(DataConfig(augment=replace(PLAIN, hflip=hflip)), seed=0)
    flips = sampler.sample(np.full((COUNT, 2), 8), KEYS).flip
    assert abs(flips.mean() - hflip) <= 4 * (hflip * (1 - hflip) / COUNT) ** 0.5


def timms_operations(config: DataConfig) -> Iterator[list[tuple[str, float]]]:
    """Operations that timm applies to an image, and their arguments."""
    transform = timm_rand_augment(config)
    done: list[tuple[str, float]] = []

    def recorder(name: str) -> Any:
        return lambda image, *arguments, **_: done.append((name, *arguments, 0)[:2])

    for op in transform.ops:
        op.aug_fn = recorder(op.name.removesuffix("Increasing"))
    random.seed(2)
    np.random.seed(2)
    for _ in range(COUNT):
        done.clear()
        transform(None)
        yield list(done)


@pytest.mark.parametrize(
    "form",
    [
        "rand-m9-n2-mstd0.5-inc1",
        "rand-m6-n3-p0.8-mstd2-mmax8",
        "rand-m7-n1-p1",
        "rand-m10-mstd101-inc1",  # magnitudes uniform from 0 to 10
        "rand-n2-mstd1-tweights",
        "rand-m9-n3-mstd0.5-t3aw",
        "rand-m9-mstd0.5-t3a",
        "rand-n0",
    ],
)
def test_operations_are_distributed_as_timms(form: str) -> None:
    config = DataConfig(augment=replace(PLAIN, rand_augment=form))
    params = AugmentParamSampler(config, seed=5).sample(np.full((COUNT, 2), 300), KEYS)
    ours = [
        [(OPERATIONS[op], value) for op, value in zip(*row, strict=True) if op >= 0]
        for row in zip(params.ops.tolist(), params.arguments.tolist(), strict=True)
    ]
    theirs = list(timms_operations(config))
    for kind in (
        lambda done: len(done),
        lambda done: tuple(name for name, _ in done[:1]),
        lambda done: tuple(name for name, _ in done[-1:]),
        lambda done: len({name for name, _ in done}),
    ):
        counts = [Counter(map(kind, every)) for every in (ours, theirs)]
        for each in counts[0] | counts[1]:
            apart = abs(counts[0][each] - counts[1][each])
            assert apart <= 4.5 * (counts[0][each] + counts[1][each] + 1) ** 0.5, each
    found, expected = (
        {name: [v for done in every for n, v in done if n == name] for name in OPERATIONS}
        for every in (ours, theirs)
    )
    for name in OPERATIONS:
        if len(expected[name]) > 20:
            assert distance(found[name], expected[name]) < 1, name


@pytest.mark.parametrize("name", _ARGUMENTS)
def test_arguments_equal_timms_at_every_level(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = np.concatenate((np.linspace(0, 10, 201), (1e-9, 2.5, 7.5, 9.9999, 13.0, 30.0)))
    for number, sign in ((0.2, 1.0), (0.8, -1.0)):
        monkeypatch.setattr(random, "random", lambda number=number: number)
        function = LEVEL_TO_ARG[name]
        theirs = [0.0 if function is None else function(x, {})[0] for x in levels]
        ours = _ARGUMENTS[name](levels / 10, np.full_like(levels, sign))
        if name.startswith(("Posterize", "Solarize")):
            assert np.clip(ours, 0, None).tolist() == np.clip(theirs, 0, None).tolist()
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-14, atol=1e-14)


def test_parameters_depend_only_on_seed_and_key() -> None:
    """Alone, in any order and beside other images, bit for bit."""
    config = DataConfig(augment=AugmentConfig(rand_augment="rand-m9-n3-mstd0.5-inc1"))
    sampler = AugmentParamSampler(config, seed=7)
    rng = np.random.default_rng(0)
    keys, sizes = KEYS[:300], rng.integers(200, 600, (300, 2))
    together = sampler.sample(sizes, keys)
    for number in range(0, 300, 7):
        alone = sampler.sample(sizes[number : number + 1], keys[number : number + 1])
        assert all((a[0] == b[number]).all() for a, b in zip(alone, together, strict=True))
    order = rng.permutation(300)
    shuffled = AugmentParamSampler(config, seed=7).sample(sizes[order], keys[order])
    assert all((a == b[order]).all() for a, b in zip(shuffled, together, strict=True))
    # of another seed, epoch, image or copy
    for seed, change in ((8, (0, 0, 0)), (7, (1, 0, 0)), (7, (0, 500, 0)), (7, (0, 0, 1))):
        other = AugmentParamSampler(config, seed).sample(sizes, keys + change)
        assert (other.source_box == together.source_box).all(1).mean() < 0.1
        assert abs((other.flip == together.flip).mean() - 0.5) < 0.15
        assert (other.ops == together.ops).mean() < 0.4  # a quarter are both skipped


def test_layers_are_independent() -> None:
    """Every ordered pair of operations occurs about as often as any other."""
    config = DataConfig(augment=AugmentConfig(rand_augment="rand-m9-n2-p1"))
    params = AugmentParamSampler(config, seed=1).sample(np.full((COUNT, 2), 300), KEYS)
    pairs = Counter(map(tuple, params.ops.tolist()))
    expected = COUNT / 225
    square = sum((count - expected) ** 2 / expected for count in pairs.values())
    assert abs(square - 224) < 5 * (2 * 224) ** 0.5
    orders = Counter(tuple(np.argsort(row)) for row in params.arguments)
    assert set(orders) == set(permutations(range(2)))


def test_more_weighted_operations_than_there_are_are_refused() -> None:
    config = DataConfig(augment=replace(PLAIN, rand_augment="rand-n16-tweights"))
    with pytest.raises(ValueError, match=r"rand_augment: n16 .* 15 operations; .* at most n15"):
        AugmentParamSampler(config, 0)


def test_operations_of_a_later_timm_are_refused_only_if_they_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(auto_augment.NAME_TO_OP, "Later", None)
    monkeypatch.setitem(LEVEL_TO_ARG, "Later", None)
    monkeypatch.setattr(auto_augment, "_RAND_TRANSFORMS", [*auto_augment._RAND_TRANSFORMS, "Later"])
    chosen = DataConfig(augment=replace(PLAIN, rand_augment="rand-m9"))
    with pytest.raises(ValueError, match=r"from Later, which featkd .* know; .*; set it to null"):
        AugmentParamSampler(chosen, 0)
    sampler = AugmentParamSampler(DataConfig(augment=PLAIN), 0)
    assert sampler.op_names == []
    assert sampler.sample(np.full((4, 2), 300), KEYS[:4]).ops.shape == (4, 0)
