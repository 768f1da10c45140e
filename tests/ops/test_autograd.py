"""Checkpoints, torch.func transforms, second derivatives and gradient scaling with the kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import featkd
from featkd.functional import lift_head, projected_feature_kd, soft_kd, widelast_projection
from featkd.ops import backends
from tests.ops.comparing import relative


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


WEIGHT, TEACHER = randn(20, 12, seed=1), randn(3, 12, 20, seed=2)
ONE, ZERO = torch.linspace(0.5, 1.5, 20), torch.linspace(-1, 1, 20)
# one output of each function, for a map (3, 12, 12)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "projected_feature_kd": lambda x: projected_feature_kd(
        x, TEACHER.to(x.dtype), WEIGHT, None, ONE, ZERO, metric="spectral", grid=(3, 4)
    ),
    "lift_head": lambda x: lift_head(x, WEIGHT, ONE, ZERO)[0],
    "widelast_projection": lambda x: widelast_projection(x, WEIGHT, ONE, ZERO, ONE, ZERO)[1],
    "soft_kd": lambda x: soft_kd(x[0], TEACHER[0, :, :12], torch.arange(12), alpha=0.5, tau=2.0),
}


@pytest.fixture(autouse=True)
def no_warning_yet(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())


@pytest.mark.parametrize("op", CALLS)
def test_two_calls_under_checkpoint_with_retained_graph(op, executed):
    x = randn(3, 12, 12).requires_grad_()

    def total(x: Tensor) -> Tensor:
        first = CALLS[op](x).square().sum()
        return first + 3 * CALLS[op](2 * x).square().sum()

    def on_triton(x: Tensor) -> Tensor:
        with featkd.use_backend("triton"):
            return total(x)

    (want,) = torch.autograd.grad(total(x), x)
    assert featkd.last_backend(op) == "reference"
    loss = checkpoint(on_triton, x, use_reentrant=False)
    forward = executed.count(executed[0])
    (one,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert executed.count(executed[0]) >= 2 * forward  # recomputed by the checkpoint
    (two,) = torch.autograd.grad(loss, x)
    assert torch.equal(one, two)
    assert relative(one, want) < 2e-6
    assert featkd.last_backend(op) == "triton"


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.usefixtures("triton")
def test_second_derivative_raises(op, launched):
    x = randn(3, 12, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(CALLS[op](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"use featkd.use_backend.* for second"):
        gradient.square().sum().backward()
    assert launched
    with featkd.use_backend("reference"):
        (gradient,) = torch.autograd.grad(CALLS[op](x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.usefixtures("triton")
def test_functional_transforms_use_reference(op, launched):
    x = randn(3, 12, 12)
    message = f"{op} runs on the reference backend: torch.func transforms"
    with pytest.warns(UserWarning, match=message):
        got = torch.func.grad(lambda x: CALLS[op](x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    with featkd.use_backend("reference"):
        (want,) = torch.autograd.grad(CALLS[op](leaf).square().sum(), leaf)
        each = torch.stack([CALLS[op](row) for row in (x, 2 * x)])
    torch.testing.assert_close(got, want)
    batched = torch.func.vmap(CALLS[op])(torch.stack((x, 2 * x)))
    torch.testing.assert_close(batched, each)
    assert launched == []


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.usefixtures("triton")
def test_forward_mode_uses_reference(op, launched):
    """A custom op would silently drop the tangent if no input requires grad."""
    x, direction = randn(2, 3, 12, 12, seed=3, dtype=torch.float64)
    with pytest.warns(UserWarning, match=f"{op} runs on the reference.*forward-mode"):
        out, tangent = torch.func.jvp(CALLS[op], (x,), (direction,))
    assert launched == []
    with featkd.use_backend("reference"):
        after, before = (CALLS[op](x + step * direction) for step in (1e-5, -1e-5))
        torch.testing.assert_close(CALLS[op](x), out)
    torch.testing.assert_close(tangent, (after - before) / 2e-5, rtol=1e-6, atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        again = torch.autograd.forward_ad.unpack_dual(CALLS[op](dual)).tangent
    torch.testing.assert_close(again, tangent)


def test_grad_scaler_prevents_fp16_underflow(executed):
    """Unscaled gradients of this loss are below the smallest fp16 number."""
    projector = torch.nn.Linear(12, 20, bias=False)
    torch.nn.init.normal_(projector.weight, std=0.3)
    x, teacher = randn(3, 12, 12), randn(3, 12, 20, seed=2)
    want = (
        1e-4
        * torch.autograd.grad((x @ projector.weight.T - teacher).square().mean(), projector.weight)[
            0
        ]
    )
    optimizer = torch.optim.SGD(projector.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = projector.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.float16), featkd.use_backend("triton"):
        loss = 1e-4 * projected_feature_kd(x, teacher, projector.weight)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert executed == ["distance_forward", "sum_partials", "distance_backward"]
    assert relative(before - projector.weight.detach(), want) < 3e-3


def test_batched_gradients_call_backward_per_gradient(launched):
    x = randn(3, 12, 12).requires_grad_()
    with featkd.use_backend("triton"):
        loss = CALLS["projected_feature_kd"](x)
    # vmap has no rule for the backward op, so it calls the op once per gradient
    (found,) = torch.autograd.grad(loss, x, torch.ones(2), is_grads_batched=True)
    assert found.shape == (2, 3, 12, 12)
    assert launched.count("distance_backward") == 2


def test_norm_parameters_with_different_dtypes(executed):
    rows, teacher = randn(2, 6, 20), randn(2, 6, 20, seed=1)
    norm = [ONE.bfloat16().requires_grad_(), ZERO.clone().requires_grad_()]

    def gradients() -> tuple[Tensor, ...]:
        loss = projected_feature_kd(rows, teacher, norm_weight=norm[0], norm_bias=norm[1])
        return torch.autograd.grad(loss, norm)

    with featkd.use_backend("triton"):
        ours = gradients()
    assert "distance_backward" in executed
    for mine, plain in zip(ours, gradients(), strict=True):
        assert mine.dtype == plain.dtype
        assert relative(mine, plain.double()) < 2 * torch.finfo(plain.dtype).eps
