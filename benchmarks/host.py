"""What an op costs the host: its launches, torch's around them, and the time without any GPU."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import featkd
from featkd import functional
from featkd.kernels.launch import redirect

from .problem import Case

# operators of torch that start nothing on a GPU: they make tensors or look at them
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "permute",
    "resize_", "resolve_conj", "select", "slice", "t", "to", "transpose", "unsqueeze", "view",
    "view_as_complex", "view_as_real", "_unsafe_view",
}  # fmt: skip
_PRODUCTS = {"mm", "addmm", "bmm"}


@dataclass(frozen=True)
class Launches:
    """What one pass of an op starts on a GPU."""

    case: str
    direction: str
    kernels: tuple[str, ...]
    """featkd's, in order."""
    products: int
    """Matrix products, torch's."""
    others: Mapping[str, int]
    """Other operators of torch, by name."""


def count(case: Case) -> list[Launches]:
    """The launches of a case's forward and backward pass, recorded on the CPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # kineto's log of each recording
    inputs = case.inputs(torch.device("cpu"))
    leaves = [inputs[name] for name in case.problem.differentiable]
    made: list[str] = []
    found = []

    def watch(direction: str, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        made.clear()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            results = work()
        torchs = Counter(_operators(recorded))
        products = sum(torchs.pop(name, 0) for name in _PRODUCTS)
        name = case.name.rsplit("/", 1)[0]
        found.append(Launches(name, direction, tuple(made), products, dict(torchs)))
        return results

    def forward() -> tuple[Tensor, ...]:
        with case.context(torch.device("cpu")):
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
    """Names of those that start something: products, and what calls no other operator."""
    names = []
    for event in recorded.events():
        kind, _, name = event.name.partition("::")
        below = [x for x in event.cpu_children if x.name.startswith("aten::")]
        if kind == "aten" and name not in FREE and (name in _PRODUCTS or not below):
            names.append(name)
    return names


@dataclass(frozen=True)
class HostTime:
    """Microseconds of a call, forward and backward, whose launches do nothing."""

    op: str
    us: float
    plain_us: float
    """Of the same in plain torch, on the same tensors of a few elements."""

    @property
    def broken(self) -> list[str]:
        """The rule of docs/kernels.md: at most twice plain torch's."""
        ratio = self.us / self.plain_us
        return [f"{ratio:.2f} times plain torch's host time"] if ratio > 2 else []


def measure(rounds: int = 1500) -> list[HostTime]:
    """The least of many calls, in turns with plain torch's; the launches are left out."""
    pairs = _pairs()
    times = {name: [float("inf"), float("inf")] for name in pairs}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with featkd.use_backend("triton"), redirect(lambda *_: None):
            for _ in range(rounds):
                for name, pair in pairs.items():
                    for which, call in enumerate(pair):
                        start = time.perf_counter()
                        call()
                        spent = 1e6 * (time.perf_counter() - start)
                        times[name][which] = min(times[name][which], spent)
    finally:
        torch.set_num_threads(threads)
    return [HostTime(name, ours, plain) for name, (ours, plain) in times.items()]


def _pairs() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """featkd's call and plain torch's, by name."""
    x, weight = torch.randn(2, 4, 8), torch.randn(16, 8)
    rows, teacher = torch.randn(2, 4, 16), torch.randn(2, 4, 16)
    logits, taught, target = torch.randn(4, 10), torch.randn(4, 10), torch.arange(4)
    norms = [torch.ones(16) for _ in range(4)]
    for leaf in (x, weight, rows, logits, *norms):
        leaf.requires_grad_()
    one, pooled, map_ = torch.ones(()), torch.ones(2, 16), torch.ones(2, 4, 16)
    gamma, beta, gamma_1, beta_1 = norms

    def normed(h: Tensor, scale: Tensor = gamma, shift: Tensor = beta) -> Tensor:
        return F.layer_norm(h, (16,), scale, shift)

    def step(
        call: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor], upstream: list[Tensor]
    ) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), leaves, upstream)

    def two() -> tuple[Tensor, ...]:
        r = normed(F.linear(x, weight))
        return r, normed(r, gamma_1, beta_1)

    def head() -> tuple[Tensor, ...]:
        z = normed(F.linear(x, weight))
        return z.mean(1), F.mse_loss(z, teacher)

    def soft() -> tuple[Tensor, ...]:
        apart = F.kl_div(
            *(F.log_softmax(logits, 1), F.log_softmax(taught, 1)),
            reduction="batchmean",
            log_target=True,
        )
        return (0.5 * F.cross_entropy(logits, target) + 0.5 * apart,)

    distance = functional.projected_feature_kd
    few, all_ = [rows, gamma, beta], [x, weight, gamma, beta]
    return {
        "projected_feature_kd, norm; layer_norm, mse_loss": (
            step(lambda: (distance(rows, teacher, None, None, gamma, beta),), few, [one]),
            step(lambda: (F.mse_loss(normed(rows), teacher),), few, [one]),
        ),
        "projected_feature_kd, projector and norm; linear, layer_norm, mse_loss": (
            step(lambda: (distance(x, teacher, weight, None, gamma, beta),), all_, [one]),
            step(lambda: (F.mse_loss(normed(F.linear(x, weight)), teacher),), all_, [one]),
        ),
        "lift_head; linear, layer_norm, mean, mse_loss": (
            step(
                lambda: functional.lift_head(x, weight, gamma, beta, teacher),  # type: ignore[arg-type, return-value]
                all_,
                [pooled, one],
            ),
            step(head, all_, [pooled, one]),
        ),
        "widelast_projection; linear, two layer_norms": (
            step(
                lambda: functional.widelast_projection(x, weight, *norms),
                [x, weight, *norms],
                [map_, map_],
            ),
            step(two, [x, weight, *norms], [map_, map_]),
        ),
        "soft_kd; cross_entropy, two log_softmax, kl_div": (
            step(lambda: (functional.soft_kd(logits, taught, target, alpha=0.5),), [logits], [one]),
            step(soft, [logits], [one]),
        ),
    }
