"""Times of whole ops on an H200, forward and backward: modelled from bytes and flops, not measured.

Every product and every pass over the rows takes the longer of its bytes at the memory's rate and
its flops at the tensor cores'. No launch, no latency and no cache is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import cases, traffic
from .host import FREE
from .problem import Problem

BYTES_PER_US = 4e6  # 4 TB/s of the data sheet's 4.8
FLOPS_PER_US = 600e6  # of thin products, of the data sheet's 989 TFLOP/s

# Passes over a map of (B, N, Ct) in the least that torch.compile makes of the reference: reads of P
# and T for the loss, reads and a write for dP, as in featkd's form; the norms' parameter gradients
# sum over the rows, not the channels, and so read both once more; and so do the spectral metric's
# row sums, and the mean over the tokens reads P
_COMPILED_PASSES = {
    "mse-lift": 2 + 3 + 2,
    "spectral-lift": 4 + 3 + 2,
    "mse-widelast": 2 + 3,
    "spectral-widelast": 4 + 3,
    "two-norms": 3 + 4 + 3,
    "mse": 3 + 3 + 2,
    "indices": 2 + 3,
}
_ROWS = {
    "mse-lift": "mse",
    "spectral-lift": "spectral",
    "mse-widelast": "mse",
    "spectral-widelast": "spectral",
    "two-norms": "two-norms",
    "mse": "pooled",
    "indices": "soft_kd",
}


@dataclass(frozen=True)
class Modelled:
    """Microseconds of an op in three forms."""

    case: str
    eager: float
    compiled: float
    featkd: float


class _Passes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what torch's operators would take, one by one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = 0.0
        self.others = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket).removeprefix("aten.")
        given, made = _bytes(args), _bytes(results)
        if name in ("mm", "addmm"):
            (m, k), (_, n) = (x.shape for x in args[-2:])
            self.products += max((given + made) / BYTES_PER_US, 2 * m * k * n / FLOPS_PER_US)
        elif name not in FREE:
            if name.startswith("new_"):
                given = 0
            if name == "native_layer_norm_backward":  # a second kernel sums over the rows
                given += _bytes(args[:2])
            if name == "mse_loss":  # the squares are written, and read to be summed
                made += _bytes(args[0]) * 2
            self.others += (given + made) / BYTES_PER_US
        return results


def _bytes(of: Any) -> int:
    if isinstance(of, Tensor):
        return of.nbytes
    return sum(map(_bytes, of)) if isinstance(of, (tuple, list)) else 0


def model(images: int = 256) -> list[Modelled]:
    """The ops at the published sizes, all tensors bf16."""
    found = []
    for op in cases.ROW_OPS:
        for problem in cases.OPS[op]("published"):
            if problem.batch == images and problem.form in _ROWS:
                found.append(_model(problem))
    return found


def _model(problem: Problem) -> Modelled:
    normal = partial(_unfilled, dtype=torch.bfloat16)
    tensors = problem.tensors(normal)
    leaves = [tensors[name].requires_grad_() for name in problem.differentiable]
    with _Passes() as passes:
        outputs = problem.eager(tensors)
        torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs])
    map_ = tensors["teacher"] if "teacher" in tensors else outputs[0]
    channels = map_.shape[-1]
    rows = traffic.Rows(_ROWS[problem.form], "bf16", problem.batch, channels=channels)
    if problem.form.endswith("-widelast"):
        ours = 5 * map_.nbytes  # without a norm there are neither statistics nor partial sums
    else:
        ours = sum(x.moved for x in traffic.add_up(rows))
    compiled = _COMPILED_PASSES[problem.form] * map_.nbytes
    return Modelled(
        f"{problem.op}/{problem.form}/{problem.shape}/bf16",
        passes.products + passes.others,
        passes.products + compiled / BYTES_PER_US,
        passes.products + ours / BYTES_PER_US,
    )


def _unfilled(*shape: int, dtype: torch.dtype, scale: float = 1, mean: float = 0) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
