"""projected_feature_kd and lift_head on the reference backend."""

from __future__ import annotations

import pytest
import torch

import featkd
from featkd.functional import lift_head, projected_feature_kd
from tests.ops.comparing import relative, views
from tests.ops.feature_cases import EPS, Problem

PROBLEMS = [
    Problem(2, 196, 40, 14, student=24),
    Problem(3, 9, 8, 3, student=8, bias=True),
    Problem(1, 1, 7, 1, student=5, norm="weight"),
    Problem(5, 12, 7, norm="none"),
    Problem(5, 12, 7, 3),
    Problem(2, 196, 40, 14, student=24, pooled=True),
    Problem(3, 10, 6, student=8, pooled=True),
    Problem(3, 10, 6, student=8, teacher=False, pooled=True),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_error_is_at_most_twice_torchs(problem):
    problem.assert_exact_in_all_dtypes()
    op = "lift_head" if problem.pooled else "projected_feature_kd"
    assert featkd.last_backend(op) == "reference"


@pytest.mark.parametrize("problem", [PROBLEMS[1], PROBLEMS[4], PROBLEMS[5]], ids=str)
def test_views_repeatability_and_unchanged_inputs(problem):
    inputs = problem.inputs(torch.float32)
    problem.assert_repeats(inputs)
    for name in ("sliced", "transposed"):
        viewed = {n: views(x)[name] if x.dim() == 3 else x for n, x in inputs.items()}
        problem.assert_exact(problem.run(viewed), inputs)
    expanded = inputs | {n: inputs[n][:1].expand_as(inputs[n]) for n in ("student", "teacher")}
    whole = {n: x.contiguous() for n, x in expanded.items()}
    problem.assert_exact(problem.run(expanded), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("problem", [PROBLEMS[1], PROBLEMS[3], PROBLEMS[5]], ids=str)
def test_nan_and_inf_propagate_to_dependent_outputs(problem, bad):
    for name in ("student", "teacher"):
        inputs = problem.inputs(torch.float32)
        inputs[name][1, 3, 2] = bad
        got = problem.run(inputs)
        assert not got["loss"].isfinite()
        hit = (~got["d_student"].isfinite()).nonzero()[:, 0]
        assert set(hit.tolist()) == {1}
        others = [x for n, x in got.items() if n.startswith("d_") and n != "d_student"]
        assert not any(x.isfinite().all() for x in others)


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_only(output, executed, triton):
    problem = Problem(3, 12, 20, 4, student=12, pooled=True)
    inputs = {n: x.requires_grad_(n != "teacher") for n, x in problem.inputs(torch.float32).items()}
    leaves = [x for x in inputs.values() if x.requires_grad]
    options = {"eps": EPS, "metric": "spectral", "grid": (3, 4)}
    others = {n: x for n, x in inputs.items() if n != "student"}
    found = {}
    for backend in ("triton", "reference"):
        with featkd.use_backend(backend):
            used = lift_head(inputs["student"], **others, **options)[output]
        found[backend] = torch.autograd.grad(used.sum() if output == 0 else used, leaves)
    assert len(executed) == 4
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        assert relative(ours, theirs) < 2e-6


@pytest.mark.parametrize("name", ["student", "weight", "norm_weight", "norm_bias"])
def test_backward_computes_only_required_gradients(name, launched, triton):
    inputs = Problem(2, 12, 10, 4, student=6).inputs(torch.float32)
    inputs[name].requires_grad_()
    loss = projected_feature_kd(**inputs)
    assert torch.autograd.grad(loss, inputs[name])[0].shape == inputs[name].shape
    with torch.no_grad():
        assert not projected_feature_kd(**inputs).requires_grad
    of_norm = name.startswith("norm")
    back = ["distance_backward", *["sum_partials"] * of_norm]
    assert launched == ["distance_forward", "sum_partials", *back, *launched[:2]]


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_rounds_only_matmul(backend, cast, launched):
    problem = Problem(2, 12, 10, 4, student=6, pooled=True)
    inputs = problem.inputs(torch.float32)
    with torch.autocast("cpu", dtype=cast), featkd.use_backend(backend):
        got = problem.run(inputs)
    assert all(x.dtype == torch.float32 for x in got.values())
    if backend == "reference":
        rounded = inputs | {n: inputs[n].to(cast) for n in ("student", "weight")}
        want = problem.run(rounded, by_torch=True)
        for n, x in got.items():
            # gradients of the matmul are rounded too, possibly to the other side of a tie
            assert relative(x, want[n]) < (1e-6 if n == "loss" else torch.finfo(cast).eps), n
