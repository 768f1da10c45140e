"""Around the kernels, only torch's linear layer, allocations and views run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.comparing import Tensors, differentiate
from tests.ops.feature_cases import Problem as FeatureProblem
from tests.ops.norms_cases import Problem as NormsProblem
from tests.ops.soft_kd_cases import Problem as LogitsProblem

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# operators that launch nothing on a GPU
FREE = {
    *("aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default"),
    *("aten.view.default", "aten.select.int", "aten.detach.default", "aten.alias.default"),
}


class Called(TorchDispatchMode):
    """Counts operators, including those called inside featkd's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names[str(function)] += 1
        if function.namespace != "featkd":
            return function(*args, **(kwargs or {}))
        with self:
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            return function.redispatch(keys, *args, **(kwargs or {}))


def operators(
    function: Callable[..., Tensors], inputs: Tensors, upstream: Tensors, constant: Any = ()
) -> Counter[str]:
    """Counts the operators of a forward and backward pass that launch a kernel."""
    with Called() as called:
        differentiate(function, inputs, upstream, constant)
    return Counter({n: count for n, count in called.names.items() if n not in FREE})


def linear(**inputs: Tensor) -> Tensors:
    x, weight, *bias = inputs.values()
    return {"out": F.linear(x, weight, *bias)}


def autocast(dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


# dtypes of the maps, of the parameters and of autocast
PAIRS = [
    (F32, F32, BF16), (F32, F32, F16), (BF16, F32, BF16),
    (F32, F32, None), (BF16, BF16, None), (F16, F16, None),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "parameters", "cast"), PAIRS, ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        FeatureProblem(2, 12, 10, 4, student=6, bias=True),
        FeatureProblem(2, 12, 10, student=6, pooled=True),
        FeatureProblem(2, 12, 10, student=6, teacher=False, pooled=True),
    ],
    ids=str,
)
@pytest.mark.usefixtures("triton")
def test_feature_distance(recorded, problem, rows, parameters, cast):
    inputs = problem.inputs(parameters) | {"student": problem.inputs(rows)["student"]}
    with autocast(cast):
        upstream = problem.fused(**inputs)
        recorded.clear()
        ours = operators(problem.fused, inputs, upstream, problem.constant)
        product = {n: x for n, x in inputs.items() if n in ("student", "weight", "bias")}
        theirs = operators(linear, product, {"out": linear(**product)["out"]})
    extra = {"featkd.feature_distance.default": 1, "featkd.feature_distance_backward.default": 1}
    assert ours - theirs == extra
    back = ["distance_backward", "sum_partials"]
    assert recorded == ["distance_forward", "sum_partials", *back]


@pytest.mark.parametrize(("rows", "parameters", "cast"), PAIRS, ids=str)
@pytest.mark.usefixtures("triton")
def test_two_layer_norms(recorded, rows, parameters, cast):
    problem = NormsProblem(2, 12, 6, 10)
    inputs = problem.inputs(parameters) | {"x": problem.inputs(rows)["x"]}
    with autocast(cast):
        upstream = problem.fused(**inputs)
        recorded.clear()
        ours = operators(problem.fused, inputs, upstream)
        product = {n: x for n, x in inputs.items() if n in ("x", "weight")}
        theirs = operators(linear, product, {"out": linear(**product)["out"]})
    extra = {"featkd.two_layer_norms.default": 1, "featkd.two_layer_norms_backward.default": 1}
    assert ours - theirs == extra
    assert recorded == ["two_norms_forward", "two_norms_backward", "sum_partials"]


@pytest.mark.parametrize("cast", [None, BF16, F16], ids=str)
@pytest.mark.parametrize("problem", [LogitsProblem(4, 10), LogitsProblem(4, 10, 0.5, 2, True)])
@pytest.mark.usefixtures("triton")
def test_soft_kd(recorded, problem, cast):
    for dtype, others in ((F32, F32), (BF16, F32), (F16, F16)):
        inputs = problem.inputs(dtype, others)
        upstream = problem.upstream(inputs)
        with autocast(cast):
            ours = operators(problem.fused, inputs, upstream, problem.constant)
        assert ours == {"featkd.soft_kd.default": 1, "featkd.soft_kd_backward.default": 1}
        assert recorded == ["soft_kd_rows", "sum_partials", "soft_kd_rows"]
        recorded.clear()
