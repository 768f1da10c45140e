"""Least bytes and floating-point operations of a case, and this machine's rates for both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .problem import AUTOCAST, DTYPES, Direction, Problem
from .variants import Prepared


def floor_bytes(prepared: Prepared, direction: Direction) -> int:
    """Returns the bytes of each input read once and each output written once.

    "backward" reads the inputs and the upstream gradients and writes the gradients. "both" counts
    the inputs once for both passes; an op whose upstream gradients depend on its outputs has to
    read them twice.
    """
    inputs = _bytes(prepared.inputs.values())
    leaves = prepared.case.problem.differentiable
    gradients = _bytes(prepared.inputs[name] for name in leaves)
    outputs, upstream = _bytes(prepared.outputs), _bytes(prepared.upstream)
    return {
        "forward": inputs + outputs,
        "backward": inputs + upstream + gradients,
        "both": inputs + outputs + upstream + gradients,
    }[direction]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def least_flops(problem: Problem, direction: Direction) -> int:
    """Returns the floating-point operations of the matrix products, without recomputed ones."""
    passes = {"forward": 1, "backward": 2, "both": 3}[direction]
    return 2 * problem.multiply_adds * passes


@dataclass(frozen=True)
class Rates:
    """Rates of torch's large copy, and of its large matrix product by dtype, on this machine."""

    copy_gb_per_s: float
    gflop_per_s: dict[str, float]

    def least_seconds(self, moved: int, flops: int, dtype: str) -> float:
        """Returns the roofline: the longer of moving and multiplying at these rates.

        Products of half-precision inputs may be computed in fp32, which is faster on CPUs without
        bf16 instructions.
        """
        rate = max(self.gflop_per_s[dtype], self.gflop_per_s["fp32"])
        return max(moved / self.copy_gb_per_s, flops / rate) / 1e9


def measure_rates(device: torch.device, dtypes: Sequence[str]) -> Rates:
    """Measures the best of a few large copies and products; takes some seconds on a CPU."""
    cuda = device.type == "cuda"
    elements = (256 if cuda else 64) * 2**20 // 4
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    seconds = _best(partial(target.copy_, source), device)
    copy = 2 * 4 * elements / seconds / 1e9
    del source, target
    size = 8192 if cuda else 512
    rates = {}
    for name in dict.fromkeys(("fp32", *dtypes)):
        dtype = AUTOCAST.get(name, DTYPES[name])
        # random, because a GPU draws less power for equal numbers and keeps a higher clock
        matrix = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(matrix)
        seconds = _best(partial(torch.mm, matrix, matrix, out=out), device)
        rates[name] = 2 * size**3 / seconds / 1e9
    return Rates(copy, rates)


def _best(work: Callable[[], Tensor], device: torch.device) -> float:
    """Returns the least seconds of at least three calls within about half a second."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.5:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
