"""Kernels of projected_feature_kd and lift_head: PTX, executed with all checks."""

from __future__ import annotations

import pytest
import torch

import featkd
from tests.kernels.conftest import executing, tokens_far_apart
from tests.ops.comparing import assert_same_bits, spread, views
from tests.ops.feature_cases import Problem

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# (problem, dtype of the rows, dtype of the norm's parameters). Together they cover: mse, and
# spectral with an odd, an even and a single column; one and several channel blocks; partly filled
# tiles; one and several images and tiles per program; each optional part present and absent
CASES = [
    (Problem(9, 35, 200, 5, student=24, bias=True), BF16, F32),
    (Problem(9, 20, 40, 4, norm="weight"), F16, F16),
    (Problem(2, 3, 7, 1, norm="none"), F32, F32),
    (Problem(9, 45, 300, student=16), F16, F32),
    (Problem(3, 9, 33, norm="none"), BF16, BF16),
    (Problem(3, 24, 136, 6, student=20, pooled=True), F32, F32),
    (Problem(9, 45, 72, student=20, teacher=False, pooled=True), BF16, BF16),
    (Problem(1, 1, 5, student=3, pooled=True), BF16, F32),
]
SMALL = Problem(3, 12, 20, 4, student=12, pooled=True)


def launches(problem: Problem) -> list[str]:
    """Expected launches: one row kernel for each pass, and one that adds up partial sums."""
    back = ["distance_backward", *["sum_partials"] * (problem.norm != "none")]
    return ["distance_forward", "sum_partials", *back]


@pytest.fixture(autouse=True)
def triton():
    with featkd.use_backend("triton"):
        yield


@pytest.mark.parametrize(("problem", "rows", "parameters"), CASES, ids=str)
@pytest.mark.usefixtures("few_programs")
def test_error_is_at_most_twice_torchs(executed, problem, rows, parameters):
    inputs = problem.inputs(rows, parameters)
    got = problem.run(inputs)
    assert executed == launches(problem)
    problem.assert_exact(got, inputs)


def test_error_at_published_widths_on_sm_90():
    problem = Problem(2, 49, 384, 7, student=192)
    inputs = problem.inputs(F16, F32)
    with executing(90) as executed:
        got = problem.run(inputs)
    assert executed == launches(problem)
    problem.assert_exact(got, inputs)


def test_views_are_bitwise_equal(executed):
    inputs = SMALL.inputs(BF16, F32)
    plain = SMALL.run(inputs)
    for name in ("sliced", "transposed"):
        viewed = {n: (views(x)[name] if x.dim() > 1 else spread(x)) for n, x in inputs.items()}
        got = SMALL.run(viewed)
        assert_same_bits(got, plain) if name == "sliced" else SMALL.assert_exact(got, inputs)
    expanded = {**inputs, "teacher": inputs["teacher"][:1].expand(3, -1, -1)}
    whole = {n: x.contiguous() for n, x in expanded.items()}
    assert_same_bits(SMALL.run(expanded), SMALL.run(whole))


def test_repeats_and_scaled_gradients_are_bitwise_equal(executed):
    """The order of threads differs between runs; scaling by a power of two is exact."""
    SMALL.assert_repeats_and_scales(SMALL.inputs(F32))


@pytest.mark.parametrize("layout", ["tokens", "images"])
def test_row_offsets_beyond_int32(layout):
    problem = Problem(1, 3, 20, norm="none")
    inputs = problem.inputs(BF16)
    far = {n: tokens_far_apart(x) for n, x in inputs.items()}
    if layout == "images":
        problem = Problem(3, 1, 20, norm="none")
        far, inputs = ({n: x.transpose(0, 1) for n, x in d.items()} for d in (far, inputs))
    with executing(check=False):  # checks would need memory for the gaps
        assert_same_bits(problem.run(far), problem.run(inputs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_propagate_to_dependent_outputs(executed, bad):
    for name in ("student", "teacher"):
        inputs = SMALL.inputs(BF16, F32)
        inputs[name][1, 3, 2] = bad
        got = SMALL.run(inputs)
        assert not got["loss"].isfinite()
        for reached in ("d_weight", "d_norm_weight", "d_norm_bias"):
            assert not got[reached].isfinite().all(), reached
        hit = (~got["d_student"].isfinite()).nonzero()
        assert set(hit[:, 0].tolist()) == {1}  # only this image
        assert set((hit[:, 1] // 4).tolist()) == {0}  # only its row of the patch grid
        pooled = got["pooled"].isfinite().all(1)
        assert pooled.tolist() == [True, name == "teacher", True]
