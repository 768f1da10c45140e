"""The op on CPU tensors: exactness, autograd's uses of it, views, compilation, memory."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import featkd
from featkd.cpu import projected_feature_kd as cpu
from featkd.functional import projected_feature_kd
from featkd.ops.projected_feature_kd import _backward, _forward
from tests.kernels.feature_kd_cases import Problem, assert_as_exact_as_eager, evaluate, relative

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PROBLEMS = [
    Problem(2, 196, 24, 40, 14),
    Problem(3, 9, 8, 8, 3, bias=True),
    Problem(1, 1, 5, 7, 1, norm="weight"),
    Problem(2, 800, 6, 10, 20, norm="none"),  # more tokens than a chunk has rows
    Problem(2, 1000, 6, 10, 0, bias=True),
    Problem(5, 12, 7, 7, 4, projector=False, norm="none"),
    Problem(5, 12, 7, 7, 3, projector=False),
]


def run(tensors: list[Tensor | None], width: int, upstream: float = 1) -> dict[str, Tensor]:
    """Loss and gradients through the public function."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    student, teacher, *parameters = leaves
    grid = (student.shape[1] // width, width) if width else None
    metric = "spectral" if width else "mse"
    loss = projected_feature_kd(student, teacher.detach(), *parameters, metric=metric, grid=grid)
    (loss * upstream).backward()
    names = ("student", "weight", "bias", "norm_weight", "norm_bias")
    found = zip(names, [student, *parameters], strict=True)
    return {"loss": loss.detach(), **{name: x.grad for name, x in found if x is not None}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_exact_as_eager(problem, dtype):
    tensors = problem.tensors(dtype)
    got = run(tensors, problem.width)
    assert featkd.last_backend("projected_feature_kd") == "cpu"
    for name, x in got.items():
        if name != "loss":
            assert x.dtype == dtype
    assert_as_exact_as_eager(got, tensors, problem.width)


def views(x: Tensor) -> dict[str, Tensor]:
    """Tensors equal to x in every element, laid out in other ways."""
    batch, tokens, channels = x.shape
    wider = x.new_zeros(batch, tokens + 1, channels + 3)
    wider[:, 1:, 2:-1] = x
    return {
        "sliced": wider[:, 1:, 2:-1],
        "transposed": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "images last": x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }


@pytest.mark.parametrize("name", ["sliced", "transposed", "images last"])
@pytest.mark.parametrize("width", [0, 4])
@pytest.mark.parametrize("form", ["projected", "normed", "as wide"])
def test_views_give_the_same_bits(name, width, form):
    problem = {
        "projected": Problem(5, 12, 6, 10, width, bias=True),
        "normed": Problem(5, 12, 6, 6, width, projector=False),
        "as wide": Problem(5, 12, 6, 6, width, projector=False, norm="none"),
    }[form]
    student, teacher, *parameters = problem.tensors(torch.float32)
    plain = run([student, teacher, *parameters], width)
    turned = [p if p is None or p.dim() < 2 else p.t().contiguous().t() for p in parameters]
    for left, right in (
        (views(student)[name], views(teacher)[name]),
        (views(student)[name], teacher),
    ):
        for key, value in run([left, right, *turned], width).items():
            assert torch.equal(value, plain[key]), key


def test_an_expanded_teacher_and_student():
    problem = Problem(1, 12, 6, 10, 4)
    student, teacher, *parameters = problem.tensors(torch.float32)
    expanded = [student.expand(4, -1, -1), teacher.expand(4, -1, -1), *parameters]
    whole = [student.repeat(4, 1, 1), teacher.repeat(4, 1, 1), *parameters]
    for key, value in run(whole, 4).items():
        assert torch.equal(run(expanded, 4)[key], value), key


def test_upstream_gradient_scales_and_repeats_bitwise():
    tensors = Problem(3, 12, 6, 10, 4).tensors(torch.float32)
    once, again, scaled = run(tensors, 4), run(tensors, 4), run(tensors, 4, upstream=-8)
    for key, value in once.items():
        assert torch.equal(again[key], value)
        if key != "loss":
            assert torch.equal(scaled[key], -8 * value)


def test_only_what_is_needed_is_differentiated():
    student, teacher, weight, _, gamma, beta = Problem(3, 12, 6, 10).tensors(torch.float32)
    want = evaluate([student, teacher, weight, None, gamma, beta], 0, torch.float64)
    for name in ("student", "weight", "norm_bias"):
        leaves = dict(student=student, weight=weight, norm_weight=gamma, norm_bias=beta)
        leaf = leaves[name] = leaves[name].clone().requires_grad_()
        loss = projected_feature_kd(teacher=teacher, **leaves)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert relative(gradient, want[name]) < 1e-6
    assert not projected_feature_kd(student, teacher, weight).requires_grad
    with torch.no_grad():
        assert not projected_feature_kd(student, teacher, leaf.new_ones(10, 6)).requires_grad


def test_used_twice_and_retained():
    student, teacher, weight, *_ = Problem(3, 12, 6, 10).tensors(torch.float64)
    weight.requires_grad_()
    first = projected_feature_kd(student, teacher, weight)
    second = projected_feature_kd(2 * student, teacher, weight)
    total = first + 3 * second * first
    (one,) = torch.autograd.grad(total, weight, retain_graph=True)
    (two,) = torch.autograd.grad(total, weight)
    assert torch.equal(one, two)
    plain = weight.detach().clone().requires_grad_()
    a = (student @ plain.t() - teacher).square().mean()
    b = (2 * student @ plain.t() - teacher).square().mean()
    torch.testing.assert_close(one, torch.autograd.grad(a + 3 * b * a, plain)[0])


def test_inputs_are_left_alone():
    tensors = Problem(2, 12, 6, 6, 4, projector=False, norm="none").tensors(torch.float32)
    before = [None if x is None else x.clone() for x in tensors]
    run(tensors, 4)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True) if x is not None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["student", "teacher", "weight", "bias", "norm_weight"])
