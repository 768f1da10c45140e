"""Kernel of soft_kd: PTX, executed with all checks."""

from __future__ import annotations

import pytest
import torch

import featkd
from featkd.functional import soft_kd
from featkd.kernels import soft_kd as kernels
from tests.kernels.conftest import executing
from tests.ops.comparing import assert_same_bits, views
from tests.ops.soft_kd_cases import Problem, assert_special_rows

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BOTH = ["soft_kd_rows", "sum_partials", "soft_kd_rows"]
BLOCKS = kernels.Config(2, 16, num_warps=1)
# (problem, dtype of the student, dtype of the others, configuration). Together they cover: one and
# several blocks per row; several rows per program; several warps per row; partly filled blocks;
# each term present and absent; both kinds of labels
CASES = [
    (Problem(5, 33), BF16, BF16, BLOCKS),
    (Problem(15, 33, alpha=0.3, tau=2.0, soft=True), F16, F32, BLOCKS),
    (Problem(37, 10, alpha=0.0), F16, F16, None),
    (Problem(3, 1000, alpha=1.0, tau=4.0), F32, BF16, None),
    (Problem(2, 1, alpha=0.5, soft=True), BF16, F32, None),
]
SMALL = Problem(5, 12, 0.5, 2.0, soft=True)


@pytest.fixture(autouse=True)
def triton():
    with featkd.use_backend("triton"):
        yield


@pytest.mark.parametrize(("problem", "dtype", "others", "config"), CASES, ids=str)
def test_error_is_at_most_twice_torchs(executed, monkeypatch, problem, dtype, others, config):
    if config is not None:
        monkeypatch.setattr(kernels, "config", lambda *_: config)
    inputs = problem.inputs(dtype, others)
    got = problem.run(inputs)
    assert executed == BOTH
    problem.assert_exact(got, inputs)


def test_error_with_1000_classes_on_sm_90():
    problem = Problem(3, 1000)
    inputs = problem.inputs(BF16)
    with executing(90) as executed:
        got = problem.run(inputs)
    assert executed == BOTH
    problem.assert_exact(got, inputs)


@pytest.mark.parametrize(("alpha", "tau", "soft"), [(0.5, 1.0, False), (0.5, 2.0, True)])
def test_nan_and_inf_propagate_as_in_equation(executed, alpha, tau, soft):
    assert_special_rows(alpha, tau, soft)
    assert set(executed) == set(BOTH)


def test_class_index_out_of_range_gives_nan(executed):
    student = torch.randn(7, 4, requires_grad=True)
    target = torch.tensor([0, 4, 3, -1, -100, 2**40, 1])
    loss = soft_kd(student, student.detach(), target, alpha=0.5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isnan()
    lost = torch.tensor([False, True, False, True, True, True, False])
    assert torch.equal(gradient.isnan(), lost[:, None].expand(-1, 4))


def test_views_are_bitwise_equal(executed):
    inputs = SMALL.inputs(F32)
    plain = SMALL.run(inputs)
    for name in ("sliced", "transposed"):
        assert_same_bits(SMALL.run({n: views(x)[name] for n, x in inputs.items()}), plain)
    expanded = {n: x[:1].expand(5, -1) for n, x in inputs.items()}
    whole = {n: x.contiguous() for n, x in expanded.items()}
    assert_same_bits(SMALL.run(expanded), SMALL.run(whole))


def test_repeats_and_scaled_gradients_are_bitwise_equal(executed):
    """The order of threads differs between runs; scaling by a power of two is exact."""
    SMALL.assert_repeats_and_scales(SMALL.inputs(F32))


def test_fp16_gradient_of_large_batch_does_not_underflow(executed):
    """A gradient that is rounded before it is scaled would mostly be subnormal."""
    problem = Problem(4096, 4, alpha=1.0)
    inputs = problem.inputs(F16)
    upstream = problem.upstream(inputs, 2.0**16)
    problem.assert_exact(problem.run(inputs, upstream), inputs, upstream)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 10, 255, 257, 1000, 8192, 8193, 21841, 10**6])
def test_launch_sizes(classes, kind):
    config = kernels.config(classes, kind)
    assert config.block.bit_count() == config.num_warps.bit_count() == 1
    assert config.block >= classes or config.block == 2048
    logits = config.rows * config.block / (32 * config.num_warps)  # per thread
    assert 8 <= logits <= 16
