"""Part: the compiled-kernel report for this GPU, and the measured time of every launch."""

from __future__ import annotations

import os
from functools import partial

import torch

from .. import measured, report
from ..chips import CHIPS
from .recorder import Figure, Recorder

_OPS = ("projected_feature_kd", "lift_head", "widelast_projection", "soft_kd")
_DTYPES = ("bf16", "fp32")
_WORKERS = max(2, len(os.sched_getaffinity(0)) // 4)


def kernels(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """An item for each op and dtype."""
    small = device.type == "cpu"
    for op in _OPS[-1:] if small else _OPS:
        for dtype in _DTYPES[:1] if small else _DTYPES:
            recorder.run(f"{op}/{dtype}", partial(_of, op, dtype, device))


def _arch(device: torch.device) -> int:
    """The GPU's, or the nearest below that the chip table has."""
    known = sorted(chip.arch for chip in CHIPS)
    if device.type == "cpu":
        return known[0]
    major, minor = torch.cuda.get_device_capability(device)
    return max((arch for arch in known if arch <= 10 * major + minor), default=known[0])


def _of(op: str, dtype: str, device: torch.device) -> list[Figure]:
    """Registers, spills and broken rules as compiled; microseconds of each launch as measured."""
    asked = report.questions([op], "small", [dtype])
    found: list[Figure] = []
    for row in report.compile_all(asked, [_arch(device)], workers=_WORKERS):
        name = f"{row.case}/{row.kernel}"
        for metric, unit, value in (
            ("registers", "count", row.code.registers),
            ("spills", "count", row.code.spills),
            ("wide_loads", "count", row.code.wide_loads),
            ("loads", "count", row.code.loads),
            ("broken_rules", "count", len(row.broken)),
        ):
            found.append((name, metric, unit, float(value)))
        for text in row.broken:
            print(f"{name}: {text}")
    if device.type == "cuda":
        published = [q.case for q in report.questions([op], "published", [dtype])]
        sizes = [case for case in published if case.problem.batch in (32, 256)]
        for timed in measured.measure(sizes)[1]:
            found.append((f"{timed.case}/{timed.kernel}", "time", "us", timed.us))
    return found
