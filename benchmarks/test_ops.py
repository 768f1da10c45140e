"""The cases of the set "small" under pytest-benchmark: `pytest benchmarks -k soft_kd`.

`featkd bench run` has all sizes, takes the variants in turns and compares runs. pytest-benchmark
times one variant after the other, so that a busy machine can favour one of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import select
from .problem import DTYPES, Case
from .variants import VARIANTS, prepare


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", select(dtypes=tuple(DTYPES)), ids=lambda case: case.name)
def test_op(benchmark: Any, case: Case, variant: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = prepare(case, [variant], device).steps[variant]

    def run(*ready: torch.Tensor) -> None:
        step.run(ready)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.pedantic(run, setup=lambda: (step.prepare(), {}), rounds=20, warmup_rounds=1)
