"""`pytest benchmarks`: the small cases under pytest-benchmark."""

from __future__ import annotations

import json

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
    words += ["-k", "soft_kd and indices and fp32 and both and featkd"]
    done = server.call(*words, script=PYTEST)
    assert done.returncode == 0, done.stdout
    (one,) = json.loads(report.read_text())["benchmarks"]
    assert one["group"] == "soft_kd/indices/4x1000/fp32/both"
    assert one["stats"]["rounds"] >= 5
