"""Public functions: spectral metric, gradcheck, compilation with changing numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featkd.functional import projected_feature_kd, soft_kd

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


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), batch=st.integers(1, 3), c=st.integers(1, 5)
)
def test_spectral_matches_fft(height, width, batch, c):
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


def test_gradcheck():
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


def test_fullgraph_compile_with_changing_numbers():
    """torch.compile turns a changed number, such as a scheduled alpha, into a symbol."""

    def step(x: Tensor, t: Tensor, labels: Tensor, alpha: float, eps: float) -> Tensor:
        loss = projected_feature_kd(x, t, None, None, torch.ones(4, dtype=F64), eps=eps)
        return loss + soft_kd(x[:, 0], t[:, 0], labels, alpha=alpha, tau=1 + alpha)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for tokens, alpha in ((2, 0.5), (3, 0.6), (4, 0.7)):
        args = (randn(2, tokens, 4, grad=True), randn(2, tokens, 4), torch.tensor([3, 0]))
        torch.testing.assert_close(
            compiled(*args, alpha, alpha / 10), step(*args, alpha, alpha / 10)
        )


def test_weight_and_bias_with_different_dtypes():
    student, teacher = torch.randn(2, 9, 3), torch.randn(2, 9, 5)
    weight, bias = torch.randn(5, 3), torch.randn(5).bfloat16()
    mixed = projected_feature_kd(student, teacher, weight, bias)
    assert torch.equal(mixed, projected_feature_kd(student, teacher, weight, bias.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # autocast does not cast float64
        wide = projected_feature_kd(student, teacher, weight.double(), bias)
        assert torch.equal(wide, projected_feature_kd(student, teacher, weight, bias))
