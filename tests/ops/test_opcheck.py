"""torch's checks of the custom ops: backward ops, and every op on the branch to Triton.

There the launches write zeros: shapes, dtypes, strides and aliases are looked at, not numbers. The
forward and lift_head's backward op on CPU tensors have theirs beside the ops' other tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from featkd.kernels.launch import redirect
from featkd.ops import (
    lift_head,
    projected_feature_kd,
    soft_kd,
    widelast_projection,
)
from tests.kernels.conftest import WRITTEN
from tests.kernels.feature_kd_cases import Problem as FeatureProblem
from tests.kernels.lift_head_cases import Problem as LiftProblem
from tests.kernels.soft_kd_cases import Problem as LogitsProblem
from tests.kernels.widelast_cases import EPS
from tests.kernels.widelast_cases import Problem as WideProblem

# the inputs' dtype, and the one in which they are multiplied
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
]
NEEDS = [(True, True), (True, False), (False, True)]
# arguments of kernels that come with their strides
STRIDED = {
    *("student", "teacher", "target", "features", "x", "weight", "partial"),
    *("d_residual", "d_normed"),
}


@pytest.fixture
def launched() -> Iterator[list[str]]:
    """The names of the kernels that a test would have launched, with tensors that they can read."""
    names: list[str] = []

    def write_zeros(kernel: Any, grid: Any, arguments: dict[str, Any], options: Any) -> None:
        names.append(kernel.fn.__name__)
        for name, x in arguments.items():
            contiguous = not isinstance(x, Tensor) or name in STRIDED or x.is_contiguous()
            assert contiguous, f"{names[-1]} reads {name} by no strides, and got {x.stride()}"
        for name in WRITTEN[names[-1]]:
            if arguments[name] is not None:
                arguments[name].zero_()

    with redirect(write_zeros):
        yield names


def turned(weight: Tensor) -> Tensor:
    """Equal in every element, and not contiguous."""
    return weight.t().contiguous().t()


def check(op: Any, *arguments: Any) -> Any:
    """All of opcheck's tests; the op's result."""
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}
    return op(*arguments)


FORMS = [
    FeatureProblem(2, 12, 6, 10, 4, bias=True),
    FeatureProblem(2, 12, 6, 10, norm="weight"),
    FeatureProblem(2, 12, 6, 10, 4, norm="none"),
    FeatureProblem(2, 12, 6, 6, projector=False, norm="none"),
    FeatureProblem(2, 12, 6, 6, 4, projector=False),
]


def check_projected(problem: FeatureProblem, dtypes: Any, needs: Any, backend: str) -> None:
    dtype, compute = dtypes
    tensors = problem.tensors(dtype)
    rest = (problem.width, compute, needs[0], needs[1], backend)
    _, *kept = check(projected_feature_kd._forward, *tensors, 1e-5, *rest)
    check(projected_feature_kd._backward, torch.tensor(2.0), *kept, *tensors, *rest)


def check_lift_head(problem: LiftProblem, dtypes: Any, needs: Any, backend: str) -> None:
    dtype, compute = dtypes
    x = problem.inputs(dtype)
    tensors = (x.features, turned(x.weight), *x[2:5])
    rest = (1e-5, problem.width, compute, *needs, backend)
    kept = check(lift_head._forward, *tensors, *rest)[2:]
    d_loss = torch.tensor(2.0) if problem.compare else None
    pairs = [
        (x.direction, d_loss),
        (turned(x.direction), d_loss),
        *([(None, d_loss)] if problem.compare else []),
    ]
    for gradients in pairs:
        check(lift_head._backward, *gradients, *kept, *tensors, *rest)


def check_widelast(dtypes: Any, needs: Any, backend: str) -> None:
    dtype, compute = dtypes
    x, weight, *norms, d_residual, d_normed = WideProblem(2, 12, 6, 10).tensors(dtype)
    inputs = (x, turned(weight), *norms)
    residual_dtype = torch.float32 if compute != dtype else dtype
    r, u, *kept = check(
        widelast_projection._forward, *inputs, EPS, compute, residual_dtype, True, backend
    )
    d_residual, d_normed = d_residual.to(r.dtype), d_normed.to(u.dtype)
    strided = d_residual.mT.contiguous().mT, d_normed[:1, :1, :1].expand(d_normed.shape)
    for pair in ((d_residual, d_normed), (None, d_normed), (d_residual, None), strided):
        check(widelast_projection._backward, *pair, *kept, *inputs, compute, *needs, backend)


def check_soft_kd(problem: LogitsProblem, dtype: torch.dtype, backend: str) -> None:
    student, teacher, target = problem.tensors(dtype)
    labels = target if problem.alpha < 1 else None
    weights = (problem.alpha, problem.tau)
    for need in (False, True):
        _, gradient = check(
            soft_kd._forward, turned(student), teacher, labels, *weights, need, backend
        )
    check(soft_kd._backward, torch.tensor(2.0), gradient, turned(student), backend)


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("problem", FORMS, ids=str)
def test_projected_feature_kd_on_a_cpu(problem, needs):
    needs = (needs[0], needs[1] and any(p is not None for p in problem.tensors(torch.half)[2:]))
    if any(needs):
        check_projected(problem, DTYPES[0], needs, "cpu")


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widelast_projection_on_a_cpu(dtype, needs):
    check_widelast((dtype, dtype), needs, "cpu")


LOGITS = [
    LogitsProblem(4, 10),
    LogitsProblem(4, 10, alpha=0.0, soft=True),
    LogitsProblem(4, 10, alpha=1.0, tau=2.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", LOGITS, ids=str)
def test_soft_kd_on_a_cpu(problem, dtype):
    check_soft_kd(problem, dtype, "cpu")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("problem", FORMS, ids=str)
def test_projected_feature_kd_for_triton(problem, dtypes, launched):
    dtypes = dtypes if problem.projector else dtypes[:1] * 2
    there = any(p is not None for p in problem.tensors(torch.half)[2:])
    check_projected(problem, dtypes, (True, there), "triton")
    assert launched


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("compare", [True, False])
def test_lift_head_for_triton(compare, dtypes, launched):
    for needs in NEEDS:
        check_lift_head(LiftProblem(2, 12, 6, 10, 4, compare), dtypes, needs, "triton")
    assert {"pool_and_distance", "features_gradient", "head_gradients"} <= set(launched)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_widelast_projection_for_triton(dtypes, launched):
    for needs in NEEDS:
        check_widelast(dtypes, needs, "triton")
    assert {"project_and_normalise", "input_gradient"} <= set(launched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("problem", LOGITS, ids=str)
def test_soft_kd_for_triton(problem, dtype, launched):
    check_soft_kd(problem, dtype, "triton")
    assert launched
