"""The same cases under pytest-benchmark, with its statistics, storage and comparisons.

`featkd bench run` takes the variants in turns; here each has its own time, so that a busy machine
can favour one.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from . import memory, roofline, variants
from .problem import Case

_SECONDS, _LEAST, _MOST = 0.5, 5, 500


def test_op(benchmark: Any, case: Case, variant: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepared = variants.prepare(case, [variant], device)  # raises where it isn't eager's result
    step = prepared.steps[variant]

    def run(*ready: torch.Tensor) -> None:
        step.run(ready)
        if device.type == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    run(*step.prepare())
    once = time.perf_counter() - start
    rounds = min(_MOST, max(_LEAST, int(_SECONDS / once)))
    benchmark.group = case.name
    benchmark.extra_info["backend"] = prepared.backend or "torch"
    benchmark.extra_info["peak_bytes"] = memory.extra_peak(step, device)
    benchmark.extra_info["floor_bytes"] = roofline.floor_bytes(
        prepared, case.problem, case.direction
    )
    benchmark.pedantic(
        run, setup=lambda: (step.prepare(), {}), rounds=rounds, warmup_rounds=1, iterations=1
    )
