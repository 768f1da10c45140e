"""Random numbers of samples: a hash of the key, uniform and independent."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from featkd.data.draws import uniforms
from featkd.runtime.seeding import derive_seed

KEYS = np.array(list(itertools.product(range(3), range(2000), range(3))))


def splitmix64(state: int) -> int:
    """Next output of Vigna's SplitMix64, in plain integers."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_numbers_are_splitmix64_of_seed_purpose_and_key() -> None:
    keys = [(5, 1_281_166, 2), (0, 0, 0), (5, 1_281_166, 1)]
    expected = []
    for key in keys:
        state = derive_seed(9, *b"crop")
        for part in key:
            state = splitmix64((state + part * 0x9E3779B97F4A7C15) % 2**64)
        steps = [(state + position * 0x9E3779B97F4A7C15) % 2**64 for position in range(4)]
        expected.append([(splitmix64(step) >> 11) / 2**53 for step in steps])
    assert uniforms(9, keys, 4, purpose="crop").tolist() == expected
    assert uniforms(9, KEYS[:0], 5, purpose="crop").shape == (0, 5)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_numbers_are_uniform_and_uncorrelated_between_neighbouring_keys(seed: int) -> None:
    drawn = uniforms(seed, KEYS, 8, purpose="crop")
    assert drawn.min() >= 0
    assert drawn.max() < 1
    # chi-square of 64 bins per column: mean 63, standard deviation 11
    for column in drawn.T:
        counts = np.histogram(column, 64, (0, 1))[0]
        assert ((counts - len(KEYS) / 64) ** 2 / (len(KEYS) / 64)).sum() < 63 + 5 * 11.3
    # between positions, copies, images, epochs, purposes and seeds
    others = [
        *(np.roll(drawn, shift, axis=0) for shift in (1, 3, 6000)),
        np.roll(drawn, 1, axis=1),
        uniforms(seed, KEYS, 8, purpose="flip"),
        uniforms(seed + 1, KEYS, 8, purpose="crop"),
    ]
    for other in others:
        correlation = np.corrcoef(drawn.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / drawn.size**0.5
