"""Times of several steps, taken in turns so that a busy machine slows all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from .variants import Step

Clock = Callable[[Step], float]
"""Runs a step once and returns the seconds of its timed part."""

_MOST_ROUNDS = 2000
_L2_BYTES = 256 * 2**20  # larger than the L2 of any GPU


def clock_for(device: torch.device) -> Clock:
    """Returns wall time for a CPU; for a GPU the time of its work, starting from a cold L2."""
    return _gpu_clock(device) if device.type == "cuda" else wall_clock(device)


def wall_clock(device: torch.device) -> Clock:
    """Returns a clock of the wall time until the device is done."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def clock(step: Step) -> float:
        ready = step.prepare()
        wait()
        start = time.perf_counter()
        step.run(ready)
        wait()
        return time.perf_counter() - start

    return clock


def _gpu_clock(device: torch.device) -> Clock:
    scratch = torch.empty(_L2_BYTES, dtype=torch.int8, device=device)

    def clock(step: Step) -> float:
        ready = step.prepare()
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        scratch.zero_()
        start.record()
        step.run(ready)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    return clock


def take_turns(
    steps: Mapping[str, Step], clock: Clock, *, min_seconds: float = 0, min_rounds: int = 10
) -> dict[str, list[float]]:
    """Times every step once per round; returns the seconds of each step by round.

    Each step runs once before the rounds. Each round begins with another step, because the caches
    that one step leaves behind can slow down the next.

    Args:
        min_seconds: least time to spend on each step.
        min_rounds: least number of rounds.
    """
    names = list(steps)
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        rounds = 0
        while rounds < _MOST_ROUNDS:
            first = rounds % len(names) if names else 0
            for name in names[first:] + names[:first]:
                times[name].append(clock(steps[name]))
            rounds += 1
            spent = time.perf_counter() - start
            if rounds >= min_rounds and spent >= min_seconds * len(names):
                break
    finally:
        if collecting:
            gc.enable()
    return times


def quantiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Returns the 20 %, 50 % and 80 % quantiles."""
    low, middle, high = np.quantile(seconds, (0.2, 0.5, 0.8))
    return float(low), float(middle), float(high)


def speedup(baseline: Sequence[float], seconds: Sequence[float]) -> float:
    """Returns the median over the rounds of baseline time / time."""
    return float(np.median(np.asarray(baseline) / np.asarray(seconds)))
