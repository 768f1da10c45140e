"""csrc's sweeps over rows: every length of a row, threads, rounding, and a missing library."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import featkd
from featkd import extension
from featkd.cpu import projected_feature_kd, rows, soft_kd
from featkd.functional import projected_feature_kd as public
from tests.kernels import feature_kd_cases, soft_kd_cases, widelast_cases
from tests.kernels.feature_kd_cases import relative
from tests.ops import test_projected_feature_kd, test_soft_kd, test_widelast_projection

# whole and cut vectors of 16 to 64 bytes, in four chains and alone
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 128, 131)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("width", [0, 3, 4])
def test_channels_of_every_length(width):
    for channels in LENGTHS[1:]:  # a norm over one channel has no gradient
        problem = feature_kd_cases.Problem(2, 12, 3, channels, width, bias=True)
        tensors = problem.tensors(torch.float32)
        got = test_projected_feature_kd.run(tensors, width)
        want = feature_kd_cases.evaluate(tensors, width, torch.float64)
        eager = feature_kd_cases.evaluate(tensors, width, torch.float32)
        for name, value in want.items():
            assert relative(got[name], value) < 3 * relative(eager[name], value) + 2e-6, channels


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("soft", [False, True])
def test_classes_of_every_length(soft):
    for classes in LENGTHS[1:]:
        problem = soft_kd_cases.Problem(3, classes, 0.6, 2.0, soft)
        tensors = problem.tensors(torch.float32)
        got = test_soft_kd.run(*tensors, problem)
        soft_kd_cases.assert_as_exact_as_eager(got, problem, *tensors)


@pytest.mark.usefixtures("one_thread")
def test_two_norms_of_every_length():
    for channels in LENGTHS[2:]:
        tensors = widelast_cases.Problem(2, 5, 3, channels).tensors(torch.float32)
        got = test_widelast_projection.run(tensors)
        want = widelast_cases.evaluate(tensors, "both", torch.float64)
        eager = widelast_cases.evaluate(tensors, "both", torch.float32)
        for name, value in want.items():
            assert relative(got[name], value) < 3 * relative(eager[name], value) + 2e-6, channels


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_norms_of_half_precision_are_those_of_its_values_rounded(dtype):
    """To nearest, ties to even, NaN and infinities: as torch rounds."""
    for channels in LENGTHS[1:]:
        generator = torch.Generator().manual_seed(channels)
        h = (4 * torch.randn(9, channels, generator=generator)).to(dtype)
        h[2], h[3, 0], h[4, 0] = 0, math.nan, math.inf
        d = torch.randn(1, 9, channels, generator=generator).to(dtype)
        d[0, 5, 0], d[0, 6, 0] = -math.inf, 2.0**-24
        norms = torch.rand(4, channels, generator=generator) * 2.0**-9
        results = []
        for kind in (dtype, torch.float32):
            maps = [torch.empty(9, channels, dtype=kind) for _ in range(3)]
            numbers = [torch.empty(4, 9), torch.zeros(4, channels)]
            rows.two_norms(h.to(kind), norms, 1e-5, *maps[:2], numbers[0])
            rows.two_norms_backward(h.to(kind), norms, numbers[0], d, d, maps[2], numbers[1])
            results.append([*(x.to(dtype) for x in maps), *numbers])
        for got, want in zip(*results, strict=True):
            assert torch.equal(got.isnan(), want.isnan()), channels
            assert torch.equal(got.nan_to_num(1.5), want.nan_to_num(1.5)), channels


def outcomes() -> Iterator[Tensor]:
    """What the sweeps give, without a matrix product, of problems that several threads share."""
    generator = torch.Generator().manual_seed(0)
    source, teacher, beta = (
        torch.randn(shape, generator=generator) for shape in ((5, 98, 129), (5, 98, 129), (129,))
    )
    gamma = beta.cos()
    for width in (0, 14):
        total, slope = torch.zeros((), dtype=torch.float64), torch.empty_like(source)
        sums = torch.zeros(3, 129)
        vectors = (beta, gamma, beta)
        rows.distance(
            *(source, teacher, *vectors, 1e-5, width, None, None, slope, None, total, *sums)
        )
        yield from (total, slope, sums)
    yield from soft_kd.sweep(
        *(source.view(245, -1), teacher.view(245, -1), torch.arange(245)),
        alpha=0.5,
        tau=2.0,
        need_gradient=True,
    )
    h, norms = source.view(-1, 129), torch.stack([gamma, beta, gamma, beta])
    found = [torch.empty_like(h), torch.empty_like(h), torch.empty(4, len(h))]
    rows.two_norms(h, norms, 1e-5, *found)
    slope, sums = torch.empty_like(h), torch.zeros_like(norms)
    rows.two_norms_backward(h, norms, found[2], source, teacher, slope, sums)
    yield from (*found, slope, sums)


def test_any_number_of_threads_gives_the_same_bits():
    assert extension.missing() == ""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = list(outcomes())
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for got, value in zip(outcomes(), want, strict=True):
                assert torch.equal(got, value), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_read_and_rounded_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    student = every.view(16, 64, 64)
    for factor in (1.0, 0.3371, 3.0, 1e-4, 1.7e-39):
        scale = torch.tensor(factor)
        got = projected_feature_kd.difference_gradient(student, student * 0 + 0, 0, scale)
        difference = student.float() - (student * 0 + 0).float()
        want = (difference * scale).to(dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_parameters_alone_without_a_projector():
    student, teacher, *_, gamma, beta = feature_kd_cases.Problem(
        3, 12, 6, 6, projector=False
    ).tensors(torch.float32)
    want = feature_kd_cases.evaluate([student, teacher, None, None, gamma, beta], 0, torch.float64)
    gamma.requires_grad_()
    loss = public(student, teacher, norm_weight=gamma, norm_bias=beta)
    (gradient,) = torch.autograd.grad(loss, gamma)
    assert relative(gradient, want["norm_weight"]) < 1e-6


def test_without_the_library_the_reference_runs_and_says_so(monkeypatch):
    monkeypatch.setitem(extension._known, extension.LIBRARY, "csrc is not built: a test")
    student = torch.ones(2, 4, 3)
    with pytest.warns(UserWarning, match="reference backend: csrc is not built: a test"):
        assert public(student, 0 * student) == 1
    assert featkd.last_backend("projected_feature_kd") == "reference"
