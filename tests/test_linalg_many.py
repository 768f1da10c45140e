"""Ranks of many matrices, compared with float64 LAPACK.

    FEATKD_MANY=10000 python -m pytest -s tests/test_linalg_many.py
    FEATKD_FEATURES=F.npy python -m pytest -s tests/test_linalg_many.py    # (images, N, D), float32

By default, a few matrices of each family are tested. docs/linalg.md quotes the first command.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from featkd import linalg
from tests.spectra import FAMILIES, THRESHOLDS, lapack

FEATURES = os.environ.get("FEATKD_FEATURES", "")
COUNT = int(os.environ.get("FEATKD_MANY", "160"))
SHAPES = ((64, 64), (196, 192), (49, 96), (196, 384))


class Tally:
    """Counts compared matrices and differences."""

    done = mismatches = resolved = 0
    worst = 0.0

    def add(self, x: np.ndarray) -> None:
        """Compares a batch with LAPACK."""
        expected = lapack(x)
        found = linalg.spectrum(torch.from_numpy(x), THRESHOLDS)
        error = np.abs(found.curve.double().numpy() - expected.curve).max()
        self.worst = max(self.worst, float(error))
        self.mismatches += int((found.ranks.numpy() != expected.ranks).any(1).sum())
        self.resolved += int(found.resolved.sum())
        self.done += len(x)

    def check(self) -> None:
        """Prints the counts and checks them."""
        print(
            f"\n{self.done} matrices, {self.mismatches} with another rank than float64 LAPACK, "
            f"worst curve error {self.worst:.1e}, {self.resolved} solved again in float64"
        )
        assert self.done
        assert self.mismatches == 0
        assert self.worst <= 3e-7


def test_ranks_of_all_families_match_lapack():
    rng = np.random.default_rng(2026)
    tally = Tally()
    each = -(-COUNT // len(FAMILIES))
    for make in FAMILIES.values():
        for first in range(0, each, 32):
            rows, columns = SHAPES[(first // 32) % len(SHAPES)]
            count = min(32, each - first)
            tally.add(np.stack([make(rows, columns, rng) for _ in range(count)]).astype(np.float32))
    tally.check()


@pytest.mark.skipif(not FEATURES, reason="FEATKD_FEATURES names no file of features")
def test_ranks_of_given_features_match_lapack():
    features = np.load(FEATURES, mmap_mode="r")
    tally = Tally()
    for first in range(0, len(features), 64):
        tally.add(np.array(features[first : first + 64], np.float32))
    tally.check()


def test_sturm_counts_neither_overflow_nor_underflow():
    """Diagonals over 150 decades, zeros, large sums, and a matrix close to a permutation."""
    n = 100
    for x in (
        torch.diag(10.0 ** -torch.linspace(0, 150, n, dtype=torch.float64)),
        torch.eye(n, dtype=torch.float64) * (torch.arange(n) % 3 == 0),
        torch.ones(n, 4000, dtype=torch.float64),
        torch.eye(n, dtype=torch.float64).roll(1, 0) + 2.0**-40 * torch.eye(n, dtype=torch.float64),
    ):
        found, expected = linalg.spectrum(x[None]), lapack(x[None].numpy(), linalg.THRESHOLDS)
        largest = expected.values[0, 0]
        error = (found.values.numpy() / largest) ** 2 - (expected.values / largest) ** 2
        assert np.abs(error).max() <= 1e-13
        assert (found.ranks.numpy() == expected.ranks).all()
