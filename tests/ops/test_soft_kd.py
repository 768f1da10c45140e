"""soft_kd on the reference backend."""

from __future__ import annotations

import warnings

import pytest
import torch

import featkd
from featkd.functional import soft_kd
from tests.ops.comparing import views
from tests.ops.soft_kd_cases import Problem, assert_special_rows

PROBLEMS = [
    Problem(7, 1000),
    Problem(27, 100, alpha=0.3, tau=2.0, soft=True),
    Problem(20, 33, alpha=0.6, tau=0.5),
    Problem(60, 10, alpha=0.0),
    Problem(60, 10, alpha=0.0, soft=True),
    Problem(60, 10, alpha=1.0, tau=4.0, soft=True),
    Problem(1, 12),
    Problem(3, 1, alpha=0.5, soft=True),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_error_is_at_most_twice_torchs(problem):
    problem.assert_exact_in_all_dtypes()
    assert featkd.last_backend("soft_kd") == "reference"


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("soft", [False, True])
def test_nan_and_inf_propagate_as_in_equation(soft, alpha, tau):
    assert_special_rows(alpha, tau, soft)


def test_views_repeatability_and_unchanged_inputs():
    problem = PROBLEMS[1]
    inputs = problem.inputs(torch.float32)
    problem.assert_repeats(inputs)
    for name in ("sliced", "transposed"):
        viewed = {n: views(x)[name] for n, x in inputs.items()}
        problem.assert_exact(problem.run(viewed), inputs)


def test_target_requiring_grad_uses_reference(launched, triton):
    inputs = Problem(4, 10, soft=True).inputs(torch.float64)
    student, teacher, target = inputs.values()
    target.requires_grad_()
    with pytest.warns(UserWarning, match="reference backend: a target that requires grad"):
        loss = soft_kd(student, teacher, target, alpha=0.75)
    assert featkd.last_backend("soft_kd") == "reference"
    (gradient,) = torch.autograd.grad(loss, target)
    torch.testing.assert_close(gradient, -0.25 / 4 * student.log_softmax(1))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        soft_kd(student, teacher, target, alpha=0.75)
    assert featkd.last_backend("soft_kd") == "triton"


def test_term_with_zero_weight_ignores_its_tensor():
    student, teacher, target = Problem(4, 10).inputs(torch.float32).values()
    out_of_range, nan = target + 100, torch.full_like(teacher, torch.nan)
    assert soft_kd(student, teacher, out_of_range, alpha=1.0).isfinite()
    assert soft_kd(student, nan, target, alpha=0.0).isfinite()


@pytest.mark.parametrize("label", [10, -1, -100])
def test_class_index_out_of_range_raises(label):
    student, teacher, target = Problem(4, 10).inputs(torch.float32).values()
    target[2] = label
    with pytest.raises(RuntimeError, match=f"index {label} is out of bounds .* with size 10"):
        soft_kd(student, teacher, target, alpha=0.5)
