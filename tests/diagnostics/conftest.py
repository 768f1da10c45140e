"""Feature files of a few images, and a run over them."""

from __future__ import annotations

import numpy as np
import pytest

from featkd.cli.main import main
from featkd.diagnostics import figures
from tests.diagnostics.commands import arguments
from tests.diagnostics.maps import feature_maps


@pytest.fixture(scope="session")
def features(tmp_path_factory):
    """60 files as published: two layers, a class token and 5 x 5 patches, 24 channels."""
    folder = tmp_path_factory.mktemp("features")
    maps = feature_maps(120, 26, 24).unflatten(0, (60, 2))
    for number, m in enumerate(maps):
        np.save(folder / f"{number:03}.npy", m.numpy())
    return folder


@pytest.fixture(scope="session")
def uninterrupted(features, tmp_path_factory):
    """Output folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("uninterrupted")
    assert main(arguments(features, out)) == 0
    return out


@pytest.fixture
def no_figures(monkeypatch):
    """Skips the drawing, three quarters of the time of a run this small."""
    monkeypatch.setattr(figures, "draw", lambda _: {})
