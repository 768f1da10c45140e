"""Times of several steps, taken in turns so that a busy machine slows all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from .variants import Step

Clock = Callable[[Step], float]
"""Runs a step once and returns the seconds its timed part took."""

_MOST_ROUNDS = 2000
_L2_BYTES = 256 * 2**20  # more than any GPU's L2


def clock_for(device: torch.device) -> Clock:
    """Wall time on a CPU; on a GPU its own time, from a cold L2."""
    return _gpu_clock(device) if device.type == "cuda" else _wall_clock


def _wall_clock(step: Step) -> float:
    ready = step.prepare()
    start = time.perf_counter()
    step.run(ready)
    return time.perf_counter() - start


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
    steps: Mapping[str, Step], clock: Clock, *, min_seconds: float, min_rounds: int = 10
) -> dict[str, list[float]]:
    """Seconds of every step in every round; round i of one is beside round i of the others.

    A round runs each step once, and begins with another step than the round before: what a step
    leaves in the caches is not always to the same one's benefit.

    Args:
        min_seconds: time to spend on each step, at least.
        min_rounds: rounds to take, at least.
    """
    names = list(steps)
    for step in steps.values():  # once more after all: pages, pools and code are warm
        step()
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        rounds = 0
        while rounds < _MOST_ROUNDS:
            for name in rotated(names, rounds):
                times[name].append(clock(steps[name]))
            rounds += 1
            spent = time.perf_counter() - start
            if rounds >= min_rounds and spent >= min_seconds * len(names):
                break
    finally:
        if collecting:
            gc.enable()
    return times


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The names from another one on in each round."""
    first = number % len(names) if names else 0
    return [*names[first:], *names[:first]]


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantiles."""
    low, middle, high = np.quantile(seconds, (0.2, 0.5, 0.8))
    return float(low), float(middle), float(high)


def speedup(baseline: list[float], seconds: list[float]) -> float:
    """Median over the rounds of baseline / time, each round's two taken moments apart."""
    return float(np.median(np.asarray(baseline) / np.asarray(seconds)))
