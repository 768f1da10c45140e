"""Peak memory of a call above what was allocated before it."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .variants import Step

_MARK = "featkd: the timed part"


def extra_peak(step: Step, device: torch.device) -> int:
    """Returns the peak bytes of tensors during the timed part of a step, results included.

    On a CPU every allocation and release of torch's allocator is recorded, also those inside
    operators; scratch that a BLAS library allocates itself is not counted. On a GPU this is the
    peak of the caching allocator.
    """
    return _gpu_peak(step, device) if device.type == "cuda" else _cpu_peak(step)


def _gpu_peak(step: Step, device: torch.device) -> int:
    ready = step.prepare()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = step.run(ready)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del results
    return peak


def _cpu_peak(step: Step) -> int:
    # the preparation is recorded too: a backward pass releases what its forward pass saved, and
    # the profiler reports no release of memory from before the recording
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        ready = step.prepare()
        with record_function(_MARK):
            results = step.run(ready)
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    # the results are alive, so that there must be a memory event unless the profiler renamed them
    if not any(e.name() == "[memory]" for e in events) and any(x.numel() for x in results):
        raise RuntimeError(f"torch {torch.__version__}: its profiler recorded no allocation")
    held = before = highest = 0
    timed = False
    for event in events:
        if event.name() == _MARK:
            timed, before, highest = True, held, held
        elif event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held) if timed else highest
    return highest - before
