"""Times of single launches on the GPU that is there; `featkd bench` times whole ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .aot import run
from .problem import Case

# (kernel, grid, arguments, options) -> microseconds, having run it at least once
Timer = Callable[[Any, tuple[int, ...], dict[str, Any], dict[str, Any]], float]


@dataclass(frozen=True)
class Timed:
    """A launch of a case."""

    case: str
    kernel: str
    us: float
    """Median of many launches, the cache flushed before each."""


def on_gpu(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]
) -> float:
    """By Triton's own benchmark. A launch writes the same results each time."""
    from triton.testing import do_bench

    median = do_bench(lambda: kernel[grid](**arguments, **options), return_mode="median")
    return 1e3 * float(median)


def measure(
    cases: Sequence[Case], device: str = "cuda", timer: Timer = on_gpu
) -> tuple[str, list[Timed]]:
    """The GPU's name, and the time of each launch of the cases' forward and backward passes."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    found: list[Timed] = []
    for case in cases:
        title = case.name.rsplit("/", 1)[0]

        def launcher(kernel: Any, *launch: Any, title: str = title) -> None:
            found.append(Timed(title, str(kernel.fn.__name__), timer(kernel, *launch)))

        run(case, launcher, device)
    return name, found
