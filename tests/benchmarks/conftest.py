"""Cases of a few elements, and synthetic rows of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

from featkd.benchmarks import sizes
from featkd.benchmarks.results import Row
from featkd.benchmarks.sizes import Maps, Sizes

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the set "small"."""
    tiny = Sizes((Maps(2, (2, 4), 6, 10),), ((2, 12),), ((2, 2, 5, 4),))
    monkeypatch.setitem(sizes.SETS, "small", tiny)


@pytest.fixture
def make_row() -> Callable[..., Row]:
    def make(**changes: Any) -> Row:
        kinds = {"str": "x", "int": 1000, "float": 0.125}
        values: dict[str, Any] = {f.name: kinds[str(f.type)] for f in fields(Row)}
        values |= {
            "time": "2026-11-24T06:00:00+00:00",
            "commit": "0123456789abcdef",
            "torch": "2.14.1",
            "system": "Linux x86_64",
            "processor": "Some, CPU",
            "instructions": "AVX2",
            "cores": "2",
            "torch_threads": "2",
            "accelerator": "none",
            "omp_wait_policy": "passive",
            "op": "soft_kd",
            "form": "indices",
            "shape": "32x1000",
            "dtype": "fp32",
            "direction": "both",
            "variant": "featkd",
            "backend": "triton",
            "load": 2.0,
            "rounds": 20,
            "median_ms": 2.0,
            "q20_ms": 1.9,
            "q80_ms": 2.1,
            "speedup": 1.5,
            "peak_bytes": 1_000_000,
        }
        return Row(**(values | changes))

    return make


@pytest.fixture
def all_variants(make_row) -> Callable[..., list[Row]]:
    """Returns rows of all variants of one case."""

    def make(**changes: Any) -> list[Row]:
        eager = dict(variant="eager", median_ms=3.0, q20_ms=2.9, q80_ms=3.1, speedup=1.0)
        compiled = dict(variant="compile", median_ms=1.8, q20_ms=1.7, q80_ms=1.9, speedup=1.7)
        reference = dict(variant="reference", median_ms=2.5, q20_ms=2.4, q80_ms=2.6, speedup=1.2)
        three = (eager, compiled, reference)
        others = [make_row(backend="torch", **x, **changes) for x in three]
        return [*others, make_row(**changes)]

    return make
