"""Ranks of many matrices against float64 LAPACK.

    FEATKD_MANY=10000 python -m pytest -s tests/test_linalg_many.py

The suite takes a few of each family; the figures in docs/linalg.md are of that command.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from featkd import linalg
from tests.spectra import FAMILIES, THRESHOLDS, lapack

COUNT = int(os.environ.get("FEATKD_MANY", "160"))
SHAPES = ((64, 64), (196, 192), (49, 96), (196, 384))


def test_no_rank_differs():
    rng = np.random.default_rng(2026)
    worst, mismatches, resolved, done = 0.0, 0, 0, 0
    each = -(-COUNT // len(FAMILIES))
    for name, make in FAMILIES.items():
        for first in range(0, each, 32):
            rows, columns = SHAPES[(first // 32) % len(SHAPES)]
            count = min(32, each - first)
            x = np.stack([make(rows, columns, rng) for _ in range(count)]).astype(np.float32)
            expected = lapack(x)
            found = linalg.spectrum(torch.from_numpy(x), THRESHOLDS)
            error = np.abs(found.curve.double().numpy() - expected.curve).max()
            worst = max(worst, float(error))
            assert worst <= 3e-7, name
            mismatches += int((found.ranks.numpy() != expected.ranks).any(1).sum())
            resolved += int(found.resolved.sum())
            done += count
    print(
        f"\n{done} matrices, {mismatches} with another rank than float64 LAPACK, "
        f"worst curve error {worst:.1e}, {resolved} solved again in float64"
    )
    assert mismatches == 0
