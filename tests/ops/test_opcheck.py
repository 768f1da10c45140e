"""torch.library.opcheck for the custom ops of the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import featkd.functional  # noqa: F401 - defines the ops
from tests.ops.comparing import views
from tests.ops.feature_cases import Problem as FeatureProblem
from tests.ops.norms_cases import NORMS
from tests.ops.norms_cases import Problem as NormsProblem
from tests.ops.soft_kd_cases import Problem as LogitsProblem

F16, F32 = torch.float16, torch.float32
ops = torch.ops.featkd


def check(op: Any, *arguments: Any) -> None:
    """Runs all tests of opcheck."""
    assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "problem",
    [
        FeatureProblem(2, 12, 10, 4, pooled=True),
        FeatureProblem(2, 12, 10, norm="weight"),
        FeatureProblem(2, 12, 10, 4, norm="none"),
        FeatureProblem(2, 12, 10, teacher=False, pooled=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F32)], ids=str)
def test_feature_distance(launched, problem, dtypes):
    x = problem.inputs(*dtypes)
    of_norm = {n: p.requires_grad_() for n, p in x.items() if n.startswith("norm")}
    names = ("norm_weight", "norm_bias")
    parameters = [None if of_norm.get(n) is None else of_norm[n].repeat(2)[::2] for n in names]
    d_loss = torch.tensor(2.0) if problem.teacher else None
    d_pooled = torch.ones(1, 10, dtype=F16).expand(2, -1) if problem.pooled else None
    for layout, gradients in (("sliced", (d_loss, d_pooled)), ("transposed", (d_loss, None))):
        student = views(x["student"])[layout].requires_grad_()
        teacher = views(x["teacher"])[layout] if problem.teacher else None
        rest = (0.1, problem.width, F16 if problem.pooled else None, layout == "sliced")
        inputs = (student, teacher, *parameters)
        check(ops.feature_distance, *inputs, *rest)
        _, _, statistics = ops.feature_distance(*inputs, *rest[:-1], True)
        kept = [None if p is None else p.detach() for p in (*inputs, statistics)]
        if gradients != (None, None):
            rest = (problem.width, layout == "sliced")
            check(ops.feature_distance_backward, *gradients, *kept, *rest)
    assert {"distance_forward", "distance_backward", "sum_partials"} == set(launched)


@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F32)], ids=str)
def test_two_layer_norms(launched, dtypes):
    problem = NormsProblem(2, 12, 10, 10)
    inputs = problem.inputs(*dtypes)
    upstream = problem.upstream(inputs)
    tensors = [inputs["x"].requires_grad_(), *(inputs[n].requires_grad_() for n in NORMS)]
    check(ops.two_layer_norms, *tensors, 0.1, F32)
    kept = [x.detach() for x in (views(inputs["x"])["transposed"], *tensors[1:])]
    turned = views(upstream["residual"])["sliced"]
    for pair in (tuple(upstream.values()), (None, turned), (turned[:1].expand(2, -1, -1), None)):
        for norms in (True, False):
            check(ops.two_layer_norms_backward, *pair, *kept, 0.1, norms)
    assert {"two_norms_forward", "two_norms_backward", "sum_partials"} == set(launched)


@pytest.mark.parametrize(("alpha", "soft"), [(0.0, False), (0.5, True), (0.5, False), (1.0, False)])
def test_soft_kd(launched, alpha, soft):
    x = LogitsProblem(4, 10, alpha, soft=soft).inputs(F16, F32)
    used = [x["teacher"] if alpha else None, x["target"] if alpha < 1 else None, alpha, 2.0]
    for student in (x["student"], *views(x["student"]).values()):
        check(ops.soft_kd, student.detach().requires_grad_(), *used)
        check(ops.soft_kd_backward, torch.tensor(2.0), student.detach(), *used)
    assert {"soft_kd_rows", "sum_partials"} == set(launched)
