"""Part: registers, spills and broken rules of every kernel, and the time of every launch."""

from __future__ import annotations

import os
from functools import partial

import torch

from ..cases import ROW_OPS
from ..report import aot, compiled
from ..report.chips import CHIPS
from .recorder import Figure, Recorder

_DTYPES = ("bf16", "fp32")
_WORKERS = max(2, len(os.sched_getaffinity(0)) // 4)
_METRICS = ("registers", "spills", "wide_loads", "loads", "broken_rules")


def kernels(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """Runs an item for each op and dtype."""
    small = device.type == "cpu"
    for op in ROW_OPS[-1:] if small else ROW_OPS:
        for dtype in _DTYPES[:1] if small else _DTYPES:
            recorder.run(f"{op}/{dtype}", partial(_measure, op, dtype, device))


def _arch(device: torch.device) -> int:
    """Returns the GPU's architecture, or the nearest one below it in the chip table."""
    if device.type == "cpu":
        return min(CHIPS)
    major, minor = torch.cuda.get_device_capability(device)
    return max((arch for arch in CHIPS if arch <= 10 * major + minor), default=min(CHIPS))


def _measure(op: str, dtype: str, device: torch.device) -> list[Figure]:
    """Compiles the op's kernels, and times each launch on a GPU."""
    jobs = compiled.jobs(compiled.questions([op], "small", [dtype]), [_arch(device)])
    found: list[Figure] = []
    for row in compiled.compile_all(jobs, workers=_WORKERS):
        for name, _, metric, unit, value in row.figures():
            if metric in _METRICS:
                found.append((name, metric, unit, float(value)))
        for text in row.broken:
            print(f"{row.name}: {text}")
    if device.type == "cuda":
        published = [q.case for q in compiled.questions([op], "published", [dtype])]
        sizes = [case for case in published if case.problem.batch in (32, 256)]
        found += [(launch, "time", "us", us) for launch, us in aot.measure(sizes)]
    return found
