"""Random erasing: timm's boxes, normal noise, and pixels that depend only on seed and key."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing

from featkd.data.draws import uniforms
from featkd.data.erasing import Eraser

KEYS = np.stack([np.zeros(300), np.arange(300), np.arange(300) % 3], axis=1).astype(np.int64)


class GivenNumbers:
    """Stands for Python's `random` in timm; the tries end with the numbers of the corner."""

    def __init__(self, drawn: np.ndarray[Any, Any]) -> None:
        self._first = float(drawn[0])
        self._corner = iter(drawn[2:4].tolist())
        self._tries: Iterator[float] = chain(*zip(drawn[4:14], drawn[14:], strict=True))

    def random(self) -> float:
        return self._first

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(next(self._tries))

    def randint(self, low: int, high: int) -> int:
        return low + int(next(self._corner) * (high - low + 1))


@pytest.mark.parametrize("probability", [0.25, 1.0])
@pytest.mark.parametrize("side", [224, 16, 3, 1])
def test_boxes_equal_timms_for_the_same_numbers(
    side: int, probability: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tiny images some or all of the ten tries are as large as the image."""
    boxes = Eraser(probability, side, seed=5).boxes(KEYS)
    assert boxes.dtype == np.int32
    timms = RandomErasing(probability, mode="pixel", device="cpu")
    drawn = uniforms(5, KEYS, 24, purpose="erase")
    for numbers, (top, left, height, width, _) in zip(drawn, boxes.tolist(), strict=True):
        monkeypatch.setattr("timm.data.random_erasing.random", GivenNumbers(numbers))
        erased = timms(torch.full((3, side, side), math.inf)).isfinite()
        ours = torch.zeros_like(erased)
        if height:
            ours[:, top : top + height, left : left + width] = True
        assert torch.equal(erased, ours)
    share = np.mean(boxes[:, 2] > 0)
    if side > 3:
        assert abs(share - probability) <= 4 * (probability * (1 - probability) / len(KEYS)) ** 0.5
    elif side == 1:
        assert share == 0


def test_noise_is_normal() -> None:
    noise = Eraser(1.0, 64, seed=2).noise()
    assert noise.dtype == torch.float32
    assert len(noise) == 2**18 + 3 * 64 * 64
    values = noise.double().sort().values
    expected = (torch.arange(len(noise)) + 0.5) / len(noise)
    distance = (torch.special.ndtr(values) - expected).abs().max().item()
    assert distance < 2 / len(noise) ** 0.5  # Kolmogorov: exceeded by chance once in 1,500
    for shift in (1, 64, 4096):
        correlation = torch.corrcoef(torch.stack((noise[shift:], noise[:-shift])))[0, 1]
        assert correlation.abs() < 5 / len(noise) ** 0.5
    assert not torch.equal(noise, Eraser(1.0, 64, seed=3).noise())


def test_every_offset_leaves_room_for_an_image() -> None:
    eraser = Eraser(1.0, 8, seed=0)
    offsets = eraser.boxes(np.arange(30_000).reshape(-1, 3))[:, 4]
    assert offsets.min() >= 0
    assert 2**18 - 2000 < offsets.max() < 2**18
    assert len(eraser.noise()) >= offsets.max() + 3 * 8 * 8