@pytest.mark.parametrize("width", [0, 4])
def test_nan_and_inf_reach_the_loss_and_the_gradients(width, which, bad):
    """Of a map, those of its own image and no other's."""
    names = ("student", "teacher", "weight", "bias", "norm_weight", "norm_bias")
    tensors = dict(
        zip(names, Problem(3, 12, 6, 10, width, bias=True).tensors(torch.float32), strict=True)
    )
    of_map = which in ("student", "teacher")
    poisoned = tensors[which][1, 3] if of_map else tensors[which][1:2].view(-1)
    poisoned[2 if poisoned.numel() > 1 else 0] = bad
    got = run(list(tensors.values()), width)
    assert not got["loss"].isfinite()
    for name in ("weight", "bias", "norm_weight", "norm_bias"):
        assert not got[name].isfinite().all(), name
    finite = got["student"].isfinite()
    for image in range(3):
        assert finite[image].all() == (of_map and image != 1), image
    if of_map and not width:
        assert finite[1].all(1).sum() == 11  # and of its own token


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_inf_without_a_projector(which, bad):
    tensors = Problem(3, 12, 6, 6, 4, projector=False, norm="none").tensors(torch.float32)
    tensors[which][1, 3, 2] = bad
    got = run(tensors, 4)
    assert not got["loss"].isfinite()
    assert not got["student"][1, 3].isfinite().all()
    assert got["student"][0::2].isfinite().all()


def test_several_threads_at_once():
    tensors = [Problem(4, 196, 16, 24, 14).tensors(torch.float32, seed) for seed in range(4)]
    want = [run(x, 14) for x in tensors]
    got: dict[int, dict[str, Tensor]] = {}

    def work(i: int) -> None:
        got[i] = run(tensors[i], 14)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(want):
        assert all(torch.equal(got[i][key], value) for key, value in expected.items())


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, False)])
def test_opcheck(needs):
    student, teacher, *parameters = Problem(2, 12, 6, 10, 4, bias=True).tensors(torch.float32)
    student.requires_grad_(needs[0])
    for p in parameters:
        p.requires_grad_(needs[1])
    arguments = (student, teacher, *parameters, 1e-5, 4, torch.float32, *needs, "cpu")
    torch.library.opcheck(_forward, arguments)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("width", [0, 4])
