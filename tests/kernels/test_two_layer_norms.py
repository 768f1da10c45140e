"""Kernels of widelast_projection: PTX, executed with all checks."""

from __future__ import annotations

import pytest
import torch

import featkd
from tests.kernels.conftest import executing, tokens_far_apart
from tests.ops.comparing import assert_same_bits, spread, views
from tests.ops.norms_cases import Problem

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# (problem, dtype of the rows, dtype of the norms' parameters). Together they cover: partly filled
# tiles; one and several tiles per program; both outputs used, and each alone
CASES = [
    (Problem(3, 49, 24, 200), BF16, F32),
    (Problem(2, 9, 20, 33, ("normed",)), F16, F16),
    (Problem(1, 1, 5, 7, ("residual",)), F32, F32),
    (Problem(2, 9, 20, 40), BF16, BF16),
]
LAUNCHES = ["two_norms_forward", "two_norms_backward", "sum_partials"]
SMALL = Problem(3, 6, 12, 20)


@pytest.fixture(autouse=True)
def triton():
    with featkd.use_backend("triton"):
        yield


@pytest.mark.parametrize(("problem", "rows", "parameters"), CASES, ids=str)
@pytest.mark.usefixtures("few_programs")
def test_error_is_at_most_twice_torchs(executed, problem, rows, parameters):
    inputs = problem.inputs(rows, parameters)
    got = problem.run(inputs)
    assert executed == LAUNCHES
    problem.assert_exact(got, inputs)


def test_error_at_published_widths(executed):
    problem = Problem(1, 98, 192, 384)
    inputs = problem.inputs(BF16, F32)
    got = problem.run(inputs)
    assert executed == LAUNCHES
    problem.assert_exact(got, inputs)


def test_views_and_expanded_gradients_are_bitwise_equal(executed):
    inputs = SMALL.inputs(BF16, F32)
    upstream = SMALL.upstream(inputs)
    upstream["normed"] = upstream["normed"][:1, :, :1].expand(3, 6, 20)
    plain = SMALL.run(inputs, {n: x.contiguous() for n, x in upstream.items()})
    for name in ("sliced", "transposed"):
        of_residual = {**upstream, "residual": views(upstream["residual"])[name]}
        viewed = {n: spread(x) if x.dim() == 1 else x for n, x in inputs.items()}
        assert_same_bits(SMALL.run(viewed, of_residual), plain)


def test_repeats_and_scaled_gradients_are_bitwise_equal(executed):
    """The order of threads differs between runs; scaling by a power of two is exact."""
    SMALL.assert_repeats_and_scales(SMALL.inputs(F32))


def test_gradient_offsets_beyond_int32():
    problem = Problem(1, 3, 5, 20)
    inputs = problem.inputs(BF16, F32)
    upstream = problem.upstream(inputs)
    with executing(check=False):  # checks would need memory for the gaps
        far = problem.run(inputs, {n: tokens_far_apart(x) for n, x in upstream.items()})
        assert_same_bits(far, problem.run(inputs, upstream))


@pytest.mark.parametrize("name", ["x", "normed", "residual"])
def test_nan_affects_only_its_row(executed, name):
    inputs = SMALL.inputs(BF16, F32)
    upstream = SMALL.upstream(inputs)
    (inputs | upstream)[name][1, 3, 2] = float("nan")
    got = SMALL.run(inputs, upstream)
    for output in ("residual", "normed", "d_x"):
        bad = [[1, 3]] if name == "x" or output == "d_x" else []
        assert (~got[output].isfinite().all(2)).nonzero().tolist() == bad, output
    assert not got["d_weight"].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_maps_launch_nothing(executed, shape):
    problem = Problem(*shape, 6, 10)
    got = problem.run(problem.inputs(BF16, F32))
    assert executed == []
    assert got["residual"].shape == got["normed"].shape == (*shape, 10)
    assert not any(x.any() for x in got.values())
