"""Modelled times of whole ops on an H200, forward and backward, from bytes and operations.

Every product and every pass over the rows takes the longer of its bytes at the memory's rate and
its operations at the tensor cores'. Launches, latencies and caches are left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import cases
from ..problem import Problem
from ..results import Measured
from ..sizes import SETS
from . import traffic
from .host import FREE

BYTES_PER_US = 4e6  # 4 TB/s of the data sheet's 4.8
FLOPS_PER_US = 600e6  # thin products reach less than the data sheet's 989 TFLOP/s

# form -> form of the row op, and passes over a map of (B, N, Ct) in the least that torch.compile
# makes of the reference: P and T read for the loss, both read and dP written for the gradient, as
# in featkd. The norms' parameter gradients and the spectral metric's row sums are sums over rows,
# not channels, and read P and T once more; the mean over the tokens reads P once more.
_FORMS = {
    "mse-lift": ("mse", 2 + 3 + 2),
    "spectral-lift": ("spectral", 4 + 3 + 2),
    "mse-widelast": ("mse", 2 + 3),
    "spectral-widelast": ("spectral", 4 + 3),
    "two-norms": ("two-norms", 3 + 4 + 3),
    "mse": ("pooled", 3 + 3 + 2),
    "indices": ("soft_kd", 2 + 3),
}


class _Passes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the modelled time of torch's operators, one by one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = 0.0
        self.others = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket).removeprefix("aten.")
        read, written = _bytes(args), _bytes(results)
        if name in ("mm", "addmm"):
            (m, k), (_, n) = (x.shape for x in args[-2:])
            bytes_us, flops_us = (read + written) / BYTES_PER_US, 2 * m * k * n / FLOPS_PER_US
            self.products += max(bytes_us, flops_us)
        elif name not in FREE:
            if name.startswith("new_"):
                read = 0
            if name == "native_layer_norm_backward":  # a second kernel sums over the rows
                read += _bytes(args[:2])
            if name == "mse_loss":  # the squares are written, and read to be summed
                written += _bytes(args[0]) * 2
            self.others += (read + written) / BYTES_PER_US
        return results


def _bytes(values: Any) -> int:
    if isinstance(values, Tensor):
        return values.nbytes
    return sum(map(_bytes, values)) if isinstance(values, (tuple, list)) else 0


def model(images: int = 256) -> list[Measured]:
    """Models the ops at the published sizes, all tensors in bf16; returns the JSON form."""
    return [
        (case, "modelled for an H200, not measured", form, "us", us)
        for op in cases.ROW_OPS
        for problem in cases.OPS[op](SETS["published"])
        if problem.batch == images and problem.form in _FORMS
        for case in [f"{problem.op}/{problem.form}/{problem.shape}/bf16"]
        for form, us in _model(problem).items()
    ]


def _model(problem: Problem) -> dict[str, float]:
    """Returns the microseconds of an op in three forms."""
    tensors = problem.tensors(partial(_on_meta, dtype=torch.bfloat16))
    leaves = [tensors[name].requires_grad_() for name in problem.differentiable]
    with _Passes() as passes:
        outputs = problem.eager(tensors)
        torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs])
    map_ = tensors["teacher"] if "teacher" in tensors else outputs[0]
    form, compiled_passes = _FORMS[problem.form]
    if problem.form.endswith("-widelast"):
        ours = 5 * map_.nbytes  # without a norm there are neither statistics nor partial sums
    else:
        rows = traffic.Rows(form, "bf16", problem.batch, channels=map_.shape[-1])
        ours = sum(x.moved for x in traffic.add_up(rows))
    return {
        "eager": passes.products + passes.others,
        "compiled": passes.products + compiled_passes * map_.nbytes / BYTES_PER_US,
        "featkd": passes.products + ours / BYTES_PER_US,
    }


def _on_meta(*shape: int, dtype: torch.dtype, scale: float = 1, mean: float = 0) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
