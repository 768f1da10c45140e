"""soft_kd on CPU tensors: exactness, autograd's uses of it, views, compilation, memory."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import featkd
from featkd.cpu import soft_kd as cpu
from featkd.functional import soft_kd
from featkd.ops.soft_kd import _forward
from tests.kernels.feature_kd_cases import relative
from tests.kernels.soft_kd_cases import (
    Problem,
    assert_as_exact_as_eager,
    assert_as_reference,
    evaluate,
    special,
)
from tests.ops.test_projected_feature_kd import Largest

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PROBLEMS = [
    Problem(7, 1000),
    Problem(270, 1000, alpha=0.3, tau=2.0, soft=True),  # more rows than a chunk has
    Problem(20, 33, alpha=0.6, soft=True),
    Problem(20, 33, alpha=0.6, tau=0.5),
    Problem(60, 10, alpha=0.0),
    Problem(60, 10, alpha=0.0, soft=True),
    Problem(60, 10, alpha=1.0),
    Problem(60, 10, alpha=1.0, tau=4.0, soft=True),
    Problem(1, 12),
    Problem(3, 1, alpha=0.5, soft=True),
]


def run(
    student: Tensor, teacher: Tensor | None, target: Tensor, problem: Problem, upstream: float = 1
) -> dict[str, Tensor]:
    """Loss and gradient through the public function."""
    leaf = student.detach().requires_grad_()
    loss = soft_kd(leaf, teacher, target, alpha=problem.alpha, tau=problem.tau)
    (loss * upstream).backward()
    return {"loss": loss.detach(), "student": leaf.grad}


def views(x: Tensor) -> dict[str, Tensor]:
    """Tensors equal to x in every element, laid out in other ways."""
    wider = x.new_zeros(len(x) * 2, x.shape[1] + 3)
    wider[::2, 2:-1] = x
    return {"sliced": wider[::2, 2:-1], "transposed": x.t().contiguous().t()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_exact_as_eager(problem, dtype):
    tensors = problem.tensors(dtype)
    got = run(*tensors, problem)
    assert featkd.last_backend("soft_kd") == "cpu"
    assert_as_exact_as_eager(got, problem, *tensors)


def test_exact_where_student_and_teacher_nearly_agree():
    problem = Problem(64, 100, alpha=1.0)
    student, _, target = problem.tensors(torch.float32)
    teacher = student + 1e-3 * problem.tensors(torch.float32, seed=1)[0]
    assert_as_exact_as_eager(
        run(student, teacher, target, problem), problem, student, teacher, target
    )


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("soft", [False, True])
def test_nan_and_inf_as_the_reference(soft, alpha, tau):
    student, teacher, target = special(soft)
    losses, gradient = cpu.sweep(
        student,
        teacher if alpha else None,
        target if alpha < 1 else None,
        alpha=alpha,
        tau=tau,
        need_gradient=True,
    )
    assert_as_reference(losses, gradient, student, teacher, target, alpha, tau)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", ["sliced", "transposed"])
def test_views_give_the_same_bits(name, soft):
    problem = Problem(5, 21, 0.6, 2.0, soft)
    student, teacher, target = problem.tensors(torch.float32)
    plain = run(student, teacher, target, problem)
    other = views(target)[name] if soft else target.repeat_interleave(2)[::2]
    viewed = run(views(student)[name], views(teacher)[name], other, problem)
    assert all(torch.equal(viewed[key], value) for key, value in plain.items())


def test_expanded_rows():
    problem = Problem(1, 21, soft=True)
    tensors = problem.tensors(torch.float32)
    expanded = run(*(x.expand(4, -1) for x in tensors), problem)
    whole = run(*(x.repeat(4, 1) for x in tensors), problem)
    assert all(torch.equal(expanded[key], value) for key, value in whole.items())


def test_dtypes_mix():
    problem = Problem(5, 21, 0.6, 2.0, soft=True)
    student, teacher, target = problem.tensors(torch.float32)
    got = run(student.half(), teacher.bfloat16(), target.double(), problem)
    rounded = student.half(), teacher.bfloat16(), target.double()
    assert_as_exact_as_eager(got, problem, *rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_upstream_gradient_scales_and_repeats_bitwise(dtype):
    problem = Problem(4, 100)
    tensors = problem.tensors(dtype)
    once, again = run(*tensors, problem), run(*tensors, problem)
    scaled = run(*tensors, problem, upstream=-8)
    assert torch.equal(again["loss"], once["loss"])
    assert torch.equal(again["student"], once["student"])
    # powers of two are exact where nothing is subnormal
    normal = once["student"].abs() >= torch.finfo(dtype).tiny
    assert normal.float().mean() > 0.2
    assert torch.equal(scaled["student"][normal], -8 * once["student"][normal])


def test_a_mean_over_many_rows_keeps_the_bits_of_a_half_gradient():
    """Divided by 4,096 as it is formed, most of it would be subnormal before the loss is scaled."""
    problem = Problem(4096, 100, alpha=1.0)
    student, teacher, target = problem.tensors(torch.float16)
    got = run(student, teacher, target, problem, upstream=2.0**16)["student"]
    want = evaluate(student, teacher, target, 1.0, 1.0)["student"] * 2.0**16
    assert relative(got, want) < 5e-4


def test_an_expanded_upstream_gradient():
    problem = Problem(4, 10)
    student, teacher, target = problem.tensors(torch.float64)
    leaf = student.requires_grad_()
    loss = soft_kd(leaf, teacher, target, alpha=0.9).expand(3, 2)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    want = evaluate(student, teacher, target, 0.9, 1.0)["student"]
    assert relative(gradient, 6 * want) < 1e-14


def test_used_twice_and_retained():
    problem = Problem(4, 10)
    student, teacher, target = problem.tensors(torch.float64)
    student.requires_grad_()

    def total(loss):
        first = loss(student, 0.9, 1.0)
        return first + 3 * first * loss(2 * student, 0.4, 2.0)

    ours = total(lambda x, alpha, tau: soft_kd(x, teacher, target, alpha=alpha, tau=tau))
    (one,) = torch.autograd.grad(ours, student, retain_graph=True)
    (two,) = torch.autograd.grad(ours, student)
    assert torch.equal(one, two)
    with featkd.use_backend("reference"):
        plain = total(lambda x, alpha, tau: soft_kd(x, teacher, target, alpha=alpha, tau=tau))
    torch.testing.assert_close(one, torch.autograd.grad(plain, student)[0])


def test_a_second_derivative_is_an_error():
    student, teacher, target = Problem(4, 10).tensors(torch.float64)
    student.requires_grad_()
    loss = soft_kd(student, teacher, target, alpha=0.9)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_inputs_are_left_alone(soft, tau):
    problem = Problem(4, 10, 0.5, tau, soft)
    tensors = problem.tensors(torch.float32)
    before = [x.clone() for x in tensors]
    run(*tensors, problem)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_nothing_is_differentiated_without_need(monkeypatch):
    problem = Problem(4, 10)
    student, teacher, target = problem.tensors(torch.float32)
    asked = []
    sweep = cpu.sweep

    def spy(*tensors, need_gradient, **weights):
        asked.append(need_gradient)
        return sweep(*tensors, need_gradient=need_gradient, **weights)

    monkeypatch.setattr(cpu, "sweep", spy)
    assert not soft_kd(student, teacher, target, alpha=0.9).requires_grad
    student.requires_grad_()
    with torch.no_grad():
        assert not soft_kd(student, teacher, target, alpha=0.9).requires_grad
    assert soft_kd(student, teacher, target, alpha=0.9).requires_grad
    assert asked == [False, False, True]


def test_a_target_that_requires_grad_gets_it_from_the_reference():
    problem = Problem(4, 10, soft=True)
    student, teacher, target = problem.tensors(torch.float64)
    target.requires_grad_()
    with pytest.warns(UserWarning, match="reference backend: a target that requires grad"):
        loss = soft_kd(student, teacher, target, alpha=0.75)
    assert featkd.last_backend("soft_kd") == "reference"
    (gradient,) = torch.autograd.grad(loss, target)
    torch.testing.assert_close(gradient, -0.25 / 4 * student.log_softmax(1))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        soft_kd(student, teacher, target, alpha=0.75)
    assert featkd.last_backend("soft_kd") == "cpu"


def test_the_unused_tensor_is_not_looked_at():
    """As the reference does: a term of weight zero is left out."""
    student, teacher, target = Problem(4, 10).tensors(torch.float32)
    out_of_range, nan = target + 100, torch.full_like(teacher, torch.nan)
    assert soft_kd(student, teacher, out_of_range, alpha=1.0).isfinite()
    assert soft_kd(student, nan, target, alpha=0.0).isfinite()


@pytest.mark.parametrize("label", [10, -1, -100])
def test_a_class_index_out_of_range_is_an_error(label):
    student, teacher, target = Problem(4, 10).tensors(torch.float32)
    target[2] = label
    with pytest.raises(RuntimeError, match=f"index {label} is out of bounds .* with size 10"):
        soft_kd(student, teacher, target, alpha=0.5)


def test_several_threads_at_once():
    problem = Problem(64, 500, tau=2.0)
    tensors = [problem.tensors(torch.float32, seed) for seed in range(4)]
    want = [run(*x, problem) for x in tensors]
    got: dict[int, dict[str, Tensor]] = {}

    def work(i: int) -> None:
        got[i] = run(*tensors[i], problem)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(want):
        assert all(torch.equal(got[i][key], value) for key, value in expected.items())


@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize(("alpha", "soft"), [(0.0, False), (0.5, True), (1.0, False)])
def test_opcheck(alpha, soft, need):
    student, teacher, target = Problem(4, 10, alpha, soft=soft).tensors(torch.float32)
    student.requires_grad_(need)
    labels = target if alpha < 1 else None
    torch.library.opcheck(_forward, (student, teacher, labels, alpha, 2.0, need, "cpu"))


def test_fullgraph_compile():
    student, teacher, target = Problem(4, 10).tensors(torch.float32)
    student.requires_grad_()

    def loss(x):
        return 2 * soft_kd(x.sin(), teacher, target, alpha=0.9, tau=2.0)

    compiled, plain = torch.compile(loss, fullgraph=True)(student), loss(student)
    torch.testing.assert_close(compiled, plain)
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (compiled, plain))
    torch.testing.assert_close(ours, theirs)


def test_no_tensor_but_the_gradient_of_the_size_of_the_logits():
    student, teacher, target = Problem(4096, 1000).tensors(torch.float32)
    Largest.elements = 0
    with Largest():
        cpu.sweep(student, teacher, target, alpha=0.9, tau=2.0, need_gradient=False)
    assert 0 < Largest.elements < student.numel() / 3


def test_equals_torch_cross_entropy():
    student, _, target = Problem(60, 10, alpha=0.0).tensors(torch.float32)
    torch.testing.assert_close(
        soft_kd(student, None, target, alpha=0.0), F.cross_entropy(student, target)
    )
