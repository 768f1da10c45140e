"""Part: each op against plain torch: GPU time, time as a CUDA graph, and the host's time apart.

Variants: `eager` (plain torch written for speed), `compile` (torch.compile of it), `reference`
(torch.compile of featkd's own plain torch) and `featkd`, each forward and backward. In precision
`autocast` the student and the parameters are float32 and all run under bf16 autocast; in `bf16`
every tensor is bf16.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

import featkd

from .. import lift_head, projected_feature_kd, sizes, soft_kd, widelast_projection
from ..problem import Maps, Problem, Tensors
from ..timing import quantiles
from .recorder import Failed, Figure, Recorder

VARIANTS = ("eager", "compile", "reference", "featkd")
PRECISIONS = ("autocast", "bf16")
_L2_BYTES = 256 * 2**20  # more than any GPU's L2
_ROUNDS, _HOST_CALLS = 30, 20
_WARM_UP = 4
Run = Callable[[], tuple[Tensor, ...]]


def ops(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """An item for each problem and precision. A shard alone would be timed beside the others."""
    for problem, precision in _problems(device):
        name = f"{problem.op}/{problem.form}/{problem.shape}/{precision}"
        recorder.run(name, partial(measure, problem, precision, device))


def warm(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """The same without timing, dealt out to processes: fills the compilers' caches on disk."""
    for number, (problem, precision) in enumerate(_problems(device)):
        if number % shards == shard:
            name = f"{problem.op}/{problem.form}/{problem.shape}/{precision}"
            recorder.run(name, partial(_compile, problem, precision, device))


def _compile(problem: Problem, precision: str, device: torch.device) -> None:
    for run in runs(problem, precision, device).values():
        run()


def _problems(device: torch.device) -> Iterator[tuple[Problem, str]]:
    """The largest first: a run that is cut short has those."""
    if device.type == "cpu":
        small = Maps(2, (3, 4), 12, 20)
        yield from ((p, "autocast") for p in _of(small, ("spectral-lift",)))
        return
    for batch in (256, 32):
        usual, wide = Maps(batch, (14, 14), 192, 384), Maps(batch, (14, 14), 768, 1024)
        forms = ("mse-lift", "spectral-lift", "two-norms", "mse", "indices", "spectral-widelast")
        for precision in PRECISIONS:
            for problem in (*_of(usual, forms), *_of(wide, ("mse-lift",))):
                yield problem, precision


def _of(maps: Maps, forms: tuple[str, ...]) -> list[Problem]:
    """The benchmarks' problems of these forms at one size."""
    name = f"gpu {maps}"
    sizes.MAPS[name], sizes.LOGITS[name] = (maps,), ((maps.batch, 1000),)
    modules = (projected_feature_kd, widelast_projection, lift_head, soft_kd)
    return [p for module in modules for p in module.problems(name) if p.form in forms]


