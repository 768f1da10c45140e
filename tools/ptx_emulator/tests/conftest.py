"""The folder of compiled kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps compiled kernels in a folder of the test run, which its workers share."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # its base folder is below that of the run
    folder = tmp_path_factory.getbasetemp() / (".." if is_worker else ".") / "compiled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.resolve()))
        yield
