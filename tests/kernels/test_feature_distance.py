"""The kernels of projected_feature_kd and lift_head: PTX executed with all checks on."""

from __future__ import annotations

import pytest
import torch

import featkd
from tests.kernels.conftest import executing, tokens_far_apart
from tests.ops.comparing import assert_same_bits, spread, views
from tests.ops.feature_cases import Problem

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# between them: spectral with an odd, an even and one column, mse; several channel blocks and one;
# rows and channels that do not fill their tiles; programs with several images and tiles, and one;
# every part there and missing; rows' dtype, and that of the norm's parameters
CASES = [
    (Problem(9, 35, 200, 5, student=24, bias=True), BF16, F32),
    (Problem(9, 20, 40, 4, norm="weight"), F16, F16),
    (Problem(2, 3, 7, 1, norm="none"), F32, F32),
    (Problem(9, 45, 300, student=16), F16, F32),
    (Problem(3, 9, 33, norm="none"), BF16, BF16),
    (Problem(3, 24, 136, 6, student=20, pooled=True), F32, F32),
    (Problem(3, 24, 40, 4, student=20, pooled=True), F16, F32),
    (Problem(9, 45, 72, student=20, teacher=False, pooled=True), BF16, BF16),
    (Problem(1, 1, 5, student=3, pooled=True), BF16, F32),
]
SMALL = Problem(3, 12, 20, 4, student=12, pooled=True)


def launches(problem: Problem) -> list[str]:
    """One row kernel each way, and one that adds up what its programs summed."""
    back = ["distance_backward", *["sum_partials"] * (problem.norm != "none")]
    return ["distance_forward", "sum_partials", *back]


@pytest.fixture(autouse=True)
def triton():
    with featkd.use_backend("triton"):
        yield


@pytest.mark.parametrize(("problem", "rows", "parameters"), CASES, ids=str)
@pytest.mark.usefixtures("few_programs")
def test_as_exact_as_torch(executed, problem, rows, parameters):
    inputs = problem.inputs(rows, parameters)
    got = problem.run(inputs)
    assert executed == launches(problem)
    problem.assert_exact(got, inputs)


@pytest.mark.parametrize(("arch", "rows", "parameters"), [(80, BF16, F32), (90, F16, F32)], ids=str)
def test_as_exact_as_torch_at_the_published_widths(arch, rows, parameters):
    problem = Problem(2, 49, 384, 7, student=192)
    inputs = problem.inputs(rows, parameters)
    with executing(arch) as executed:
        got = problem.run(inputs)
    assert executed == launches(problem)
    problem.assert_exact(got, inputs)


def test_views_and_other_gradients_give_the_same_bits(executed):
    inputs = SMALL.inputs(BF16, F32)
    plain = SMALL.run(inputs)
    for name in ("sliced", "transposed"):
        viewed = {n: (views(x)[name] if x.dim() > 1 else spread(x)) for n, x in inputs.items()}
        got = SMALL.run(viewed)
        assert_same_bits(got, plain) if name == "sliced" else SMALL.assert_exact(got, inputs)
    expanded = {**inputs, "teacher": inputs["teacher"][:1].expand(3, -1, -1)}
    whole = {n: x.contiguous() for n, x in expanded.items()}
    assert_same_bits(SMALL.run(expanded), SMALL.run(whole))


def test_a_second_run_and_an_upstream_gradient_keep_the_bits(executed):
    """Threads run in another order, and a power of two is exact."""
    inputs = SMALL.inputs(F32)
    before = {n: x.clone() for n, x in inputs.items()}
    loss = Problem(3, 12, 20, 4, student=12)
    once = loss.run(inputs, 1.0)
    assert_same_bits(loss.run(inputs, 1.0), once)
    scaled = {n: x * (-0.125 if n.startswith("d_") else 1) for n, x in once.items()}
    assert_same_bits(loss.run(inputs, -0.125), scaled)
    assert_same_bits(inputs, before)


@pytest.mark.parametrize("layout", ["tokens", "images"])
def test_rows_more_than_two_to_the_31_elements_apart(layout):
    problem = Problem(1, 3, 20, norm="none")
    inputs = problem.inputs(BF16)
    far = {n: tokens_far_apart(x) for n, x in inputs.items()}
    if layout == "images":
        problem = Problem(3, 1, 20, norm="none")
        far, inputs = ({n: x.transpose(0, 1) for n, x in d.items()} for d in (far, inputs))
    with executing(check=False):  # for gigabytes between the elements
        assert_same_bits(problem.run(far), problem.run(inputs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_what_depends_on_them(executed, bad):
    for name in ("student", "teacher"):
        inputs = SMALL.inputs(BF16, F32)
        inputs[name][1, 3, 2] = bad
        got = SMALL.run(inputs)
        assert not got["loss"].isfinite()
        for reached in ("d_weight", "d_norm_weight", "d_norm_bias"):
            assert not got[reached].isfinite().all(), reached
        hit = (~got["d_student"].isfinite()).nonzero()
        assert set(hit[:, 0].tolist()) == {1}  # its own image alone
        assert set((hit[:, 1] // 4).tolist()) == {0}  # whose row of tokens is summed
        pooled = got["pooled"].isfinite().all(1)
        assert pooled.tolist() == [True, name == "teacher", True]
