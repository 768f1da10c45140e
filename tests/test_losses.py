"""Loss modules: the published objective, pooling, projectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from featkd.functional import soft_kd
from featkd.losses import (
    DistillationLoss,
    FeatureLoss,
    PooledFeatureKD,
    ProjectedFeatureKD,
    pool_channels,
    smooth_labels,
)


def maps(*widths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 9, width, generator=generator) for width in widths]


@pytest.mark.parametrize("feature", ["mse", "spectral"])
def test_published_objective_matches_torch(feature):
    """(1 - alpha) CE + beta w_feat L_feat + alpha tau^2 KL, with all weights different from 1."""
    alpha, beta, w_feat, tau, smoothing = 0.9, 3.0, 0.2, 2.0, 0.1
    (logits, teacher_logits), target = torch.randn(2, 2, 5).unbind(), torch.tensor([1, 4])
    student, teacher = maps(8, 6), maps(8, 6, seed=1)
    loss = DistillationLoss(
        alpha=alpha, beta=beta, w_feat=w_feat, tau=tau, feature=feature, label_smoothing=smoothing
    )
    terms = loss(logits, target, teacher_logits, student, teacher)

    ce = F.cross_entropy(logits, target, label_smoothing=smoothing)
    kl = F.kl_div(
        F.log_softmax(logits / tau, 1),
        F.log_softmax(teacher_logits / tau, 1),
        log_target=True,
        reduction="batchmean",
    )
    pairs = []
    for s, t in zip(student, teacher, strict=True):
        d = s - t
        if feature == "spectral":
            z = torch.fft.rfft2(d.transpose(1, 2).reshape(2, -1, 3, 3), norm="ortho")
            d = torch.stack((z.real, z.imag))
        pairs.append(d.square().mean())
    l_feat = (pairs[0] + pairs[1]) / 2
    expected = (1 - alpha) * ce + beta * w_feat * l_feat + alpha * tau**2 * kl
    torch.testing.assert_close(terms.total, expected)
    torch.testing.assert_close(terms.features, l_feat)
    torch.testing.assert_close(terms.logits, (1 - alpha) * ce + alpha * tau**2 * kl)


def test_without_labels_there_is_no_cross_entropy():
    logits, teacher_logits = torch.randn(2, 2, 5).unbind()
    student, teacher = maps(8), maps(8, seed=1)
    distance = F.mse_loss(student[0], teacher[0])
    log_s, log_t = ((x / 3).log_softmax(1) for x in (logits, teacher_logits))
    kl = 0.5 * 9 * F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    both = DistillationLoss(alpha=0.5, tau=3.0, feature="mse", label_smoothing=0.1)
    terms = both(logits, None, teacher_logits, student, teacher)
    torch.testing.assert_close(terms.total, 0.2 * distance + kl)
    torch.testing.assert_close(terms.logits, kl)
    terms = DistillationLoss(feature="mse")(None, None, None, student, teacher)
    torch.testing.assert_close(terms.total, 0.2 * distance)
    assert terms.logits == 0
    terms = DistillationLoss(pooled=2.0)(None, None, pooled_loss=distance)
    torch.testing.assert_close(terms.total, 2 * distance)
    with pytest.raises(ValueError, match="target: None, but alpha is 0 and no features"):
        DistillationLoss()(logits, None)
    with pytest.raises(ValueError, match="student_logits: None"):
        DistillationLoss(alpha=0.5)(None, None, teacher_logits)
    with pytest.raises(ValueError, match=r"target: None, but alpha is 0\.5"):
        soft_kd(logits, teacher_logits, None, alpha=0.5)


def test_without_teacher_is_cross_entropy():
    logits, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    terms = DistillationLoss(label_smoothing=0.1)(logits, target)
    torch.testing.assert_close(terms.total, F.cross_entropy(logits, target, label_smoothing=0.1))
    assert terms.total.requires_grad
    assert not terms.logits.requires_grad
    assert terms.features == 0


@pytest.mark.parametrize(("student", "teacher"), [(4, 8), (8, 4), (6, 9), (5, 5)])
def test_wider_map_is_pooled_over_adjacent_channels(student, teacher):
    (s,), (t,) = maps(student), maps(teacher, seed=1)
    got = pool_channels(s, t)
    width = min(student, teacher)
    for original, pooled in zip((s, t), got, strict=True):
        assert pooled.shape == (2, 9, width)
        if original.shape[2] == width:
            assert pooled is original
            continue
        # bins of adaptive pooling: floor(i n / m) to ceil((i+1) n / m)
        for channel in range(width):
            n = original.shape[2]
            low, high = channel * n // width, -((-(channel + 1) * n) // width)
            torch.testing.assert_close(pooled[..., channel], original[..., low:high].mean(-1))


def test_gradient_reaches_the_student_through_pooling():
    (s,), (t,) = maps(8), maps(4, seed=1)
    s.requires_grad_()
    loss = DistillationLoss(feature="mse", w_feat=1.0)
    logits = torch.zeros(2, 3)
    loss(logits, torch.tensor([0, 1]), None, [s], [t]).total.backward()
    expected = (s.detach().reshape(2, 9, 4, 2).mean(-1) - t) * 2 / t.numel() / 2
    torch.testing.assert_close(s.grad, expected.repeat_interleave(2, -1))


@pytest.mark.parametrize(
    ("settings", "term", "weight"),
    [
        ({"beta": 3.0, "w_feat": 0.2, "feature": "mse"}, "features", 0.6),
        ({"pooled": 2.0}, "pooled", 2.0),
    ],
)
def test_terms_computed_elsewhere_are_added_with_their_weights(settings, term, weight):
    """A feature loss takes the place of the maps."""
    logits, target = torch.randn(2, 5), torch.tensor([1, 4])
    formed = torch.tensor(0.75, requires_grad=True)
    name = {"features": "feature_loss", "pooled": "pooled_loss"}[term]
    terms = DistillationLoss(**settings)(logits, target, **{name: formed})
    torch.testing.assert_close(terms.total, F.cross_entropy(logits, target) + weight * 0.75)
    assert getattr(terms, term) == 0.75
    assert terms.features + terms.pooled == 0.75
    assert not getattr(terms, term).requires_grad
    (gradient,) = torch.autograd.grad(terms.total, formed)
    torch.testing.assert_close(gradient, torch.tensor(weight))


def test_projected_feature_kd_module_trains_its_projector():
    torch.manual_seed(0)
    module = ProjectedFeatureKD(3, 5, bias=True, metric="spectral", grid=(3, 3))
    student, teacher = torch.randn(2, 9, 3), torch.randn(2, 9, 5)
    expected_map = F.layer_norm(module.proj(student), (5,)) - teacher
    z = torch.fft.rfft2(expected_map.transpose(1, 2).reshape(2, 5, 3, 3), norm="ortho")
    expected = torch.stack((z.real, z.imag)).square().mean()
    loss = module(student, teacher)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert len(list(module.parameters())) == 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("norm", [False, True])
def test_feature_loss_projects_some_pairs_and_pools_others(norm):
    """Values and gradients in float64, against closed forms."""
    torch.manual_seed(0)
    module = ProjectedFeatureKD(3, 5, bias=not norm, norm=norm).double()
    pairs = [(8, 4), (3, 5)]
    (s0, s1), (t0, t1) = (
        [torch.randn(2, 4, pair[side], dtype=torch.float64) for pair in pairs] for side in (0, 1)
    )
    s1.requires_grad_()
    loss = FeatureLoss("mse", projectors={1: module})([s0, s1], [t0, t1])
    loss.backward()
    with torch.no_grad():
        y = s1 @ module.proj.weight.T + (0 if norm else module.proj.bias)
        centred = y - y.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        z = centred * scale if norm else y
        error = z - t1
        pooled = (s0.reshape(2, 4, 4, 2).mean(-1) - t0).square().mean()
        torch.testing.assert_close(loss, (pooled + error.square().mean()) / 2)
        d = error * 2 / error.numel() / 2
        if norm:  # gamma is 1 and beta 0
            torch.testing.assert_close(module.norm.weight.grad, (d * z).sum((0, 1)))
            torch.testing.assert_close(module.norm.bias.grad, d.sum((0, 1)))
            d = (d - d.mean(-1, keepdim=True) - z * (d * z).mean(-1, keepdim=True)) * scale
        else:
            torch.testing.assert_close(module.proj.bias.grad, d.sum((0, 1)))
        expected = torch.einsum("bnt,bns->ts", d, s1)
        torch.testing.assert_close(module.proj.weight.grad, expected)
        torch.testing.assert_close(s1.grad, d @ module.proj.weight)


@pytest.mark.parametrize("metric", ["cosine", "mse"])
def test_pooled_feature_kd_in_float64(metric):
    """Values and gradients against closed forms."""
    torch.manual_seed(0)
    module = PooledFeatureKD(3, 5, metric=metric).double()
    s = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    t = torch.randn(4, 5, dtype=torch.float64)
    loss = module(s, t)
    loss.backward()
    with torch.no_grad():
        p = s @ module.proj.weight.T + module.proj.bias
        if metric == "mse":
            expected, d = (p - t).square().mean(), (p - t) * 2 / p.numel()
        else:
            lengths = p.norm(dim=1, keepdim=True)
            unit, target = p / lengths, t / t.norm(dim=1, keepdim=True)
            cosine = (unit * target).sum(1, keepdim=True)
            expected, d = 1 - cosine.mean(), (cosine * unit - target) / lengths / 4
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(module.proj.weight.grad, d.T @ s)
        torch.testing.assert_close(module.proj.bias.grad, d.sum(0))
        torch.testing.assert_close(s.grad, d @ module.proj.weight)


def test_pooled_feature_kd_in_half_precision_and_on_bad_input():
    module = PooledFeatureKD(3, 5)
    s, t = torch.randn(4, 3), torch.randn(4, 5)
    exact = module(s, t)
    half = module(s.bfloat16(), t.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(s, t)
    for x in (half, mixed):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, exact, rtol=0.02, atol=0.02)
    for wrong, message in [
        ((s[:, :2], t), r"student: expected shape \(B, 3\), got \(4, 2\)"),
        ((s, t[:3]), r"teacher: expected shape \(4, 5\), got \(3, 5\)"),
        ((s[:0], t[:0]), "student"),
        ((s, t.clone().requires_grad_()), "teacher: requires grad"),
    ]:
        with pytest.raises(ValueError, match=message):
            module(*wrong)
    with pytest.raises(ValueError, match=r"metric: expected one of cosine, mse; got 'l1'"):
        PooledFeatureKD(3, 5, metric="l1")


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([], [], "at least one; got 0 and 0"),
        (maps(4), maps(4, 4), "got 1 and 2"),
        (maps(4), [torch.zeros(2, 4, 4)], "layer pair 0: the student's map is"),
    ],
)
def test_mismatched_maps_raise(student, teacher, message):
    loss = DistillationLoss(feature="mse")
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(2, 3), torch.tensor([0, 1]), None, student, teacher)


@pytest.mark.parametrize(
    "field", [{"alpha": 2.0}, {"label_smoothing": -0.1}, {"tau": 0.0}, {"feature": "cosine"}]
)
def test_bad_settings_raise(field):
    name = "metric" if "feature" in field else next(iter(field))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        DistillationLoss(**field)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_projector_casts_to_students_dtype(dtype):
    module = ProjectedFeatureKD(3, 5, bias=True)
    loss = module(torch.randn(2, 9, 3, dtype=dtype), torch.randn(2, 9, 5))
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    loss.backward()
    assert module.proj.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (torch.ones(2, 9, 3, dtype=torch.int64), "student: expected a floating-point tensor"),
        (torch.ones(2, 9, 4), r"student: expected shape \(B, N, 3\), got \(2, 9, 4\)"),
        ([1.0], "student: expected a torch.Tensor, got list"),
    ],
)
def test_projector_rejects_bad_students(student, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ProjectedFeatureKD(3, 5)(student, torch.ones(2, 9, 5))


def test_projector_hooks_run():
    """The projector is called as a module, so hooks, adapters and sharding work."""
    module = ProjectedFeatureKD(3, 5)
    seen = []
    module.proj.register_forward_hook(lambda *_: seen.append(1))
    module(torch.randn(2, 9, 3), torch.randn(2, 9, 5))
    assert seen == [1]


def halve(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output / 2)


CHANGES: dict[str, Callable[[ProjectedFeatureKD], object]] = {
    "pruned": lambda loss: prune.l1_unstructured(loss.proj, "weight", 0.5),
    "weight norm": lambda loss: nn.utils.parametrizations.weight_norm(loss.proj),
    "no norm": lambda loss: setattr(loss, "norm", nn.Identity()),
    "hook on the norm": lambda loss: halve(loss.norm),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_projector_or_norm_takes_effect(change):
    """Modules can be pruned, parametrised, replaced or hooked."""
    student, teacher = *maps(6), *maps(8, seed=1)
    loss = ProjectedFeatureKD(6, 8)
    before = loss(student, teacher)
    CHANGES[change](loss)
    want = F.mse_loss(loss.norm(loss.proj(student)), teacher)
    torch.testing.assert_close(loss(student, teacher), want)
    assert change == "weight norm" or not torch.isclose(want, before)


def test_smooth_labels_ignore_the_default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        soft = smooth_labels(torch.tensor([1]), 4, 0.2)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(soft, torch.tensor([[0.05, 0.85, 0.05, 0.05]]))
