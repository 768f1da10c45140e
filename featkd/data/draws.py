"""Random numbers of samples, drawn for a whole batch at once.

A sample's numbers depend on the run's seed and on its key alone, whatever the batch, the process
or the device: each number is a hash (the output function of SplitMix64) of the seed, the purpose,
the key and the number's position.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featkd.runtime.seeding import derive_seed

_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


def uniforms(seed: int, keys: ArrayLike, count: int, *, purpose: str) -> NDArray[np.float64]:
    """Draws `count` numbers from [0, 1) for each key.

    Args:
        seed: seed of the run.
        keys: (B, K) integers, usually `SampleKey`s: one row per sample.
        count: numbers per sample. The first ones do not depend on it.
        purpose: name of what the numbers decide ("crop"); other purposes get other numbers.

    Returns:
        (B, count) float64.

    Examples:
        >>> keys = [(0, 7, 0), (0, 8, 0)]
        >>> both = uniforms(1, keys, 3, purpose="crop")
        >>> bool((uniforms(1, keys[1:], 2, purpose="crop") == both[1:, :2]).all())
        True
    """
    columns: NDArray[Any] = np.asarray(keys, np.int64).view(np.uint64)
    state = np.full(len(columns), derive_seed(seed, *purpose.encode()), np.uint64)
    for column in columns.T:
        state = _mix(state + _STEP * (column + np.uint64(1)))
    positions = np.arange(1, count + 1, dtype=np.uint64) * _STEP
    numbers: NDArray[np.float64] = (_mix(state[:, None] + positions) >> np.uint64(11)) * 2.0**-53
    return numbers


def normal(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turns pairs of uniform numbers into standard normal ones (Box and Muller's transform)."""
    drawn: NDArray[np.float64] = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
    return drawn


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scrambles the bits of each number, one to one; the output function of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
