"""Launches of an op, and torch's operators around them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import featkd
from featkd.kernels.launch import redirect

from ..problem import Case
from ..results import Measured

# operators of torch that launch nothing on a GPU: they allocate tensors or make views
_FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "permute",
    "resize_", "resolve_conj", "select", "slice", "t", "to", "transpose", "unsqueeze", "view",
    "view_as_complex", "view_as_real", "_unsafe_view",
}  # fmt: skip
_PRODUCTS = {"mm", "addmm", "bmm"}


@dataclass(frozen=True)
class Launches:
    """Launches of one pass of an op on a GPU."""

    name: str
    kernels: tuple[str, ...]
    """featkd's kernels, in order."""
    products: int
    """torch's matrix products."""
    others: Mapping[str, int]
    """Other operators of torch, by name."""

    def figures(self) -> list[Measured]:
        """Returns the figures in the JSON form."""
        numbers = {**Counter(self.kernels), "products": self.products, **self.others}
        return [(self.name, "launches", name, "count", n) for name, n in numbers.items()]


def count(case: Case) -> list[Launches]:
    """Records the launches of a case's forward and backward pass on the CPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences a log line per recording
    device = torch.device("cpu")
    inputs = case.inputs(device)
    leaves = [inputs[name] for name in case.problem.differentiable]
    made: list[str] = []
    found = []

    def watch(direction: str, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        made.clear()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            results = work()
        operators = Counter(_operators(recorded))
        products = sum(operators.pop(name, 0) for name in _PRODUCTS)
        found.append(Launches(f"{case.title}/{direction}", tuple(made), products, dict(operators)))
        return results

    def forward() -> tuple[Tensor, ...]:
        with case.context(device):
            return case.problem.featkd(inputs)

    with (
        featkd.use_backend("triton"),
        redirect(lambda kernel, *_: made.append(str(kernel.fn.__name__))),
    ):
        outputs = watch("forward", forward)
        upstream = [torch.ones_like(x) for x in outputs]
        watch("backward", lambda: torch.autograd.grad(outputs, leaves, upstream))
    return found


def _operators(recorded: Any) -> list[str]:
    """Returns the names of operators that launch something: products, and leaves of the calls."""
    names = []
    for event in recorded.events():
        kind, _, name = event.name.partition("::")
        below = [x for x in event.cpu_children if x.name.startswith("aten::")]
        if kind == "aten" and name not in _FREE and (name in _PRODUCTS or not below):
            names.append(name)
    return names
