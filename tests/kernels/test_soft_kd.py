"""soft_kd's Triton kernels: their sm_80 PTX executed on odd shapes, with all checks on."""

from __future__ import annotations

import pytest
import torch

import featkd
from featkd.functional import soft_kd
from featkd.kernels import scaled
from featkd.kernels import soft_kd as kernels
from featkd.kernels.launch import redirect
from featkd.ops.soft_kd import _forward
from featkd.ptx import run_triton
from tests.kernels.feature_kd_cases import relative
from tests.kernels.soft_kd_cases import (
    Problem,
    assert_as_exact_as_eager,
    assert_as_reference,
    special,
)
from tests.ops.test_soft_kd import run, views

BOTH = ["loss_and_logit_gradient", "scale"]
BLOCKS = kernels.Config(2, 16, num_warps=1)
# between them: a row in several blocks, in one, several rows a program; several warps a row; rows
# and classes that do not fill their blocks; each term there and missing
CASES = [
    (Problem(5, 33), torch.bfloat16, BLOCKS),
    (Problem(15, 33, alpha=0.3, tau=2.0, soft=True), torch.float16, BLOCKS),
    (Problem(5, 33, tau=3.0), torch.float64, BLOCKS),
    (Problem(37, 10, alpha=0.0), torch.float16, None),
    (Problem(3, 1000, alpha=1.0, tau=4.0), torch.float32, None),
    (Problem(2, 1, alpha=0.5, soft=True), torch.bfloat16, None),
]
SLOW = [(Problem(3, 1000, alpha=0.3, tau=2.0, soft=True), torch.float32, None)]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.fixture
def small(monkeypatch):
    """Eight rows of four classes a program: little code, so that it compiles quickly."""
    monkeypatch.setattr(kernels, "config", lambda *_: kernels.Config(8, 4, num_warps=1))


@pytest.mark.parametrize(("problem", "dtype", "config"), [*CASES, *SLOW], ids=str)
def test_exact_as_eager(executed, monkeypatch, problem, dtype, config):
    if config is not None:
        monkeypatch.setattr(kernels, "config", lambda *_: config)
    tensors = problem.tensors(dtype)
    with featkd.use_backend("triton"):
        got = run(*tensors, problem)
    assert featkd.last_backend("soft_kd") == "triton"
    assert executed == BOTH
    assert_as_exact_as_eager(got, problem, *tensors)


@pytest.mark.parametrize(("alpha", "tau", "soft"), [(0.5, 1.0, False), (0.5, 2.0, True)])
@pytest.mark.usefixtures("small")
def test_nan_and_inf_as_the_reference(executed, alpha, tau, soft):
    tensors = special(soft)
    losses, gradient = kernels.forward(*tensors, alpha=alpha, tau=tau, need_gradient=True)
    assert executed == BOTH[:1]
    assert_as_reference(losses, gradient, *tensors, alpha, tau)


@pytest.mark.usefixtures("small")
def test_a_class_index_out_of_range_reads_nothing_and_gives_nan(executed):
    student, teacher, _ = Problem(7, 4).tensors(torch.float32)
    target = torch.tensor([0, 4, 3, -1, -100, 2**40, 1])
    losses, gradient = kernels.forward(
        student, teacher, target, alpha=0.5, tau=1.0, need_gradient=True
    )
    assert executed == BOTH[:1]
    lost = torch.tensor([False, True, False, True, True, True, False])
    assert torch.equal(losses.isnan(), lost)
    assert torch.equal(gradient.isnan(), lost[:, None].expand(-1, 4))


@pytest.mark.usefixtures("small")
def test_views_give_the_same_bits(executed):
    problem = Problem(5, 4, 0.5, 2.0, soft=True)
    student, teacher, target = problem.tensors(torch.float32)
    with featkd.use_backend("triton"):
        plain = run(student, teacher, target, problem)
        copied = [views(x)["transposed"] for x in (student, teacher, target)]
        mixed = (views(student)["sliced"], teacher[:1].expand(5, -1), target[:1].expand(5, -1))
        got = run(*copied, problem), run(*mixed, problem)
        want = plain, run(student, *(x.contiguous() for x in mixed[1:]), problem)
    assert executed == BOTH * 4
    for ours, theirs in zip(got, want, strict=True):
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.usefixtures("small")
def test_upstream_gradient_repeats_bitwise_and_inputs_are_left_alone(executed):
    problem = Problem(9, 4)
    tensors = problem.tensors(torch.float32)
    before = [x.clone() for x in tensors]
    with featkd.use_backend("triton"):
        once, again = run(*tensors, problem), run(*tensors, problem)
        scaled = run(*tensors, problem, upstream=-8)
        assert not soft_kd(*tensors, alpha=0.9).requires_grad
    assert executed == [*BOTH * 3, BOTH[0]]
    assert all(torch.equal(again[key], value) for key, value in once.items())
    assert torch.equal(scaled["student"], -8 * once["student"])
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_a_factor_too_small_for_a_half_type(executed):
    """1e-7 has one bit in fp16; what it scales may still have eleven."""
    values = torch.linspace(-3e4, 3e4, 33).half()
    factor = torch.tensor(1e-7)
    got = scaled.times(values, factor)
    assert executed == ["scale"]
    assert torch.equal(got, (values.float() * factor).half())
    assert relative(got, values.double() * 1e-7) < 1e-3


@pytest.mark.parametrize(("tau", "soft"), [(1.0, False), (2.0, True)])
@pytest.mark.usefixtures("small")
def test_opcheck(executed, tau, soft):
    student, teacher, target = Problem(5, 4, soft=soft).tensors(torch.float32)
    student.requires_grad_()
    torch.library.opcheck(_forward, (student, teacher, target, 0.9, tau, True, "triton"))
    assert set(executed) == set(BOTH)


def test_a_wide_row_is_exact_and_each_of_its_logits_read_once():
    """Counted without a cache, in rows of 1,000 classes: three sweeps over them, merged."""
    counted = []

    def count(kernel, grid, arguments, options):
        first = not counted
        launch = run_triton(kernel, grid, count=first, **arguments, **options)
        assert launch.reports == ()
        counted.append(launch.counters)

    problem = Problem(3, 1000)
    tensors = problem.tensors(torch.bfloat16)
    with redirect(count), featkd.use_backend("triton"):
        assert_as_exact_as_eager(run(*tensors, problem), problem, *tensors)
    counters, _ = counted
    assert counters.distinct_read_bytes == 3 * (2 * 2000 + 8)
    # a row begins and ends within a sector; each of its four warps reads the label and its logit
    assert counters.global_read_sectors <= 3 * (2 * 64 + 4 * 4)
    assert counters.global_write_bytes == 3 * (2000 + 4)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 10, 255, 256, 257, 1000, 8192, 8193, 21841, 10**6])
def test_launch_sizes(classes, kind):
    config = kernels.config(classes, kind)
    assert config.block.bit_count() == config.num_warps.bit_count() == 1
    assert config.block >= classes or config.block == 2048
    logits = config.rows * config.block / (32 * config.num_warps)  # a thread's
    assert 8 <= logits <= 16
