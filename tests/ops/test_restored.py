"""A teacher's map in factors for the kernels: cut into chunks, and the chunks put together.

The kernels' own tests execute them. Here the CPU sweeps stand in for them, by the same contract.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import featkd
from featkd.cpu import lift_head as cpu_lift_head
from featkd.cpu.projected_feature_kd import sweep
from featkd.factors import restore
from featkd.kernels import lift_head, projected_feature_kd, restored, scaled
from featkd.kernels.launch import redirect
from featkd.ops import lift_head as lift_head_op
from featkd.ops import projected_feature_kd as projected_feature_kd_op
from tests.kernels import lift_head_cases
from tests.kernels.feature_kd_cases import Problem, evaluate, relative
from tests.ops.test_opcheck import DTYPES, NEEDS, check, launched  # noqa: F401
from tests.ops.test_teacher_in_factors import factors, run

EPS = 1e-5


def marks(rows: Tensor) -> Tensor:
    """In place of a kernel's statistics (B N, 4): what tells whose they are."""
    return rows.reshape(-1, rows.shape[2])[:, :4].clone()


def projected_forward(student, teacher, parameters, *, need_student, need_parameters, **options):
    total, gradient, _ = sweep(
        *(student, teacher, *parameters), need_student=True, need_parameters=False, **options
    )
    kept = marks(student) if need_parameters and parameters.gamma is not None else None
    return total, gradient if need_student else None, kept


def projected_backward(student, teacher, parameters, statistics, factor, *, exact, **options):
    assert exact
    assert statistics is None or torch.equal(statistics, marks(student))
    options |= {"eps": EPS, "need_student": False, "need_parameters": True}
    _, _, flat = sweep(student, teacher, *parameters, **options)
    there = iter(torch.split(flat * factor, [p.numel() for p in parameters if p is not None]))
    return [None if p is None else next(there).view(p.shape).clone() for p in parameters]


def lift_forward(features, head, teacher, *, need_statistics, **options):
    found = cpu_lift_head.forward(features, *head, teacher, need_gradient=False, **options)
    return found.pooled, found.energy, marks(features) if need_statistics else None


def lift_backward(features, head, teacher, statistics, d_loss, d_pooled, *, exact, **options):
    assert exact
    assert torch.equal(statistics, marks(features))
    none = features.new_empty(0)
    return cpu_lift_head.backward_with_loss(
        *(features, *head, teacher, none, d_pooled, d_loss), eps=EPS, **options
    )


@pytest.fixture
def stand_ins(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the maps that the stand-ins get; chunks hold two images of 12 tokens."""
    shapes: list[tuple[int, ...]] = []

    def noted(function: Any, place: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            shapes.append(tuple(arguments[place].shape))
            return function(*arguments, **options)

        return call

    def refuse(*_: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(restored, "_ROWS", 30)
    monkeypatch.setattr(projected_feature_kd, "forward", noted(projected_forward, 1))
    monkeypatch.setattr(projected_feature_kd, "backward", noted(projected_backward, 1))
    monkeypatch.setattr(lift_head, "forward", noted(lift_forward, 2))
    monkeypatch.setattr(lift_head, "backward", noted(lift_backward, 2))
    monkeypatch.setattr(scaled, "times", torch.mul)
    with redirect(refuse), featkd.use_backend("triton"):
        yield shapes


@pytest.mark.parametrize(
    "problem",
    [
        Problem(5, 12, 6, 10, 4, bias=True),
        Problem(5, 12, 6, 10, norm="none"),
        Problem(5, 12, 6, 6, projector=False, norm="none"),
        Problem(1, 12, 6, 10),
        Problem(2, 40, 6, 10),  # more tokens than a chunk has rows
    ],
    ids=str,
)
def test_projected_feature_kd(stand_ins, problem):
    tensors, teacher = problem.tensors(torch.float64), factors(problem, torch.float64)
    tensors[1] = restore(teacher)
    got = run(tensors, teacher, problem.width)
    assert featkd.last_backend("projected_feature_kd") == "triton"
    want = evaluate(tensors, problem.width, torch.float64)
    assert set(got) == set(want)
    for name, value in want.items():
        assert relative(got[name], value) < 1e-12, name
    images = {5: [2, 2, 1], 1: [1], 2: [1, 1]}[problem.batch]
    passes = 1 + any(p is not None for p in tensors[2:])
    assert stand_ins == passes * [(n, *tensors[1].shape[1:]) for n in images]


def test_gradients_of_a_weight_in_half_precision_are_rounded_once(stand_ins):
    problem = Problem(64, 12, 6, 10)
    tensors, teacher = problem.tensors(torch.bfloat16), factors(problem, torch.bfloat16)
    tensors[1] = restore(teacher, torch.float64)
    got = run(tensors, teacher, 0)["weight"]
    assert len(stand_ins) == 2 * 32
    want = evaluate(tensors, 0, torch.float64)["weight"]
    once = relative(want.to(torch.bfloat16), want)
    assert relative(got, want) < 1.1 * once


@pytest.mark.parametrize("width", [0, 4])
def test_lift_head(stand_ins, width):
    x = lift_head_cases.Problem(5, 12, 6, 10, width).inputs(torch.float64)
    teacher = factors(Problem(5, 12, 6, 10), torch.float64)
    got = lift_head_cases.run(x._replace(teacher=teacher), width)
    assert featkd.last_backend("lift_head") == "triton"
    want = lift_head_cases.evaluate(x._replace(teacher=restore(teacher)), width)
    assert set(got) == set(want)
    for name, value in want.items():
        assert relative(got[name], value) < 1e-12, name
    assert stand_ins == 2 * [(2, 12, 10), (2, 12, 10), (1, 12, 10)]


@pytest.mark.parametrize("needs", NEEDS)
def test_opcheck_of_projected_feature_kd(launched, monkeypatch, needs):  # noqa: F811
    monkeypatch.setattr(restored, "_ROWS", 12)
    dtype, compute = DTYPES[1]
    problem = Problem(2, 12, 6, 10, 4)
    student, _, *parameters = problem.tensors(dtype)
    left, right = factors(problem, torch.float16)
    given, rest = (student, left, *parameters), (4, compute, *needs, "triton", right)
    _, *kept = check(projected_feature_kd_op._forward, *given, 1e-5, *rest)
    check(projected_feature_kd_op._backward, torch.tensor(2.0), *kept, *given, *rest)
    assert "loss_and_student_gradient" in launched


def test_opcheck_of_lift_head(launched, monkeypatch):  # noqa: F811
    monkeypatch.setattr(restored, "_ROWS", 12)
    x = lift_head_cases.Problem(2, 12, 6, 10, 4).inputs(torch.float16)
    left, right = factors(Problem(2, 12, 6, 10), torch.float32)
    given = (x.features, x.weight, x.norm_weight, x.norm_bias, left)
    rest = (1e-5, 4, torch.float16, True, True, "triton", right)
    kept = check(lift_head_op._forward, *given, *rest)[2:]
    for pair in ((x.direction, torch.tensor(2.0)), (x.direction, None), (None, torch.tensor(2.0))):
        check(lift_head_op._backward, *pair, *kept, *given, *rest)
    assert "head_gradients" in launched