def inputs(problem: Problem, precision: str, device: torch.device) -> Tensors:
    """Leaves; under autocast all but the teacher's tensors are float32."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1, mean: float = 0) -> Tensor:
        return mean + scale * torch.randn(shape, generator=generator, device=device)

    found = {}
    for name, x in problem.tensors(normal).items():
        differentiable = name in problem.differentiable
        half = precision == "bf16" or not differentiable
        x = x.bfloat16() if half and x.is_floating_point() else x
        found[name] = x.requires_grad_(differentiable)
    return found


def runs(problem: Problem, precision: str, device: torch.device) -> dict[str, Run]:
    """Forward and backward of each variant, compiled where it is, and found to agree."""
    torch.compiler.reset()
    tensors = inputs(problem, precision, device)
    leaves = [tensors[name] for name in problem.differentiable]

    def context() -> AbstractContextManager[object]:
        return (
            torch.autocast(device.type, torch.bfloat16)
            if precision == "autocast"
            else nullcontext()
        )

    def reference(x: Tensors) -> tuple[Tensor, ...]:
        with featkd.use_backend("reference"):
            return problem.featkd(x)

    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    if device.type == "cpu":  # that it can be traced is what is checked there
        compiled = partial(compiled, backend="eager")
    forwards = {
        "eager": problem.eager,
        "compile": compiled(problem.eager),
        "reference": compiled(reference),
        "featkd": problem.featkd,
    }
    generator = torch.Generator(device).manual_seed(1)
    upstream: list[Tensor] = []
    found: dict[str, Run] = {}
    for name in VARIANTS:
        forward = forwards[name]

        def run(forward: Callable[[Tensors], tuple[Tensor, ...]] = forward) -> tuple[Tensor, ...]:
            with context():
                outputs = forward(tensors)
            gradients = [g.to(y.dtype) for g, y in zip(upstream, outputs, strict=True)]
            return torch.autograd.grad(outputs, leaves, gradients)

        if not upstream:
            with context(), torch.no_grad():
                for y in forward(tensors):
                    drawn = torch.randn(y.shape, generator=generator, device=device)
                    upstream.append((1024 * torch.ones_like(drawn) if not y.dim() else drawn).to(y))
        found[name] = run
    return found


def measure(problem: Problem, precision: str, device: torch.device) -> list[Figure]:
    """Figures of each variant; one that fails is named and leaves the others alone."""
    found: list[Figure] = []
    ready: dict[str, Run] = {}
    failures = []
    results: dict[str, tuple[Tensor, ...]] = {}
    for name, run in runs(problem, precision, device).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # inductor's, of the FFT
                for _ in range(_WARM_UP):
                    results[name] = tuple(x.detach().clone() for x in run())
            ready[name] = run
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    expected = "triton" if device.type == "cuda" else None
    if expected is not None and featkd.last_backend(problem.op) != expected:
        failures.append(f"featkd ran on {featkd.last_backend(problem.op)}")
    for name, gradients in results.items():
        for x, y in zip(gradients, results.get("eager", gradients), strict=True):
            gap = float((x.double() - y.double()).norm() / y.double().norm())
            if not gap < 0.06:
                failures.append(f"{name} differs from eager by {gap:.1e}")
    graphs = {} if device.type == "cpu" else _captured(ready, device, failures)
    for metric, steps in (("gpu_us", ready), ("graph_us", graphs)):
        for name, times in _times(steps, device).items():
            low, middle, high = quantiles(times)
            for suffix, value in (("", middle), ("_q20", low), ("_q80", high)):
                found.append((name, metric + suffix, "us", value))
    for name, run in ready.items():
        found.append((name, "host_us", "us", _host(run, device)))
    if failures:
        raise Failed("; ".join(failures), found)
    return found


def _captured(
    ready: dict[str, Run], device: torch.device, failures: list[str]
) -> dict[str, Callable[[], object]]:
    """The variants as CUDA graphs."""
    found: dict[str, Callable[[], object]] = {}
    for name, run in ready.items():
        try:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(2):
                    run()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = run()
            found[name] = partial(_replay, graph, kept)
        except Exception as error:
            failures.append(f"{name} as a CUDA graph: {type(error).__name__}: {str(error)[:300]}")
    return found


def _replay(graph: torch.cuda.CUDAGraph, kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    graph.replay()
    return kept


def _times(
    steps: dict[str, Run] | dict[str, Callable[[], object]], device: torch.device
) -> dict[str, list[float]]:
    """Microseconds in turns; on a GPU its own time, from a cold L2."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    if device.type == "cpu":
        for _ in range(3):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                times[name].append(1e6 * (time.perf_counter() - started))
        return times
    scratch = torch.empty(_L2_BYTES, dtype=torch.int8, device=device)
    for _ in range(_ROUNDS):
        events = {}
        for name, step in steps.items():
            scratch.zero_()
            events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            events[name][0].record()
            step()
            events[name][1].record()
        torch.cuda.synchronize(device)
        for name, (start, end) in events.items():
            times[name].append(1e3 * start.elapsed_time(end))
    return times


def _host(run: Run, device: torch.device) -> float:
    """Microseconds that a call keeps the host, the GPU's queue being empty at first."""
    found = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(_HOST_CALLS):
            run()
        found.append(1e6 * (time.perf_counter() - started) / _HOST_CALLS)
        if device.type == "cpu":
            break
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return min(found)
