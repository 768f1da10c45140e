"""`pytest benchmarks`: the same cases under pytest-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from featkd.benchmarks.cases import select
from featkd.benchmarks.conftest import pytest_generate_tests

ROOT = Path(__file__).parent.parent.parent


def test_one_case(tmp_path):
    report = tmp_path / "b.json"
    # a worker of pytest-xdist passes its own settings on, which switch benchmarks off
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider"]
    command += ["-k", "soft_kd and indices and both and featkd", f"--benchmark-json={report}"]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (one,) = json.loads(report.read_text())["benchmarks"]
    assert one["group"] == "soft_kd/indices/4x1000/fp32/both"
    assert one["stats"]["rounds"] >= 5
    assert one["extra_info"]["peak_bytes"] > 0


class Asked:
    """As much of pytest's Metafunc as the suite's conftest looks at."""

    fixturenames = ("benchmark", "case", "variant")

    def __init__(self, **options: str) -> None:
        self.options = {f"--bench-{name}": value for name, value in options.items()}
        self.config = self
        self.found: dict[str, list] = {}

    def getoption(self, name: str, default: str) -> str:
        return self.options.get(name, default)

    def parametrize(self, name: str, values: list[object], ids: object = None) -> None:
        self.found[name] = list(values)


def test_choice_of_cases():
    asked = Asked(shapes="published", dtypes="bf16,fp16", directions="backward")
    pytest_generate_tests(asked)
    chosen = select(shapes="published", dtypes=("bf16", "fp16"), directions=("backward",))
    assert [c.name for c in asked.found["case"]] == [c.name for c in chosen]
    assert asked.found["variant"] == ["eager", "compile", "featkd"]
    with pytest.raises(
        pytest.UsageError, match="--bench-shapes: expected small, narrow, published"
    ):
        pytest_generate_tests(Asked(shapes="big"))
