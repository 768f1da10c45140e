"""Null models: the published SEP values for noise, permutation tests, bandwidth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featkd.diagnostics.null_models import bandwidth, gaussian_sep, permutation_test
from tests.diagnostics import published

pytestmark = pytest.mark.usefixtures("one_thread")


def test_gaussian_tokens_give_the_published_sep():
    for channels in (192, 384):
        found = gaussian_sep(channels)
        assert np.allclose(found.relative(), (0.5, 0.6, 0.7, 0.8, 0.9), atol=0.006)
        assert np.allclose(found.folded_relative(), (0.5, 0.6, 0.7, 0.8, 0.9), atol=0.011)


def test_permutation_test_detects_order():
    """A permutation changes the SEP of smooth channels, but not of Gaussian ones.

    With a Bonferroni correction, 9 shares and 100 orders could not be significant.
    """
    random = torch.randn(6, 25, 64, generator=torch.Generator().manual_seed(0))
    shares = tuple(n / 10 for n in range(1, 10))
    smooth, noise = (
        permutation_test(x, 100, shares=shares, bootstraps=20) for x in (random.cumsum(-1), random)
    )
    assert smooth.p_joint == pytest.approx(1 / 101)
    assert smooth.p_value[4] == pytest.approx(1 / 101)
    assert smooth.observed[4] < smooth.permuted_low[4]
    assert noise.p_joint > 0.05
    assert min(noise.p_value) > 0.05


def test_permutation_test_ignores_zero_tokens():
    """The only nonzero token of an image must not count as a whole image."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(4, 50, 32, generator=generator)
    maps[:2, 1:] = 0
    maps[:2, 0] = 1 + 0.01 * maps[:2, 0]
    found = permutation_test(maps, permutations=20)
    tokens = maps.flatten(0, 1)
    mean, _ = published.sep(tokens[tokens.any(1)][None].numpy())
    assert found.observed == tuple(published.reaching(mean, s) / 32 for s in found.shares)
    assert found.p_joint > 0.05
    for low, value, high in zip(found.low, found.observed, found.high, strict=True):
        assert low <= value <= high


def test_bandwidth():
    one = torch.zeros(1, 10)
    one[0, 3] = 5.0
    assert bandwidth(one).participation_mean == pytest.approx(0.1)
    assert bandwidth(one).channels90_mean == pytest.approx(0.1)
    even = torch.ones(2, 10)
    assert bandwidth(even).participation_mean == pytest.approx(1)
    assert bandwidth(even).channels90_mean == pytest.approx(0.9)
    gaussian = torch.randn(4000, 96, generator=torch.Generator().manual_seed(0))
    assert bandwidth(gaussian).participation_mean == pytest.approx(1 / 3, abs=0.02)
