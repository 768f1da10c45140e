"""`pytest benchmarks`: the same cases under pytest-benchmark."""

from __future__ import annotations

import json

import pytest

from featkd.benchmarks.cases import select
from featkd.benchmarks.conftest import pytest_generate_tests

# a worker of pytest-xdist passes its own settings on, which switch benchmarks off
PYTEST = """
import os, pytest, sys
for name in [name for name in os.environ if name.startswith("PYTEST")]:
    del os.environ[name]
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_one_case(server, tmp_path):
    report = tmp_path / "b.json"
    words = ["benchmarks", "-p", "no:cacheprovider", f"--benchmark-json={report}"]
    words += ["-k", "soft_kd and indices and both and featkd"]
    done = server.call(*words, script=PYTEST)
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
    assert asked.found["variant"] == ["eager", "compile", "reference", "featkd"]
    with pytest.raises(pytest.UsageError, match="--bench-shapes: expected small, published, large"):
        pytest_generate_tests(Asked(shapes="big"))