@pytest.mark.parametrize("projector", [True, False])
def test_opcheck_of_the_backward_op(layout, width, projector):
    problem = Problem(2, 12, 6, 10 if projector else 6, width, projector, norm="none")
    student, teacher, weight, *nothing = problem.tensors(torch.float32)
    if layout == "transposed":
        student, teacher = views(student)["transposed"], views(teacher)["transposed"]
        weight = None if weight is None else weight.t().contiguous().t()
    forward = (student, teacher, weight, *nothing)
    rest = (width, torch.float32, True, projector, "cpu")
    _, *kept = _forward(*forward, 1e-5, *rest)
    torch.library.opcheck(_backward, (torch.tensor(3.0), *kept, *forward, *rest))


def test_fullgraph_compile_of_transposed_maps_and_weight():
    student, teacher, weight, *_ = Problem(2, 12, 6, 10).tensors(torch.float32)

    def loss(student, teacher, *weight):
        return projected_feature_kd(student.sin(), teacher, *weight)

    for maps, parameters in (
        ((student, teacher), (weight.t().contiguous().t(),)),
        ((views(student)["transposed"], views(student.cos())["transposed"]), ()),
    ):
        leaves = [x.requires_grad_() for x in (maps[0], *parameters)]
        arguments = (leaves[0], maps[1], *leaves[1:])
        want = torch.autograd.grad(loss(*arguments), leaves)
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*arguments), leaves)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_fullgraph_compile():
    tensors = Problem(2, 12, 6, 10, 4, bias=True).tensors(torch.float32)
    leaves = [x.detach().requires_grad_() for x in tensors]

    @torch.compile(fullgraph=True)
    def loss(student, teacher, *parameters):
        return 2 * projected_feature_kd(
            student.sin(), teacher, *parameters, metric="spectral", grid=(3, 4)
        )

    plain = projected_feature_kd(
        leaves[0].sin(), tensors[1], *leaves[2:], metric="spectral", grid=(3, 4)
    )
    compiled = loss(leaves[0], tensors[1], *leaves[2:])
    torch.testing.assert_close(compiled, 2 * plain)
    inputs = [leaves[0], *leaves[2:]]
    pairs = zip(
        torch.autograd.grad(compiled, inputs), torch.autograd.grad(2 * plain, inputs), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made while it is on."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.dim():
                Largest.elements = max(Largest.elements, x.numel())
        return result


def test_no_tensor_of_all_rows_by_teacher_channels():
    student, teacher, weight, _, gamma, beta = Problem(32, 196, 8, 64).tensors(torch.float32)
    Largest.elements = 0
    with Largest():
        cpu.sweep(
            *(student, teacher, weight, None, gamma, beta),
            eps=1e-5,
            width=14,
            compute=torch.float32,
            need_student=True,
            need_parameters=True,
        )
    assert student.numel() <= Largest.elements <= teacher.numel() / 4


def test_backends_by_name(monkeypatch):
    student, teacher, weight, *_ = Problem(2, 9, 4, 6).tensors(torch.float32)
    with featkd.use_backend("reference"):
        projected_feature_kd(student, teacher, weight)
        assert featkd.last_backend("projected_feature_kd") == "reference"
    with (
        featkd.use_backend("triton"),
        pytest.warns(UserWarning, match="reference backend: Triton kernels cannot run on tensors"),
    ):
        projected_feature_kd(student, teacher, weight)
    assert featkd.last_backend("projected_feature_kd") == "reference"
    with pytest.raises(ValueError, match="backend: expected one of auto, triton, cpu, reference"):
        featkd.use_backend("cuda").__enter__()
    monkeypatch.setenv("FEATKD_BACKEND", "gpu")
    monkeypatch.setattr("featkd.backends._default", None)
    with pytest.raises(ValueError, match="FEATKD_BACKEND: expected one of"):
        projected_feature_kd(student, teacher, weight)
