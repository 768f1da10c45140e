"""The Triton kernels: their sm_80 PTX executed on odd shapes in every dtype, with all checks on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import featkd
from featkd.kernels import projected_feature_kd as kernels
from tests.kernels.conftest import tokens_far_apart
from tests.kernels.feature_kd_cases import Problem, assert_as_exact_as_eager
from tests.ops.test_projected_feature_kd import run, views

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL = kernels.Config(16, 16, 32, 16, num_warps=1, num_stages=1)
# between them: spectral with an odd, an even and one column, mse; several channel blocks and one;
# rows and channels that do not fill their tiles; each parameter there and missing
PROBLEMS = [
    (Problem(2, 15, 24, 40, 5, bias=True), DTYPES),
    (Problem(3, 8, 40, 24, 4, norm="weight"), (torch.bfloat16,)),
    (Problem(3, 9, 16, 33, 0, norm="none"), DTYPES),
    (Problem(1, 1, 5, 7, 1), (torch.float16,)),
    (Problem(5, 12, 36, 36, 4, projector=False, norm="none"), DTYPES),
    (Problem(5, 7, 36, 36, 0, projector=False), (torch.float32,)),
]
CASES = [(problem, dtype) for problem, dtypes in PROBLEMS for dtype in dtypes]
BASE = ["loss_and_student_gradient", "scale"]


def launches(problem: Problem) -> list[str]:
    """Of a pass forward and back; the last adds up a parameter's gradient from partial sums."""
    parameters = sum(p is not None for p in problem.tensors(torch.float32)[2:])
    more = ["parameter_gradients", *["sum_and_scale"] * parameters]
    return BASE + (more if parameters else [])


@pytest.fixture
def small(monkeypatch):
    """Tiles of 16 places and blocks of few channels, so that small problems have several."""
    for name in ("loss_config", "gradient_config"):
        monkeypatch.setattr(kernels, name, lambda *_: SMALL)
    monkeypatch.setattr(kernels, "split_count", lambda *_: 2)


@pytest.mark.parametrize(("problem", "dtype"), CASES, ids=str)
@pytest.mark.usefixtures("small")
def test_exact_as_eager(executed, monkeypatch, problem, dtype):
    if dtype != torch.float16:  # there the rows of S stay in registers
        monkeypatch.setattr(kernels, "loss_config", lambda *_: replace(SMALL, hold=False))
    tensors = problem.tensors(dtype)
    with featkd.use_backend("triton"):
        got = run(tensors, problem.width)
    assert featkd.last_backend("projected_feature_kd") == "triton"
    assert executed == launches(problem)
    assert_as_exact_as_eager(got, tensors, problem.width)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_as_eager_at_the_published_widths(executed, dtype):
    problem = Problem(1, 49, 192, 384, 7)
    tensors = problem.tensors(dtype)
    with featkd.use_backend("triton"):
        got = run(tensors, problem.width)
    assert executed == launches(problem)
    assert_as_exact_as_eager(got, tensors, problem.width)


@pytest.mark.slow
def test_exact_as_eager_by_wgmma(executed_on_hopper):
    problem = Problem(1, 49, 192, 384, 7)
    tensors = problem.tensors(torch.bfloat16)
    with featkd.use_backend("triton"):
        got = run(tensors, problem.width)
    assert executed_on_hopper == launches(problem)
    assert_as_exact_as_eager(got, tensors, problem.width)


@pytest.mark.usefixtures("small")
def test_views_give_the_same_bits(executed):
    problem = Problem(3, 12, 16, 24, 4)
    student, teacher, *parameters = problem.tensors(torch.bfloat16)
    with featkd.use_backend("triton"):
        plain = run([student, teacher, *parameters], 4)
        for name in ("sliced", "transposed"):
            viewed = [views(student)[name], views(teacher)[name], *parameters]
            for key, value in run(viewed, 4).items():
                assert torch.equal(value, plain[key]), (name, key)
        expanded = run([student, teacher[:1].expand(3, -1, -1), *parameters], 4)
        whole = run([student, teacher[:1].repeat(3, 1, 1), *parameters], 4)
    assert all(torch.equal(expanded[key], value) for key, value in whole.items())


@pytest.mark.usefixtures("executed_unchecked", "small")
def test_tokens_more_than_two_to_the_31_elements_apart():
    student, teacher, *parameters = Problem(1, 3, 24, 40).tensors(torch.bfloat16)
    far = [tokens_far_apart(student), tokens_far_apart(teacher)]
    with featkd.use_backend("triton"):
        plain = run([student, teacher, *parameters], 0)
        for key, value in run([*far, *parameters], 0).items():
            assert torch.equal(value, plain[key]), key


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.usefixtures("small")
def test_nan_and_inf_reach_the_loss_and_the_gradients(executed, bad):
    tensors = Problem(3, 12, 16, 24, 4).tensors(torch.float32)
    tensors[1][1, 3, 2] = bad
    with featkd.use_backend("triton"):
        got = run(tensors, 4)
    assert not got["loss"].isfinite()
    assert not got["student"][1].isfinite().all()
    assert got["student"][0].isfinite().all()
    assert not got["weight"].isfinite().all()


@pytest.mark.usefixtures("small")
def test_autocast_rounds_the_projection_and_nothing_else(executed):
    tensors = Problem(2, 12, 16, 24, 4).tensors(torch.float32)
    rounded = [tensors[0].bfloat16().float(), tensors[1], tensors[2].bfloat16().float()]
    with featkd.use_backend("triton"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = run(tensors, 4)
        plain = run([*rounded, *tensors[3:]], 4)
    torch.testing.assert_close(cast["loss"], plain["loss"], rtol=1e-6, atol=0)
    assert cast["student"].dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 2047, 50176, 10**9])
@pytest.mark.parametrize("programs", [1, 6, 200])
def test_splits_are_bounded(rows, programs):
    splits = kernels.split_count(rows, programs)
    assert splits == 1 or (splits * programs < 132 + programs and rows / splits >= 2048)
