"""Conclusions in words."""

from __future__ import annotations

import pytest
import torch

from featkd.diagnostics import Settings
from featkd.diagnostics.source import Layer
from featkd.diagnostics.verdicts import pca_warning, sep_verdict
from tests.diagnostics.compare import measure
from tests.diagnostics.maps import feature_maps

QUICK = Settings(sample=4, permuted=2, permutations=20, k=3)

pytestmark = pytest.mark.usefixtures("one_thread")


def result(maps):
    return measure(maps, QUICK)


@pytest.mark.parametrize("channels", [24, 64])
@pytest.mark.parametrize("seed", range(4))
def test_noise_of_few_channels_equals_the_null(channels, seed):
    """One step of d/D is 1/64 here, which is above the fixed tolerance of 0.015."""
    generator = torch.Generator().manual_seed(seed)
    text = sep_verdict(result(torch.randn(12, 25, channels, generator=generator)))
    assert "This equals the null" in text


def test_smooth_channels_do_not_equal_the_null():
    generator = torch.Generator().manual_seed(0)
    text = sep_verdict(result(torch.randn(12, 25, 24, generator=generator).cumsum(-1)))
    assert "equals the null" not in text
    assert "The order of the channels matters (p = " in text


@pytest.mark.parametrize(
    ("images", "message"),
    [(9, "225 tokens for 24 channels"), (12, "12 images for 24 channels"), (24, None)],
)
def test_warning_of_too_few_images(images, message):
    found = pca_warning(Layer("", 0), result(feature_maps(images, 25, 24)))
    if message is None:
        assert found is None
    else:
        assert found.startswith(f"layer 0: {message}: ")
