"""Parts: the checks of tests/gpu, distributed over the processes of each part."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import torch

from tests.gpu import accuracy, batches, behaviour, decompositions
from tests.gpu.forms import FORMS, MAIN

from .recorder import Figure, Recorder

Work = Callable[[], Sequence[Figure] | None]


def ops(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """Checks batches and the fused ops; shuffles the cases, as a run may be cut short."""
    cases = list(accuracy.cases(small=device.type == "cpu"))
    random.Random(0).shuffle(cases)
    items: dict[str, Work] = {
        f"batches/{check.__name__}": partial(check, device) for check in batches.CHECKS
    }
    items |= _behaviour(behaviour.QUICK, device)
    items |= {str(case): partial(_measured, case, device) for case in cases}
    recorder.run_share(items, shard, shards)


def compiled(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """Checks the fused ops in torch.compile's modes."""
    items = _behaviour(behaviour.COMPILED, device)
    if device.type == "cpu":
        items = {k: v for k, v in items.items() if k.startswith("lift_head/spectral/compiled")}
    recorder.run_share(items, shard, shards)


def large(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """Checks maps of more than 2^31 elements, one at a time: each takes up to 40 GiB."""
    for name, work in _behaviour(behaviour.LARGE, device).items():
        recorder.run(name, work)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def linalg(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """Checks the operators of csrc."""
    checks = decompositions.cases(small=device.type == "cpu")
    items: dict[str, Work] = {name: partial(check, device) for name, check in checks.items()}
    recorder.run_share(items, shard, shards)


def _behaviour(checks: Sequence[behaviour.Check], device: torch.device) -> dict[str, Work]:
    return {
        f"{form}/{check.__name__}": partial(check, FORMS[form], device)
        for check in checks
        for form in MAIN
    }


def _measured(case: accuracy.Case, device: torch.device) -> list[Figure]:
    """Returns the largest error of a case, and its ratio to the allowed error."""
    errors = accuracy.check(case, device)
    worst = max(errors, key=lambda e: e.error / e.allowed)
    return [
        ("featkd", "error", "ratio", worst.error),
        ("eager", "error", "ratio", worst.eager),
        ("featkd", "error_over_allowed", "ratio", worst.error / worst.allowed),
    ]
