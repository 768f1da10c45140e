"""The op on CPU tensors: exactness, autograd's uses of it, views, compilation, memory."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import featkd
from featkd.cpu import lift_head as cpu
from featkd.functional import lift_head
from featkd.ops.lift_head import _backward, _forward
from tests.kernels.feature_kd_cases import relative
from tests.kernels.lift_head_cases import (
    UPSTREAM,
    Inputs,
    Problem,
    assert_as_exact_as_eager,
    evaluate,
    run,
)
from tests.ops.test_projected_feature_kd import Largest, views

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PROBLEMS = [
    Problem(2, 196, 24, 40, 14),
    Problem(3, 9, 8, 8, 3),
    Problem(1, 1, 5, 7, 1),
    Problem(2, 800, 6, 10, 20),  # more tokens than a chunk has rows
    Problem(2, 1000, 10, 6, 0),  # narrower than the student: W^T W has no full rank
    Problem(5, 196, 24, 40, compare=False),
    Problem(2, 900, 6, 10, compare=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_exact_as_eager(problem, dtype):
    x = problem.inputs(dtype)
    got = run(x, problem.width)
    assert featkd.last_backend("lift_head") == "cpu"
    assert_as_exact_as_eager(got, x, problem.width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compare", [True, False])
def test_exact_as_eager_where_norms_cancel(dtype, compare):
    """One channel far above the others, as ViTs have, which W nearly ignores; tokens alike."""
    x = Problem(4, 49, 48, 96, compare=compare).inputs(torch.float64)
    features = 0.1 * x.features + x.features[:1, :1]
    features[..., 7] = 60 + features[..., 7]
    weight = x.weight.clone()
    weight[:, 7] *= 0.01
    weight += 2  # an offset that the norm takes away
    direction = run(x, 0)["pooled"]  # as of a loss of the pooled map alone: g goes along x_hat
    x = x._replace(features=features, weight=weight, direction=direction).to(dtype)
    assert_as_exact_as_eager(run(x, 0), x, 0)


@pytest.mark.parametrize("name", ["sliced", "transposed", "images last"])
@pytest.mark.parametrize("width", [0, 4])
def test_views_give_the_same_bits(name, width):
    x = Problem(5, 12, 6, 10, width).inputs(torch.float32)
    viewed = x._replace(
        features=views(x.features)[name],
        teacher=views(x.teacher)[name],
        norm_weight=x.norm_weight.repeat_interleave(2)[::2],
    )
    plain = run(x, width)
    for key, value in run(viewed, width).items():
        assert torch.equal(value, plain[key]), key


def test_a_transposed_weight():
    x = Problem(5, 12, 6, 10, 4).inputs(torch.float64)
    got = run(x._replace(weight=x.weight.t().contiguous().t()), 4)
    for key, value in run(x, 4).items():
        torch.testing.assert_close(got[key], value)


def test_expanded_features_teacher_and_gradient():
    x = Problem(1, 12, 6, 10, 4).inputs(torch.float32)
    sizes = {"features": (4, -1, -1), "teacher": (4, -1, -1), "direction": (4, -1)}
    expanded = x._replace(**{name: getattr(x, name).expand(n) for name, n in sizes.items()})
    whole = x._replace(**{name: getattr(expanded, name).clone() for name in sizes})
    got = run(expanded, 4)
    for key, value in run(whole, 4).items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("compare", [True, False])
@pytest.mark.parametrize("laid_out", UPSTREAM, ids=UPSTREAM)
def test_an_upstream_gradient_of_any_strides(laid_out, compare):
    x = Problem(3, 12, 6, 10, 4, compare).inputs(torch.float32)
    viewed = x._replace(direction=UPSTREAM[laid_out](x.direction))
    assert not viewed.direction.is_contiguous()
    whole = x._replace(direction=viewed.direction.contiguous())
    got = run(viewed, 4)
    for key, value in run(whole, 4).items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("compare", [True, False])
def test_upstream_gradients_scale_and_repeat_bitwise(compare):
    x = Problem(3, 12, 6, 10, 4, compare).inputs(torch.float32)
    once, again = run(x, 4), run(x, 4)
    scaled = run(x._replace(direction=-8 * x.direction, upstream=-8 * x.upstream), 4)
    for key, value in once.items():
        assert torch.equal(again[key], value)
        if key not in ("pooled", "loss"):
            assert torch.equal(scaled[key], -8 * value)


@pytest.mark.parametrize("output", [0, 1])
def test_either_output_may_stay_unused(output):
    x = Problem(3, 12, 6, 10, 4).inputs(torch.float64)
    leaves = [p.requires_grad_() for p in x[:4]]
    used = lift_head(*leaves, x.teacher, metric="spectral", grid=(3, 4))[output]
    got = torch.autograd.grad(used, leaves, x.direction if output == 0 else None)
    with featkd.use_backend("reference"):
        used = lift_head(*leaves, x.teacher, metric="spectral", grid=(3, 4))[output]
    want = torch.autograd.grad(used, leaves, x.direction if output == 0 else None)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("compare", [True, False])
def test_only_what_is_needed_is_differentiated(compare):
    x = Problem(3, 12, 6, 10, 0, compare).inputs(torch.float32)
    want = evaluate(x.to(torch.float64), 0)
    for place, name in enumerate(("features", "weight", "norm_weight", "norm_bias")):
        leaves = [p.clone().requires_grad_(i == place) for i, p in enumerate(x[:4])]
        pooled, loss = lift_head(*leaves, x.teacher)
        total = (pooled * x.direction).sum()
        total = total if loss is None else total + x.upstream * loss
        (gradient,) = torch.autograd.grad(total, leaves[place])
        assert relative(gradient, want[name]) < 1e-6
    pooled, loss = lift_head(*x[:5])
    assert not pooled.requires_grad
    assert loss is None or not loss.requires_grad
    with torch.no_grad():
        assert not lift_head(leaves[0], *leaves[1:], x.teacher)[0].requires_grad


def test_the_loss_is_that_of_projected_feature_kd():
    x = Problem(3, 12, 6, 10, 4).inputs(torch.float32)
    loss = featkd.functional.projected_feature_kd(
        *(x.features, x.teacher, x.weight, None, x.norm_weight, x.norm_bias),
        metric="spectral",
        grid=(3, 4),
    )
    assert torch.equal(run(x, 4)["loss"], loss)


def test_used_twice_and_retained():
    x = Problem(3, 12, 6, 10).inputs(torch.float64)
    weight = x.weight.requires_grad_()
    rest = (x.norm_weight, x.norm_bias, x.teacher)

    def total(head):
        (p, one), (q, two) = head(x.features, weight, *rest), head(2 * x.features, weight, *rest)
        return one + 3 * one * two + (p * q).sum()

    result = total(lift_head)
    (once,) = torch.autograd.grad(result, weight, retain_graph=True)
    (again,) = torch.autograd.grad(result, weight)
    assert torch.equal(once, again)
    with featkd.use_backend("reference"):
        (want,) = torch.autograd.grad(total(lift_head), weight)
    torch.testing.assert_close(once, want)


def test_inputs_and_upstream_gradients_are_left_alone():
    x = Problem(2, 12, 6, 10, 4).inputs(torch.float32)
    before = [p.clone() for p in x[:6]]
    leaves = [p.requires_grad_() for p in x[:4]]
    outputs = lift_head(*leaves, x.teacher, metric="spectral", grid=(3, 4))
    upstream = torch.tensor(3.0)
    torch.autograd.grad(outputs, leaves, (x.direction, upstream))
    assert all(torch.equal(p, q) for p, q in zip(x[:6], before, strict=True))
    assert upstream == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("compare", [True, False])
def test_nan_and_inf_reach_their_image_and_no_other(bad, compare):
    x = Problem(3, 12, 6, 10, 4, compare).inputs(torch.float32)
    x.features[1, 3, 2] = bad
    got = run(x, 4)
    assert not got["weight"].isfinite().all()
    assert compare == ("loss" in got and not got["loss"].isfinite())
    for name in ("pooled", "features"):
        assert not got[name][1].isfinite().all()
        assert got[name][0].isfinite().all()
        assert got[name][2].isfinite().all()


def test_several_threads_at_once():
    inputs = [Problem(4, 196, 16, 24, 14).inputs(torch.float32, seed) for seed in range(4)]
    want = [run(x, 14) for x in inputs]
    got: dict[int, dict[str, Tensor]] = {}

    def work(i: int) -> None:
        got[i] = run(inputs[i], 14)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(want):
        assert all(torch.equal(got[i][key], value) for key, value in expected.items())


@pytest.mark.parametrize("compare", [True, False])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_opcheck(needs, compare):
    x = Problem(2, 12, 6, 10, 4, compare).inputs(torch.float32)
    x.features.requires_grad_(needs[0])
    for p in x[1:4]:
        p.requires_grad_(needs[1])
    arguments = (*x[:5], 1e-5, 4, torch.float32, *needs, "cpu")
    torch.library.opcheck(_forward, arguments)
    if not any(needs):
        return
    kept = _forward(*arguments)[2:]
    leaves = [None if p is None else p.detach() for p in x[:5]]
    d_loss = torch.tensor(2.0) if compare else None
    for gradients in ((x.direction, d_loss), (x.direction, None), (None, torch.tensor(2.0))):
        if compare or gradients[0] is not None:
            tail = (1e-5, 4, torch.float32, *needs, "cpu")
            torch.library.opcheck(_backward, (*gradients, *map(torch.detach, kept), *leaves, *tail))


@pytest.mark.parametrize("compare", [True, False])
def test_fullgraph_compile(compare):
    x = Problem(2, 12, 6, 10, 4, compare).inputs(torch.float32)
    leaves = [p.requires_grad_() for p in x[:4]]

    def total(features, *parameters):
        pooled, loss = lift_head(
            features.sin(), *parameters, x.teacher, metric="spectral", grid=(3, 4)
        )
        result = (pooled * x.direction).sum()
        return result if loss is None else result + 2 * loss

    plain, compiled = total(*leaves), torch.compile(total, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, plain)
    pairs = zip(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_autocast_changes_nothing_here():
    x = Problem(2, 12, 6, 10, 4).inputs(torch.float32)
    want = run(x, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(x, 4)
    assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compare", [True, False])
def test_no_tensor_of_all_rows_by_teacher_channels(compare, dtype):
    """But for f W^T where it is kept. An op hides its tensors from the mode, so no op here."""
    x = Problem(33, 196, 10, 64, 14, compare).inputs(dtype)
    whole, options = 33 * 196 * 64, {"eps": 1e-5, "width": 14, "compute": dtype}
    Largest.elements = 0
    with Largest():
        cpu.forward(*x[:5], **options, need_gradient=False)
    assert Largest.elements == cpu._ROWS * 64 < whole / 4
    kept = cpu.forward(*x[:5], **options, need_gradient=True)
    assert kept.product.numel() == (whole if compare and dtype == torch.float32 else 0)
    direction = x.direction.to(kept.rstd.dtype)
    needs = {"need_features": True, "need_parameters": True}
    Largest.elements = 0
    with Largest():
        if compare:
            upstream = direction, torch.tensor(2.0)
            cpu.backward_with_loss(*x[:5], kept.product, *upstream, **options, **needs)
        else:
            given = (*x[:3], kept.rstd, kept.means, direction)
            cpu.backward(*given, compute=dtype, **needs)
    largest = cpu._ROWS * 64 if compare else x.features.numel()
    assert Largest.elements == largest < whole / 4


def test_backends_by_name():
    x: Inputs = Problem(2, 9, 4, 6).inputs(torch.float32)
    with featkd.use_backend("reference"):
        lift_head(*x[:5])
        assert featkd.last_backend("lift_head") == "reference"
    with (
        featkd.use_backend("triton"),
        pytest.warns(UserWarning, match=r"lift_head runs on the reference backend: Triton kernels"),
    ):
        lift_head(*x[:5])
    assert featkd.last_backend("lift_head") == "reference"
    wide = Problem(1, 130, 4, 6).inputs(torch.float32)
    lift_head(*wide[:5], metric="spectral", grid=(2, 65))
    assert featkd.last_backend("lift_head") == "cpu"


def test_a_wide_grid_is_the_reference_on_triton(monkeypatch):
    monkeypatch.setattr("featkd.kernels.launch._redirected", lambda *_: pytest.fail("launched"))
    x = Problem(1, 130, 4, 6).inputs(torch.float32)
    with (
        featkd.use_backend("triton"),
        pytest.warns(UserWarning, match="a patch grid of 65 columns, more than 64"),
    ):
        lift_head(*x[:5], metric="spectral", grid=(2, 65))
