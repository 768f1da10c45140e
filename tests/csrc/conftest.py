"""PTX of csrc by nvcc, compiled once per process."""

from __future__ import annotations

import pytest

from benchmarks.report import csrc_counts


@pytest.fixture(scope="session")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    return csrc_counts.compile_ptx(tmp_path_factory.mktemp("ptx"))
