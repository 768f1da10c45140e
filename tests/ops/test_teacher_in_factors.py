"""The feature losses with a teacher's map in its factors: as with the map, and without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import featkd
from featkd.cpu import lift_head as lift_head_cpu
from featkd.cpu import projected_feature_kd as cpu
from featkd.factors import LowRank, restore
from featkd.functional import lift_head, projected_feature_kd
from featkd.ops import lift_head as lift_head_op
from featkd.ops import projected_feature_kd as projected_feature_kd_op
from tests.kernels import lift_head_cases
from tests.kernels.feature_kd_cases import (
    NAMES,
    Problem,
    assert_as_exact_as_eager,
    evaluate,
    relative,
)
from tests.ops.test_projected_feature_kd import Largest, views

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PROBLEMS = [
    Problem(2, 196, 24, 40, 14),
    Problem(12, 196, 6, 10, norm="none"),  # a chunk and a half
    Problem(2, 800, 6, 10, 20, norm="none"),  # more tokens than a chunk has rows
    Problem(3, 9, 8, 8, 3, bias=True),
    Problem(5, 12, 7, 7, 4, projector=False, norm="none"),
    Problem(5, 12, 7, 7, projector=False, norm="none"),
    Problem(2, 900, 7, 7, 3, projector=False),
]


def factors(problem: Problem, dtype: torch.dtype, rank: int | None = None) -> LowRank:
    generator = torch.Generator().manual_seed(1)
    rank = min(problem.tokens, problem.teacher, 5) if rank is None else rank
    sizes = (problem.tokens, problem.teacher)
    left, right = (torch.randn(problem.batch, n, rank, generator=generator) for n in sizes)
    return LowRank(left.to(dtype), right.to(dtype))


def run(
    tensors: list[Tensor | None], teacher: Tensor | LowRank, width: int, upstream: float = 1
) -> dict[str, Tensor]:
    """Loss and gradients by name, through the public function; tensors' own teacher is unused."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    student, _, *parameters = leaves
    grid = (student.shape[1] // width, width) if width else None
    metric = "spectral" if width else "mse"
    loss = projected_feature_kd(student, teacher, *parameters, metric=metric, grid=grid)
    (loss * upstream).backward()
    found = zip(NAMES[1:], [student, *parameters], strict=True)
    return {"loss": loss.detach(), **{name: x.grad for name, x in found if x is not None}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_exact_as_eager_with_the_map(problem, dtype):
    tensors, teacher = problem.tensors(dtype), factors(problem, dtype)
    tensors[1] = restore(teacher, torch.float64)
    got = run(tensors, teacher, problem.width)
    assert featkd.last_backend("projected_feature_kd") == "cpu"
    assert_as_exact_as_eager(got, tensors, problem.width)
    assert all(got[name].dtype == dtype for name in got if name != "loss")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_factors_of_other_dtypes_are_multiplied_exactly(backend):
    """A product of 600 in float16 factors is Inf, and so it would be under autocast."""
    problem = Problem(2, 12, 6, 10, 4)
    left, right = factors(problem, torch.float16)
    teacher = LowRank(600 * left, 600 * right.to(torch.bfloat16))
    tensors = problem.tensors(torch.float32)
    tensors[1] = restore(teacher, torch.float64)
    with featkd.use_backend(backend), torch.autocast("cpu", dtype=torch.float16):
        loss = projected_feature_kd(
            *(tensors[0], teacher, *tensors[2:]), metric="spectral", grid=(3, 4)
        )
    assert featkd.last_backend("projected_feature_kd") == backend
    assert relative(loss, evaluate(tensors, 4, torch.float64)["loss"]) < 1e-6


def test_no_rank_is_a_map_of_zeros():
    problem = Problem(3, 12, 6, 10)
    tensors = problem.tensors(torch.float64)
    tensors[1] = torch.zeros_like(tensors[1])
    for rank in (0, 5):
        teacher = LowRank(*(torch.zeros_like(x) for x in factors(problem, torch.float64, rank)))
        got = run(tensors, teacher, 0)
        for name, want in evaluate(tensors, 0, torch.float64).items():
            assert relative(got[name], want) < 1e-12, name


@pytest.mark.parametrize("width", [0, 4])
@pytest.mark.parametrize("projector", [True, False])
def test_views_and_repeats(width, projector):
    problem = Problem(3, 12, 6, 10 if projector else 6, width, projector)
    tensors, teacher = problem.tensors(torch.float32), factors(problem, torch.float32)
    plain = run(tensors, teacher, width)
    scaled = run(tensors, teacher, width, upstream=-8)
    for key, value in run(tensors, teacher, width).items():
        assert torch.equal(value, plain[key])
        assert key == "loss" or torch.equal(scaled[key], -8 * value)
    for name in ("sliced", "transposed", "images last"):
        viewed = LowRank(*(views(x)[name] for x in teacher))
        for key, value in run(tensors, viewed, width).items():
            assert relative(value, plain[key]) < 1e-6, (name, key)
    one = [x[:1].expand(3, -1, -1) for x in teacher]
    whole = run(tensors, LowRank(*(x.contiguous() for x in one)), width)
    for key, value in run(tensors, LowRank(*one), width).items():
        assert relative(value, whole[key]) < 1e-6, key


@pytest.mark.parametrize("place", [0, 1])
def test_nan_reaches_the_loss_and_its_own_image(place):
    problem = Problem(3, 12, 6, 10, 4)
    tensors, teacher = problem.tensors(torch.float32), factors(problem, torch.float32)
    teacher[place][1, 3, 2] = torch.nan
    got = run(tensors, teacher, 4)
    assert got["loss"].isnan()
    assert got["student"][1].isnan().any()
    assert got["student"][::2].isfinite().all()


@pytest.mark.parametrize("width", [0, 2])
def test_gradcheck(width):
    problem = Problem(2, 6, 3, 5, width, bias=True)
    tensors, teacher = problem.tensors(torch.float64), factors(problem, torch.float64)
    leaves = [x.requires_grad_() for i, x in enumerate(tensors) if i != 1]
    metric, grid = ("spectral", (3, 2)) if width else ("mse", None)

    def loss(student, *parameters):
        return projected_feature_kd(student, teacher, *parameters, metric=metric, grid=grid)

    torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("projector", [True, False])
def test_opcheck(projector, needs):
    problem = Problem(2, 12, 6, 10 if projector else 6, 4, projector)
    student, _, *parameters = problem.tensors(torch.float32)
    left, right = factors(problem, torch.float16)
    given = (student, left, *parameters)
    rest = (4, torch.float32, *needs, "cpu", right)
    torch.library.opcheck(projected_feature_kd_op._forward, (*given, 1e-5, *rest))
    _, *kept = projected_feature_kd_op._forward(*given, 1e-5, *rest)
    torch.library.opcheck(
        projected_feature_kd_op._backward, (torch.tensor(3.0), *kept, *given, *rest)
    )


def test_fullgraph_compile():
    problem = Problem(2, 12, 6, 10, 4)
    tensors, teacher = problem.tensors(torch.float32), factors(problem, torch.float32)
    leaves = [tensors[0].requires_grad_(), tensors[2].requires_grad_()]

    def loss(student, weight, left, right):
        return 2 * projected_feature_kd(student.sin(), LowRank(left, right), weight)

    compiled = torch.compile(loss, fullgraph=True)(*leaves, *teacher)
    plain = loss(*leaves, *teacher)
    torch.testing.assert_close(compiled, plain)
    for ours, theirs in zip(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_no_whole_map():
    """An op hides its tensors from the mode, so no op here."""
    problem = Problem(66, 196, 10, 64, 14)
    student, _, *parameters = problem.tensors(torch.float32)
    left, right = factors(problem, torch.float32)
    whole = 66 * 196 * 64
    options = {"eps": 1e-5, "width": 14, "compute": torch.float32, "right": right}
    needs = {"need_student": True, "need_parameters": True}
    Largest.elements = 0
    with Largest():
        cpu.sweep(student, left, *parameters, **options, **needs)
    assert Largest.elements == student.numel() < whole / 4


def test_no_whole_map_in_lift_head():
    x = lift_head_cases.Problem(66, 196, 10, 64, 14).inputs(torch.bfloat16)
    left, right = factors(Problem(66, 196, 10, 64), torch.bfloat16)
    options = {"eps": 1e-5, "width": 14, "compute": torch.bfloat16, "right": right}
    Largest.elements = 0
    with Largest():
        kept = lift_head_cpu.forward(*x[:4], left, **options, need_gradient=True)
        upstream = x.direction.float(), torch.tensor(2.0)
        lift_head_cpu.backward_with_loss(
            *(*x[:4], left, kept.product, *upstream),
            **options,
            need_features=True,
            need_parameters=True,
        )
    assert Largest.elements == x.features.numel() < 66 * 196 * 64 / 4


def lift_inputs(compare_width: int, dtype: torch.dtype):
    """A problem of lift_head, the same with factors, and the exact results."""
    x = lift_head_cases.Problem(5, 200, 6, 10, compare_width).inputs(dtype)
    teacher = factors(Problem(5, 200, 6, 10), dtype)
    return x._replace(teacher=restore(teacher)), x._replace(teacher=teacher)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("width", [0, 10])
def test_lift_head(width, backend):
    whole, thin = lift_inputs(width, torch.float64)
    with featkd.use_backend(backend):
        got = lift_head_cases.run(thin, width)
    assert featkd.last_backend("lift_head") == backend
    want = lift_head_cases.evaluate(whole, width)
    assert set(got) == set(want)
    for name, value in want.items():
        assert relative(got[name], value) < 1e-12, name


@pytest.mark.parametrize("output", [0, 1])
def test_either_output_of_lift_head_alone(output):
    whole, thin = lift_inputs(0, torch.float64)
    leaves = [p.requires_grad_() for p in thin[:4]]
    upstream = thin.direction if output == 0 else None
    got, want = (
        torch.autograd.grad(lift_head(*leaves, x.teacher)[output], leaves, upstream)
        for x in (thin, whole)
    )
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_lift_head(dtype):
    _, x = lift_inputs(0, dtype)
    left, right = x.teacher
    given = (x.features, x.weight, x.norm_weight, x.norm_bias, left)
    rest = (1e-5, 0, dtype, True, True, "cpu", right)
    torch.library.opcheck(lift_head_op._forward, (*given, *rest))
    _, _, *kept = lift_head_op._forward(*given, *rest)
    for pair in ((x.direction, torch.tensor(2.0)), (x.direction, None)):
        torch.library.opcheck(lift_head_op._backward, (*pair, *kept, *given, *rest))
