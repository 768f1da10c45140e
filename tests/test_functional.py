"""Public functions against independent float64 computations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featkd.functional import lift_head, projected_feature_kd, soft_kd, widelast_projection

F64 = torch.float64


def randn(*shape: int, grad: bool = False, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)


def by_fft(difference: Tensor, grid: tuple[int, int]) -> Tensor:
    """Computes SpectralKD as published: MSE of the stacked real and imaginary parts of rfft2."""
    batch, _, channels = difference.shape
    maps = difference.transpose(1, 2).reshape(batch, channels, *grid)
    spectrum = torch.fft.rfft2(maps, norm="ortho")
    stacked = torch.stack((spectrum.real, spectrum.imag))
    return F.mse_loss(stacked, torch.zeros_like(stacked))


def by_hand_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return scaled if bias is None else scaled + bias


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), batch=st.integers(1, 3), c=st.integers(1, 5)
)
def test_spectral_equals_the_fft_in_value_and_gradient(height, width, batch, c):
    student = randn(batch, height * width, c, grad=True)
    twin = student.detach().clone().requires_grad_()
    teacher = randn(batch, height * width, c, seed=1)
    ours = projected_feature_kd(student, teacher, metric="spectral", grid=(height, width))
    theirs = by_fft(twin - teacher, (height, width))
    ours.backward()
    theirs.backward()
    assert ours.dtype == F64
    assert abs(ours - theirs).item() <= 1e-12 * max(1.0, theirs.item())
    assert (student.grad - twin.grad).abs().max() <= 1e-12


@pytest.mark.parametrize("metric", ["mse", "spectral"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["none", "weight", "both"])
@pytest.mark.parametrize("grid", [(4, 3), (3, 4), (1, 12), (12, 1)])
def test_projected_feature_kd_by_hand(metric, bias, norm, grid):
    student, teacher = randn(2, 12, 5, grad=True), randn(2, 12, 7, seed=1)
    weight = randn(7, 5, grad=True)
    b = randn(7, grad=True) if bias else None
    gamma = None if norm == "none" else randn(7, grad=True, seed=3)
    beta = randn(7, grad=True, seed=4) if norm == "both" else None
    parameters = [p for p in (student, weight, b, gamma, beta) if p is not None]

    loss = projected_feature_kd(
        student, teacher, weight, b, gamma, beta, eps=1e-3, metric=metric, grid=grid
    )
    got = torch.autograd.grad(loss, parameters)

    projected = torch.einsum("bnc,dc->bnd", student, weight)
    if b is not None:
        projected = projected + b
    if gamma is not None:
        projected = by_hand_norm(projected, gamma, beta, 1e-3)
    error = projected - teacher
    expected = (error**2).mean() if metric == "mse" else by_fft(error, grid)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(got, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_widelast_projection_by_hand():
    x, weight = randn(2, 5, 3), randn(6, 3)
    p = [randn(6, seed=s) for s in range(1, 5)]
    residual, normed = widelast_projection(x, weight, *p, eps=1e-3)
    expected = by_hand_norm(torch.einsum("bnc,dc->bnd", x, weight), p[0], p[1], 1e-3)
    torch.testing.assert_close(residual, expected)
    torch.testing.assert_close(normed, by_hand_norm(expected, p[2], p[3], 1e-3))


@pytest.mark.parametrize("metric", ["mse", "spectral"])
def test_lift_head_by_hand(metric):
    features, weight = randn(2, 6, 3), randn(4, 3)
    gamma, beta, teacher = randn(4, seed=1), randn(4, seed=2), randn(2, 6, 4)
    pooled, loss = lift_head(
        features, weight, gamma, beta, teacher, eps=1e-3, metric=metric, grid=(2, 3)
    )
    z = by_hand_norm(torch.einsum("bnc,dc->bnd", features, weight), gamma, beta, 1e-3)
    expected = ((z - teacher) ** 2).mean() if metric == "mse" else by_fft(z - teacher, (2, 3))
    torch.testing.assert_close(pooled, z.sum(1) / 6)
    torch.testing.assert_close(loss, expected)
    alone, none = lift_head(features, weight, gamma, beta, eps=1e-3)
    assert none is None
    torch.testing.assert_close(alone, pooled)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("soft", [False, True])
def test_soft_kd_by_hand(alpha, tau, soft):
    student, teacher = randn(3, 5), randn(3, 5, seed=1)
    target = randn(3, 5, seed=2).softmax(1) if soft else torch.tensor([4, 0, 2])
    got = soft_kd(student, teacher, target, alpha=alpha, tau=tau)
    expected = 0.0
    for row in range(3):
        p = [math.exp(v) for v in student[row].tolist()]
        log_p = [math.log(v / sum(p)) for v in p]
        weights = target[row].tolist() if soft else [float(k == target[row]) for k in range(5)]
        ce = -sum(w * lp for w, lp in zip(weights, log_p, strict=True))
        s = [math.exp(v / tau) for v in student[row].tolist()]
        t = [math.exp(v / tau) for v in teacher[row].tolist()]
        kl = sum(
            b / sum(t) * math.log((b / sum(t)) / (a / sum(s))) for a, b in zip(s, t, strict=True)
        )
        expected += ((1 - alpha) * ce + alpha * tau**2 * kl) / 3
    assert float(got) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_are_computed_in_float32(dtype):
    """Only the inputs are rounded, so the result equals that of float64 on the rounded inputs."""
    s, t = randn(2, 49, 64).to(dtype), randn(2, 49, 64, seed=1).to(dtype)
    g, b = torch.ones(64, dtype=dtype), torch.zeros(64, dtype=dtype)
    loss = projected_feature_kd(s, t, None, None, g, b)
    exact = projected_feature_kd(s.double(), t.double(), None, None, g.double(), b.double())
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(exact)) <= 1e-6 * float(exact)


def test_views_upstream_gradient_and_inputs_untouched():
    base = randn(4, 12, 10)
    student = base[::2, :, 1::3].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    teacher = randn(1, 12, 3, seed=9).expand(2, 12, 3)
    before = student.detach().clone()
    loss = projected_feature_kd(student, teacher)
    (scaled,) = torch.autograd.grad(loss * 3, student, retain_graph=True)
    (again,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(again, 2 * (before - teacher) / before.numel())
    torch.testing.assert_close(scaled, 3 * again)
    assert torch.equal(student.detach(), before)


def test_gradcheck_in_float64():
    args = (randn(2, 6, 3, grad=True), randn(2, 6, 4), randn(4, 3, grad=True))
    norm = (randn(4, grad=True), randn(4, grad=True, seed=1))
    for metric in ("mse", "spectral"):
        assert torch.autograd.gradcheck(
            lambda s, t, w, g, b, m=metric: projected_feature_kd(
                s, t, w, None, g, b, metric=m, grid=(2, 3)
            ),
            (*args, *norm),
        )
    logits, soft = randn(3, 5, grad=True), randn(3, 5, seed=2).softmax(1)
    assert torch.autograd.gradcheck(
        lambda x: soft_kd(x, randn(3, 5, seed=1), soft, alpha=0.7, tau=2.0), (logits,)
    )


def test_fullgraph_compile():
    def step(x: Tensor, w: Tensor, t: Tensor, logits: Tensor) -> Tensor:
        loss = projected_feature_kd(x, t, w, metric="spectral")
        return loss + soft_kd(logits, logits.detach(), torch.zeros(2).long(), alpha=0.5)

    args = (randn(2, 4, 3, grad=True), randn(5, 3), randn(2, 4, 5), randn(2, 6))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), step(*args))


def test_fullgraph_compile_with_numbers_that_vary():
    """torch.compile makes a number that changes, as in a schedule of alpha, a symbol."""

    def step(x: Tensor, t: Tensor, labels: Tensor, alpha: float, eps: float) -> Tensor:
        loss = projected_feature_kd(x, t, None, None, torch.ones(4, dtype=F64), eps=eps)
        return loss + soft_kd(x[:, 0], t[:, 0], labels, alpha=alpha, tau=1 + alpha)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for tokens, alpha in ((2, 0.5), (3, 0.6), (4, 0.7)):
        args = (randn(2, tokens, 4, grad=True), randn(2, tokens, 4), torch.tensor([3, 0]))
        torch.testing.assert_close(
            compiled(*args, alpha, alpha / 10), step(*args, alpha, alpha / 10)
        )


def test_weight_and_bias_can_have_different_dtypes():
    student, teacher = torch.randn(2, 9, 3), torch.randn(2, 9, 5)
    weight, bias = torch.randn(5, 3), torch.randn(5).bfloat16()
    mixed = projected_feature_kd(student, teacher, weight, bias)
    assert torch.equal(mixed, projected_feature_kd(student, teacher, weight, bias.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # autocast does not change float64
        wide = projected_feature_kd(student, teacher, weight.double(), bias)
        assert torch.equal(wide, projected_feature_kd(student, teacher, weight, bias))
