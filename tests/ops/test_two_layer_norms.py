"""widelast_projection on the reference backend."""

from __future__ import annotations

import pytest
import torch

import featkd
from tests.ops.comparing import relative, views
from tests.ops.norms_cases import NORMS, Problem

PROBLEMS = [
    Problem(2, 98, 24, 40),
    Problem(1, 1, 5, 7),
    Problem(3, 10, 7, 9, ("residual",)),
    Problem(5, 12, 10, 8, ("normed",)),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_error_is_at_most_twice_torchs(problem):
    problem.assert_exact_in_all_dtypes()
    assert featkd.last_backend("widelast_projection") == "reference"


def test_views_repeatability_and_unchanged_inputs():
    problem = PROBLEMS[0]
    inputs = problem.inputs(torch.float32)
    problem.assert_repeats(inputs)
    for x in views(inputs["x"]).values():
        problem.assert_exact(problem.run(inputs | {"x": x}), inputs)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_maps(shape):
    problem = Problem(*shape, 6, 10)
    got = problem.run(problem.inputs(torch.float32))
    assert got["residual"].shape == got["normed"].shape == (*shape, 10)
    assert got["d_x"].shape == (*shape, 6)
    assert not any(x.any() for x in got.values())


def test_expanded_upstream_gradient(executed, triton):
    """The gradient of `sum` is one number, expanded to the output's shape."""
    problem = Problem(3, 6, 12, 20)
    inputs = {n: x.requires_grad_() for n, x in problem.inputs(torch.float32).items()}
    r, u = problem.fused(**inputs).values()
    got = torch.autograd.grad(3 * r.sum() + u.square().sum(), list(inputs.values()))
    assert executed == ["two_norms_forward", "two_norms_backward", "sum_partials"]
    r, u = problem.plain(**inputs).values()
    want = torch.autograd.grad(3 * r.sum() + u.square().sum(), list(inputs.values()))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_rounds_only_matmul_and_normed_map(backend, cast, launched):
    problem = Problem(2, 12, 6, 10)
    inputs = problem.inputs(torch.float32)
    upstream = problem.upstream(inputs)
    upstream["normed"] = upstream["normed"].to(cast)
    with torch.autocast("cpu", dtype=cast), featkd.use_backend(backend):
        got = problem.run(inputs, upstream)
    assert (got["residual"].dtype, got["normed"].dtype) == (torch.float32, cast)
    assert all(got[f"d_{n}"].dtype == torch.float32 for n in ("x", "weight", *NORMS))
    if backend == "reference":
        rounded = {n: x.to(cast) if n in ("x", "weight") else x for n, x in inputs.items()}
        want = problem.run(rounded, {n: x.to(cast) for n, x in upstream.items()}, by_torch=True)
        for n, x in got.items():
            assert relative(x, want[n]) < 1e-2, n
