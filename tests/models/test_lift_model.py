"""The Lift student, compared with equations on tensors."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import featkd
from featkd.models import Lift, create_student
from tests.models.conftest import layer_norm


@pytest.fixture
def lift(tiny: dict[str, Any], perturb: Any) -> Any:
    torch.manual_seed(0)
    return perturb(create_student("deit_tiny_patch16_224", "lift", 96, **tiny)).eval()


# A small W makes the variance comparable to eps, so that a wrong eps shows.
@pytest.mark.parametrize("scale", [1.0, 2e-3])
def test_maps_logits_and_gradients_match_equations(lift, images, plain_vit, scale):
    lift, images = lift.double(), images.double()
    with torch.no_grad():
        lift.projection.weight.mul_(scale)
    state = dict(lift.named_parameters())
    first, *_, last = (x[:, 1:] for x in plain_vit(state, images, heads=(3, 3, 3, 3)))
    projected = last @ state["projection.weight"].T
    norm = state["projection_norm.weight"], state["projection_norm.bias"]
    z = layer_norm(projected, *norm, 1e-5)
    logits = z.mean(dim=1) @ state["head.weight"].T + state["head.bias"]
    if scale < 1:
        assert not torch.allclose(z, layer_norm(projected, *norm, 1e-6), rtol=1e-3)
    got_logits, (got_z, got_first, again, pooled) = lift.forward_with_features(
        images, [-1, 0, 3, "pooled"]
    )
    assert again is got_z
    pairs = ((logits, got_logits), (first, got_first), (z, got_z))
    equal = ((z.mean(dim=1, keepdim=True), pooled), (logits, lift(images)))
    for wanted, got in (*pairs, *equal, (z, lift.forward_features(images))):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    for pair in pairs:  # separately, so that a detached map shows
        gradients = [
            torch.autograd.grad(
                output.sin().sum(), list(state.values()), retain_graph=True, allow_unused=True
            )
            for output in pair
        ]
        for name, theirs, ours in zip(state, *gradients, strict=True):
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_logits_do_not_form_lifted_map(lift, images, monkeypatch):
    """Neither forward nor the maps of earlier layers need the lifted map."""
    lift.head_drop.p = 0.5
    torch.manual_seed(3)
    dropped = lift.train().forward_head(lift.forward_features(images))
    monkeypatch.setattr(lift, "lift", lambda tokens: pytest.fail("formed the lifted map"))
    torch.manual_seed(3)
    logits = lift(images)
    torch.testing.assert_close(logits, dropped, rtol=1e-5, atol=1e-5)
    assert featkd.last_backend("lift_head") == "reference"
    logits.square().sum().backward()
    assert [name for name, p in lift.named_parameters() if p.grad is None] == []
    lift.eval()
    with torch.no_grad():
        logits = lift(images)
        assert torch.equal(lift.forward_with_features(images, [])[0], logits)
        assert torch.equal(lift.forward_with_features(images, [1, 0])[0], logits)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("metric", ["mse", "spectral"])
def test_forward_with_loss_does_not_form_lifted_map(lift, images, metric, fused, monkeypatch):
    lift, images = lift.double(), images.double()
    generator = torch.Generator().manual_seed(2)
    teacher = torch.randn(2, 16, 96, dtype=torch.float64, generator=generator)
    options = {"metric": metric, "grid": (4, 4)}
    logits, (z,) = lift.forward_with_features(images, [-1])
    loss = featkd.functional.projected_feature_kd(z, teacher, **options)
    if fused:
        monkeypatch.setattr(lift, "lift", lambda tokens: pytest.fail("formed the lifted map"))
    else:
        lift.projection.register_forward_hook(lambda _m, _i, y: 1 * y)
    got_logits, got_loss = lift.forward_with_loss(images, teacher, **options)
    torch.testing.assert_close(got_logits, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got_loss, loss, rtol=1e-9, atol=1e-9)
    parameters = dict(lift.named_parameters())
    totals = (logits.sin().sum() + loss, got_logits.sin().sum() + got_loss)
    wanted, found = (torch.autograd.grad(x, list(parameters.values())) for x in totals)
    for name, theirs, ours in zip(parameters, wanted, found, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )
    with pytest.raises(ValueError, match="teacher: expected shape"):
        lift.forward_with_loss(images, teacher[:, 1:], **options)


@pytest.mark.filterwarnings("ignore")  # tracer warnings about sizes
def test_jit_trace_has_no_custom_ops(lift, images):
    traced = torch.jit.trace(lift, images)
    assert "featkd::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(images), lift(images), rtol=1e-5, atol=1e-5)


def test_adopt_keeps_blocks_and_replaces_head(tiny):
    base = timm.create_model("deit_tiny_patch16_224", **tiny)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    student = Lift.adopt(base, 96)
    after = student.state_dict()
    kept = set(before) - {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    norm = {"projection_norm.weight", "projection_norm.bias"}
    assert set(after) - kept == {"projection.weight", *norm, "head.weight", "head.bias"}
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert 0.018 < float(after["projection.weight"].std()) < 0.022
    assert 0.015 < float(after["head.weight"].std()) < 0.025
    assert not after["head.bias"].any()


def test_forward_intermediates(lift, images):
    _, (z, first) = lift.forward_with_features(images, [-1, 0])
    final, maps = lift.forward_intermediates(images, indices=[0], output_fmt="NLC")
    assert torch.equal(final, z)
    assert torch.equal(maps[0], first)
    as_dict = lift.forward_intermediates(images, [0], output_fmt="NLC", output_dict=True)
    assert torch.equal(as_dict["image_features"], z)
    alone = lift.forward_intermediates(images, [0], output_fmt="NLC", intermediates_only=True)
    assert torch.equal(alone[0], first)
    for layers, wanted in (([0], [first]), ([-1, 0], [z, first]), ([-1], [z])):
        found = lift.forward_maps(images, layers)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_reset_classifier(lift, images):
    pooled = lift.forward_head(lift.forward_features(images), pre_logits=True)
    assert lift.get_classifier() is lift.head
    lift.reset_classifier(5)
    assert lift.head.weight.shape == (5, 96)
    assert lift(images).shape == (2, 5)
    lift.reset_classifier(0, "avg")
    assert lift.num_classes == 0
    torch.testing.assert_close(lift(images), pooled, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="global_pool: Lift allows None or 'avg', got 'token'"):
        lift.reset_classifier(5, "token")


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_a_graph_break(lift, images):
    """tests/train/test_trainer.py::test_compiled_run compares a run compiled by Inductor."""
    teacher = torch.randn(2, 17, 96)[:, 1:]
    for function, arguments in (
        (lift, (images,)),
        (lift.forward_with_features, (images, (0, -1))),
        (lift.forward_with_loss, (images, teacher)),
    ):
        compiled: Any = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=1e-4, atol=1e-4)
