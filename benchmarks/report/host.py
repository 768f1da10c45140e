"""Host side of an op: its launches, torch's operators around them, and the time without a GPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import featkd
from featkd.functional import projected_feature_kd
from featkd.kernels.launch import redirect

from ..cases import OPS, ROW_OPS
from ..problem import Case, Function
from ..results import Measured
from ..sizes import Maps, Sizes
from ..timing import clock_for, take_turns
from ..variants import step_of

# operators of torch that launch nothing on a GPU: they allocate tensors or make views
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "permute",
    "resize_", "resolve_conj", "select", "slice", "t", "to", "transpose", "unsqueeze", "view",
    "view_as_complex", "view_as_real", "_unsafe_view",
}  # fmt: skip
_PRODUCTS = {"mm", "addmm", "bmm"}
_MOST_RATIO = 2  # rule of docs/kernels.md


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
        if kind == "aten" and name not in FREE and (name in _PRODUCTS or not below):
            names.append(name)
    return names


@dataclass(frozen=True)
class HostTime:
    """Microseconds of a call, forward and backward, without its launches."""

    name: str
    us: float
    plain_us: float
    """Microseconds of the same in plain torch, which computes on tensors of a few elements."""

    @property
    def ratio(self) -> float:
        return self.us / self.plain_us

    @property
    def broken(self) -> list[str]:
        """Rule of docs/kernels.md that the call breaks."""
        if self.ratio <= _MOST_RATIO:
            return []
        return [f"{self.ratio:.2f} times plain torch's host time, more than {_MOST_RATIO}"]

    def figures(self) -> list[Measured]:
        """Returns the figures in the JSON form."""
        return [
            (self.name, "launches left out", "featkd", "us", self.us),
            (self.name, "launches left out", "torch", "us", self.plain_us),
            (self.name, "launches left out", "ratio", "ratio", self.ratio),
        ]


def measure(rounds: int = 1500) -> list[HostTime]:
    """Measures the least of many calls, in turns with plain torch."""
    pairs = _pairs()
    sides = ("featkd", "torch")
    steps = {
        f"{op} {side}": step_of(call)
        for op, pair in pairs.items()
        for side, call in zip(sides, pair, strict=True)
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with featkd.use_backend("triton"), redirect(lambda *_: None):
            times = take_turns(steps, clock_for(torch.device("cpu")), min_rounds=rounds)
    finally:
        torch.set_num_threads(threads)
    return [HostTime(op, *(1e6 * min(times[f"{op} {side}"]) for side in sides)) for op in pairs]


def _pairs() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Returns featkd's call and plain torch's by name, forward and backward."""
    found = {}
    for op in ROW_OPS:
        for problem in OPS[op](Sizes((Maps(2, (2, 2), 8, 16),), ((4, 10),))):
            if problem.form in ("mse-lift", "mse", "two-norms", "indices"):
                inputs = Case(problem, "fp32", "both").inputs(torch.device("cpu"))
                leaves = [inputs[name] for name in problem.differentiable]
                found[f"{op}/{problem.form}"] = (
                    _call(problem.featkd, inputs, leaves),
                    _call(problem.eager, inputs, leaves),
                )
    rows, gamma, beta = torch.randn(2, 4, 16), torch.ones(16), torch.zeros(16)
    leaves = [x.requires_grad_() for x in (rows, gamma, beta)]
    inputs = {"rows": rows, "teacher": torch.randn(2, 4, 16), "gamma": gamma, "beta": beta}
    found["projected_feature_kd/mse and norm alone"] = (
        _call(_loss, inputs, leaves),
        _call(_plain_loss, inputs, leaves),
    )
    return found


def _loss(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    norm = (x["gamma"], x["beta"])
    return (projected_feature_kd(x["rows"], x["teacher"], None, None, *norm),)


def _plain_loss(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (F.mse_loss(F.layer_norm(x["rows"], (16,), x["gamma"], x["beta"]), x["teacher"]),)


def _call(
    function: Function, inputs: dict[str, Tensor], leaves: list[Tensor]
) -> Callable[[], object]:
    upstream = [torch.ones_like(x) for x in function(inputs)]
    return lambda: torch.autograd.grad(function(inputs), leaves, upstream)
