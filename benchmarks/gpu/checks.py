"""Part: the checks of tests/gpu. Their items are dealt out to the processes of the part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from tests.gpu import accuracy, behaviour, decompositions

from .recorder import Figure, Recorder

Work = Callable[[], Sequence[Figure] | None]


def ops(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """Accuracy and behaviour of the fused ops."""
    small = device.type == "cpu"
    items: dict[str, Work] = {
        str(case): partial(_measured, case, device) for case in accuracy.cases(small=small)
    }
    if small:
        items = dict(list(items.items())[::6])
    # what takes long first: compilation
    for name, form, check in reversed(behaviour.cases()):
        items = {name: partial(check, form, device), **items}
    if small:
        items = {k: v for k, v in items.items() if not k.endswith("/compiled")}
    for number, (name, work) in enumerate(items.items()):
        if number % shards == shard:
            recorder.run(name, work)


def linalg(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """The operators of csrc."""
    for number, (name, check) in enumerate(
        decompositions.cases(small=device.type == "cpu").items()
    ):
        if number % shards == shard:
            recorder.run(name, partial(check, device))


def _measured(case: accuracy.Case, device: torch.device) -> list[Figure]:
    """The largest error of a case, as a multiple of what is allowed too."""
    errors = accuracy.check(case, device)
    worst = max(errors, key=lambda e: e.error / e.allowed)
    return [
        ("featkd", "error", "ratio", worst.error),
        ("eager", "error", "ratio", worst.eager),
        ("featkd", "error_over_allowed", "ratio", worst.error / worst.allowed),
    ]
