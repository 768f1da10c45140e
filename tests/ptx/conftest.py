"""Every test of this folder compiles kernels."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(compiled_kernels):
    """All share the test run's own cache folder."""
