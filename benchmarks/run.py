"""Measurement of cases: agreement, times in turns, peak memory, and the roofline."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import memory, results, roofline, timing, variants
from .problem import Case
from .results import Row


def measure(cases: Sequence[Case], device: torch.device, min_seconds: float) -> Iterator[list[Row]]:
    """Yields the rows of each case, one per variant, as they are measured.

    Args:
        min_seconds: least time to spend on each variant of each case, in at least ten rounds.
    """
    run: dict[str, Any] = {**results.describe_run(device.type)}
    rates = roofline.measure_rates(device, [case.dtype for case in cases])
    clock = timing.clock_for(device)
    for case in cases:
        prepared = variants.prepare(case, variants.VARIANTS, device)
        moved = roofline.floor_bytes(prepared, case.direction)
        flops = roofline.least_flops(case.problem, case.direction)
        least = rates.least_seconds(moved, flops, case.dtype)
        times = timing.take_turns(prepared.steps, clock, min_seconds=min_seconds)
        load = os.getloadavg()[0]
        rows = []
        for name, step in prepared.steps.items():
            low, median, high = timing.quantiles(times[name])
            row = Row(
                **run,
                copy_gb_per_s=rates.copy_gb_per_s,
                gflop_per_s=rates.gflop_per_s[case.dtype],
                op=case.problem.op,
                form=case.problem.form,
                shape=case.problem.shape,
                dtype=case.dtype,
                direction=case.direction,
                variant=name,
                backend=prepared.backend if name == "featkd" else "torch",
                load=load,
                rounds=len(times[name]),
                median_ms=1e3 * median,
                q20_ms=1e3 * low,
                q80_ms=1e3 * high,
                speedup=timing.speedup(times["eager"], times[name]),
                peak_bytes=memory.extra_peak(step, device),
                floor_bytes=moved,
                flops=flops,
                gb_per_s=moved / median / 1e9,
                error=prepared.errors[name],
                roofline_share=least / median,
            )
            rows.append(row)
        yield rows
