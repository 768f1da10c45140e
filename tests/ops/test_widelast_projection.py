"""The op on CPU tensors: exactness, autograd's uses of it, views, compilation, memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import featkd
from featkd.cpu import widelast_projection as cpu
from featkd.functional import widelast_projection
from featkd.ops.widelast_projection import _forward
from tests.kernels.feature_kd_cases import relative
from tests.kernels.widelast_cases import (
    EPS,
    NAMES,
    PARAMETERS,
    Problem,
    assert_as_exact_as_eager,
    evaluate,
)
from tests.ops.test_projected_feature_kd import Largest, views

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PROBLEMS = [
    Problem(2, 196, 24, 40),
    Problem(1, 1, 5, 7),
    Problem(2, 800, 6, 10),  # more tokens than a chunk has rows
    Problem(7, 300, 7, 9, "residual"),  # several chunks of two images, and one of one
    Problem(5, 12, 10, 8, "normed"),
]


def op(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The public function with the cases' epsilon."""
    return widelast_projection(*inputs, eps=EPS)


def run(tensors: Sequence[Tensor], used: str = "both") -> dict[str, Tensor]:
    """Outputs and gradients through the public function, strides of the inputs kept."""
    *inputs, d_residual, d_normed = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    pairs = list(zip(("residual", "normed"), outputs, (d_residual, d_normed), strict=True))
    chosen = [(y, dy) for name, y, dy in pairs if used in ("both", name)]
    torch.autograd.backward([y for y, _ in chosen], [dy for _, dy in chosen])
    named = zip(NAMES, [*(y.detach() for y in outputs), *(x.grad for x in leaves)], strict=True)
    return {k: x for k, x in named if not (used == "residual" and k.startswith("norm1"))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_exact_as_eager(problem, dtype):
    tensors = problem.tensors(dtype)
    got = run(tensors, problem.used)
    assert featkd.last_backend("widelast_projection") == "cpu"
    assert {x.dtype for x in got.values()} == {dtype}
    assert_as_exact_as_eager(got, tensors, problem.used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sliced", "transposed", "images last"])
def test_views_give_the_same_bits(name, dtype):
    tensors = Problem(5, 12, 6, 10).tensors(dtype)
    plain = run(tensors)
    of_maps = [views(x)[name] if x.dim() == 3 else x for x in tensors]
    of_maps[1] = tensors[1].t().contiguous().t()
    for key, value in run(of_maps).items():
        assert torch.equal(value, plain[key]), key


def test_expanded_input_and_upstream_gradients():
    x, *parameters, d_residual, d_normed = Problem(1, 12, 6, 10).tensors(torch.float32)
    once = d_residual[:1, :1], d_normed[:1, :1, :1]  # over tokens, and a scalar's
    expanded = [x.expand(4, -1, -1), *parameters, *(g.expand(4, 12, 10) for g in once)]
    whole = [x.contiguous() for x in expanded]
    for key, value in run(whole).items():
        assert torch.equal(run(expanded)[key], value), key


def test_gradients_of_a_sum():
    """`sum` sends back one number, expanded to the output's shape."""
    *inputs, d_residual, _ = Problem(3, 12, 6, 10).tensors(torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    r, u = op(*leaves)
    got = torch.autograd.grad(3 * r.sum() + u.square().sum(), leaves)
    tensors = [*inputs, torch.full_like(d_residual, 3), 2 * u.detach()]
    want = evaluate(tensors, "both", torch.float64)
    for name, gradient in zip(NAMES[2:], got, strict=True):
        torch.testing.assert_close(gradient, want[name])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_no_rows(shape):
    *inputs, d_residual, d_normed = Problem(*shape, 6, 10).tensors(torch.float32)
    got = run([*inputs, d_residual, d_normed])
    assert got["residual"].shape == got["normed"].shape == (*shape, 10)
    assert got["x"].shape == (*shape, 6)
    for name in PARAMETERS:
        assert not got[name].any()


def test_only_what_is_needed_is_differentiated():
    *inputs, d_residual, d_normed = Problem(3, 12, 6, 10).tensors(torch.float32)
    want = evaluate([*inputs, d_residual, d_normed], "both", torch.float64)
    for i, name in enumerate(NAMES[2:]):
        leaves = list(inputs)
        leaf = leaves[i] = inputs[i].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(op(*leaves), leaf, (d_residual, d_normed))
        assert relative(gradient, want[name]) < 1e-6
    assert not any(y.requires_grad for y in op(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_kept_without_gradients(dtype):
    *inputs, _, _ = Problem(3, 12, 6, 10).tensors(dtype)
    for needed in (True, False):
        _, _, *kept = _forward(*inputs, EPS, dtype, dtype, needed, "cpu")
        numbers = 4 * 36 + (360 if dtype == torch.float32 else 0)
        assert sum(x.numel() for x in kept) == (numbers if needed else 0)
    leaves = [x.requires_grad_() for x in inputs]
    with torch.no_grad():
        assert not any(y.requires_grad for y in op(*leaves))


def test_used_twice_and_retained():
    *inputs, _, _ = Problem(3, 12, 6, 10).tensors(torch.float64)
    x, weight, *norms = inputs
    weight.requires_grad_()
    first, second = op(x, weight, *norms), op(2 * x, weight, *norms)
    total = (first[0] * second[1]).sum() + (first[1] * first[0]).sum()
    (one,) = torch.autograd.grad(total, weight, retain_graph=True)
    (two,) = torch.autograd.grad(total, weight)
    assert torch.equal(one, two)
    with featkd.use_backend("reference"):
        first, second = op(x, weight, *norms), op(2 * x, weight, *norms)
    total = (first[0] * second[1]).sum() + (first[1] * first[0]).sum()
    torch.testing.assert_close(one, torch.autograd.grad(total, weight)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bitwise_and_leaves_its_inputs_alone(dtype):
    tensors = Problem(4, 300, 6, 10).tensors(dtype)
    before = [x.clone() for x in tensors]
    once, again = run(tensors), run(tensors)
    assert all(torch.equal(again[key], value) for key, value in once.items())
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 6, 7])  # x, and the upstream gradients
def test_nan_and_inf_reach_what_depends_on_them(bad, which):
    tensors = Problem(3, 12, 6, 10).tensors(torch.float32)
    tensors[which][1, 3, 2] = bad
    got = run(tensors)
    reached = ["x", "weight", *(["residual", "normed"] if which == 0 else [])]
    for name in reached:
        assert not got[name].isfinite().all()
    for name in {"residual", "normed", "x"}.intersection(reached):
        rows = got[name].isfinite().all(2)
        assert not rows[1, 3]
        assert rows.sum() == 35


def test_several_threads_at_once():
    tensors = [Problem(4, 196, 16, 24).tensors(torch.float32, seed) for seed in range(4)]
    want = [run(x) for x in tensors]
    got: dict[int, dict[str, Tensor]] = {}

    def work(i: int) -> None:
        got[i] = run(tensors[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(want):
        assert all(torch.equal(got[i][key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("needs", "dtype"),
    [
        ((True, True), torch.float32),
        ((True, False), torch.float16),
        ((False, True), torch.bfloat16),
        ((False, False), torch.float32),
    ],
)
def test_opcheck(needs, dtype):
    x, *parameters, _, _ = Problem(2, 12, 6, 10).tensors(dtype)
    x.requires_grad_(needs[0])
    for p in parameters:
        p.requires_grad_(needs[1])
    torch.library.opcheck(_forward, (x, *parameters, EPS, dtype, dtype, any(needs), "cpu"))


def test_fullgraph_compile():
    *inputs, d_residual, d_normed = Problem(2, 12, 6, 10).tensors(torch.float32)
    leaves = [x.requires_grad_() for x in inputs]

    def outputs(x, *parameters):
        r, u = op(x.sin(), *parameters)
        return r.cos(), 2 * u

    plain, compiled = outputs(*leaves), torch.compile(outputs, fullgraph=True)(*leaves)
    upstream = d_residual, d_normed
    pairs = zip(
        (*plain, *torch.autograd.grad(plain, leaves, upstream)),
        (*compiled, *torch.autograd.grad(compiled, leaves, upstream)),
        strict=True,
    )
    for theirs, ours in pairs:
        torch.testing.assert_close(ours, theirs)


def test_autocast_changes_nothing_on_a_cpu():
    tensors = Problem(2, 12, 6, 10).tensors(torch.float32)
    plain = run(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(tensors)
    assert all(torch.equal(cast[key], value) for key, value in plain.items())


def test_weights_in_another_dtype():
    x, *parameters, d_residual, d_normed = Problem(2, 12, 6, 10).tensors(torch.float32)
    half = [p.bfloat16() for p in parameters]
    got = run([x, *half, d_residual, d_normed])
    want = run([x, *(p.float() for p in half), d_residual, d_normed])
    for name in ("residual", "normed", "x"):
        assert torch.equal(got[name], want[name])
    for name in PARAMETERS:
        assert torch.equal(got[name], want[name].bfloat16())


def test_no_gradient_of_all_rows_by_teacher_channels():
    for dtype in (torch.float32, torch.bfloat16):
        x, *parameters, d_residual, d_normed = Problem(32, 196, 8, 64).tensors(dtype)
        bundle = cpu.Parameters(*parameters)
        _, _, *kept = cpu.forward(x, bundle, eps=EPS)
        Largest.elements = 0
        with Largest():
            cpu.backward(
                *(x, bundle, d_residual, d_normed, *kept), need_input=True, need_parameters=True
            )
        assert x.numel() <= Largest.elements <= d_residual.numel() / 4


def test_export_gets_plain_operators():
    class Entry(torch.nn.Module):
        def forward(self, *inputs):
            return op(*inputs)

    *inputs, _, _ = Problem(2, 12, 6, 10).tensors(torch.float32)
    program = torch.export.export(Entry(), tuple(inputs))
    assert not [n for n in program.graph.nodes if "featkd" in str(n.target)]
    for ours, theirs in zip(program.module()(*inputs), op(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_backends_by_name_and_by_size():
    *inputs, _, _ = Problem(2, 9, 4, 6).tensors(torch.float32)
    with featkd.use_backend("reference"):
        op(*inputs)
    assert featkd.last_backend("widelast_projection") == "reference"
    with (
        featkd.use_backend("triton"),
        pytest.warns(UserWarning, match="reference backend: Triton kernels cannot run on tensors"),
    ):
        op(*inputs)
    with pytest.warns(UserWarning, match="widelast_projection runs on the .*: no channels"):
        r, u = op(torch.zeros(2, 3, 4), torch.zeros(0, 4), *[torch.zeros(0)] * 4)
    assert r.shape == u.shape == (2, 3, 0)
