"""Part: GPU time, time as a CUDA graph and host time of each op against plain torch.

The variants are those of `featkd bench run`, forward and backward, under autocast to bf16 and with
all tensors in bf16.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import featkd

from ..cases import OPS, ROW_OPS
from ..problem import Case
from ..sizes import Maps, Sizes
from ..timing import clock_for, quantiles, take_turns
from ..variants import VARIANTS, Disagreement, Prepared, Step, build
from .recorder import Failed, Figure, Recorder

_DTYPES = ("autocast-bf16", "bf16")
_FORMS = ("mse-lift", "spectral-lift", "two-norms", "mse", "indices", "spectral-widelast")
_ROUNDS, _HOST_CALLS = 30, 20
_WARM_UP = 4


def ops(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """Times each case, in one process: shards would disturb each other."""
    for case in _cases(device):
        recorder.run(case.title, partial(measure, case, device))


def warm(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """Runs the cases without timing, in several processes, to fill the compilers' disk caches."""
    items = {case.title: partial(_run_once, case, device) for case in _cases(device)}
    recorder.run_share(items, shard, shards)


def _run_once(case: Case, device: torch.device) -> None:
    for step in _build(case, device).steps.values():
        step()


def _build(case: Case, device: torch.device) -> Prepared:
    # on a CPU only the tracing is checked
    return build(case, VARIANTS, device, "inductor" if device.type == "cuda" else "eager")


def _cases(device: torch.device) -> Iterator[Case]:
    """Yields the largest cases first, for a run that is cut short."""
    if device.type == "cpu":
        yield from _select(Maps(2, (3, 4), 12, 20), ("spectral-lift",), "autocast-bf16")
        return
    for batch in (256, 32):
        for dtype in _DTYPES:
            yield from _select(Maps(batch, (14, 14), 192, 384), _FORMS, dtype)
            yield from _select(Maps(batch, (14, 14), 768, 1024), ("mse-lift",), dtype)


def _select(maps: Maps, forms: tuple[str, ...], dtype: str) -> Iterator[Case]:
    sizes = Sizes((maps,), ((maps.batch, 1000),))
    for op in ROW_OPS:
        for problem in OPS[op](sizes):
            if problem.form in forms:
                yield Case(problem, dtype, "both")


def measure(case: Case, device: torch.device) -> list[Figure]:
    """Times each variant; the error names the variants that failed, and has the others' figures.

    Raises:
        Failed: a variant failed, differs from eager, or ran on another backend.
    """
    built = _build(case, device)
    ready: dict[str, Step] = {}
    failures = []
    for name, step in built.steps.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # inductor's, about the FFT
                for _ in range(_WARM_UP):
                    results = step()
            ready[name] = step
            built.check(name, results)
        except Disagreement as error:
            failures.append(str(error))
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    ran = featkd.last_backend(case.problem.op)
    if device.type == "cuda" and ran != "triton":
        failures.append(f"featkd: expected to run on triton, ran on {ran}")
    found: list[Figure] = []
    graphs = _captured(ready, device, failures) if device.type == "cuda" else {}
    for metric, steps in (("gpu_us", ready), ("graph_us", graphs)):
        for name, seconds in take_turns(steps, clock_for(device), min_rounds=_ROUNDS).items():
            for suffix, value in zip(("_q20", "", "_q80"), quantiles(seconds), strict=True):
                found.append((name, metric + suffix, "us", 1e6 * value))
    for name, step in ready.items():
        found.append((name, "host_us", "us", _host(step, device)))
    if failures:
        raise Failed("; ".join(failures), found)
    return found


def _captured(ready: dict[str, Step], device: torch.device, failures: list[str]) -> dict[str, Step]:
    """Captures the variants as CUDA graphs."""
    found: dict[str, Step] = {}
    for name, step in ready.items():
        try:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = step()
            found[name] = Step(tuple, partial(_replay, graph, kept))
        except Exception as error:
            failures.append(f"{name} as a CUDA graph: {type(error).__name__}: {str(error)[:300]}")
    return found


def _replay(
    graph: torch.cuda.CUDAGraph, kept: tuple[Tensor, ...], ready: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    graph.replay()
    return kept


def _host(step: Step, device: torch.device) -> float:
    """Returns the microseconds for which a call occupies the host, with the GPU's queue empty."""
    found = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(_HOST_CALLS):
            step()
        found.append(1e6 * (time.perf_counter() - started) / _HOST_CALLS)
        if device.type == "cpu":
            break
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return min(found)
