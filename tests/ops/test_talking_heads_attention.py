"""talking_heads_attention on CPU tensors: accuracy, views, blocks, gradients, compilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import featkd
from featkd.functional import talking_heads_attention
from featkd.ops import extension
from featkd.ops import talking_heads_attention as op
from tests.ops.comparing import relative
from tests.ops.talking_heads_cases import Problem, as_timm, assert_as_exact_as_eager, exact

PROBLEMS = [
    Problem(2, 8, 196, 48),  # CaiT-S24
    Problem(3, 4, 37, 48),
    Problem(1, 16, 9, 5),
    Problem(2, 3, 197, 7),
    Problem(1, 1, 1, 1),
]


def run(tensors: dict[str, Tensor], scale: float) -> Tensor:
    return talking_heads_attention(**tensors, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_error_is_at_most_twice_timms(problem, dtype):
    tensors = problem.tensors(dtype)
    got = run(tensors, problem.scale)
    assert featkd.last_backend(op.NAME) == "cpu"
    assert got.transpose(1, 2).is_contiguous()
    assert_as_exact_as_eager(got, tensors, problem.scale)
    with featkd.use_backend("reference"):
        plain = run(tensors, problem.scale)
    assert featkd.last_backend(op.NAME) == "reference"
    assert plain.stride() == got.stride()
    assert_as_exact_as_eager(plain, tensors, problem.scale)


@pytest.mark.parametrize(
    ("dtype", "backend", "why"),
    [
        (torch.float64, "auto", r"csrc has no kernel for torch\.float64"),
        (torch.float32, "triton", "it has no Triton kernel"),
    ],
)
def test_unsupported_dtype_or_backend_uses_reference(dtype, backend, why, monkeypatch):
    monkeypatch.setattr("featkd.ops.backends._warned", set())
    problem = Problem(2, 3, 7, 4)
    tensors = problem.tensors(dtype)
    with featkd.use_backend(backend), pytest.warns(UserWarning, match=why):
        got = run(tensors, problem.scale)
    assert featkd.last_backend(op.NAME) == "reference"
    assert_as_exact_as_eager(got, tensors, problem.scale)


def test_missing_extension_uses_reference_with_warning(monkeypatch):
    monkeypatch.setitem(extension._known, extension.LIBRARY, "csrc is not built: a test")
    problem = Problem(1, 2, 5, 4)
    tensors = problem.tensors(torch.float32)
    with pytest.warns(UserWarning, match="reference backend: csrc is not built: a test"):
        assert_as_exact_as_eager(run(tensors, problem.scale), tensors, problem.scale)
    assert featkd.last_backend(op.NAME) == "reference"


def test_other_devices_use_reference_without_warning(recwarn):
    problem = Problem(2, 3, 7, 4)
    tensors = {name: x.to("meta") for name, x in problem.tensors(torch.float32).items()}
    assert run(tensors, problem.scale).shape == (2, 3, 7, 4)
    assert featkd.last_backend(op.NAME) == "reference"
    assert not recwarn.list


@pytest.mark.usefixtures("one_thread")
def test_sequence_lengths_around_vector_sizes():
    """Complete and incomplete vectors and tiles, with an odd number of heads."""
    for tokens in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 128, 131):
        problem = Problem(1, 3, tokens, 4)
        tensors = problem.tensors(torch.float32)
        assert relative(run(tensors, problem.scale), exact(tensors, problem.scale)) < 1e-6, tokens


@pytest.mark.parametrize("products", [False, True], ids=["float32_scores", "bf16_scores"])
def test_bf16_with_and_without_bf16_matmul(products, monkeypatch):
    monkeypatch.setattr(op, "has_fast_bf16", lambda device: products)
    for tokens in (1, 3, 8, 15, 16, 17, 37, 64, 67, 131):
        problem = Problem(2, 5, tokens, 8)
        tensors = problem.tensors(torch.bfloat16)
        assert_as_exact_as_eager(run(tensors, problem.scale), tensors, problem.scale)


def test_bf16_scores_round_to_nearest_even_and_keep_nan():
    """Compares the rounding with torch's, with identity mixes."""
    scores = torch.randn(1, 1, 64, 37, generator=torch.Generator().manual_seed(0)).bfloat16()
    scores[0, 0, 5, 7] = torch.nan
    assert extension.missing() == ""
    one, nothing = torch.ones(1, 1), torch.zeros(1)
    want = scores.float().softmax(-1)
    got, plain = scores.clone(), scores.float()
    op.mix_heads(got, one, one, nothing)
    op.mix_heads(plain, one, one, nothing)
    torch.testing.assert_close(plain, want, rtol=1e-6, atol=0, equal_nan=True)
    assert torch.equal(got.nan_to_num(9), plain.bfloat16().nan_to_num(9))
    assert got[0, 0, 5].isnan().all()
    assert not got[0, 0, 6].isnan().any()


def test_block_size_does_not_change_result(monkeypatch):
    problem = Problem(3, 4, 20, 8)
    tensors = problem.tensors(torch.float32)
    want = run(tensors, problem.scale)
    for size in (4 * 20 * 20 * 4, 4 * 20 * 7 * 4, 1):
        monkeypatch.setattr(op, "_BLOCK_BYTES", size)
        torch.testing.assert_close(run(tensors, problem.scale), want, rtol=1e-5, atol=1e-6)


def test_threads_and_layout_do_not_change_result():
    problem = Problem(2, 8, 50, 16)
    tensors = problem.tensors(torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run(tensors, problem.scale)
        torch.set_num_threads(3)
        again = run({name: x.contiguous() for name, x in tensors.items()}, problem.scale)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(again, want, rtol=1e-5, atol=1e-6)
    scores = torch.randn(2, 8, 50, 50)
    mixes = tensors["pre_weight"], tensors["post_weight"], tensors["post_bias"]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(scores.clone())
        op.mix_heads(found[-1], *mixes)
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_large_scores_and_nan():
    problem = Problem(1, 2, 6, 4)
    tensors = problem.tensors(torch.float32)
    tensors["q"] = tensors["q"] * 1e4
    got = run(tensors, problem.scale)
    assert got.isfinite().all()
    assert relative(got, exact(tensors, problem.scale)) < 1e-3
    tensors = problem.tensors(torch.float32)
    tensors["k"] = tensors["k"].clone()
    tensors["k"][0, 1, 3, 0] = torch.nan
    assert run(tensors, problem.scale).isnan().all()  # each head depends on all heads
    want = as_timm(tensors, problem.scale)
    assert want.isnan().all()


def test_inputs_requiring_grad_use_reference():
    problem = Problem(1, 2, 5, 4)
    tensors = problem.tensors(torch.float32)
    tensors["v"] = tensors["v"].clone().requires_grad_()
    with pytest.warns(UserWarning, match="reference backend: an input requires grad"):
        out = run(tensors, problem.scale)
    assert featkd.last_backend(op.NAME) == "reference"
    (gradient,) = torch.autograd.grad(out.sum(), tensors["v"])
    (want,) = torch.autograd.grad(exact(tensors, problem.scale).sum(), tensors["v"])
    torch.testing.assert_close(gradient, want)
    with torch.no_grad():
        run(tensors, problem.scale)
    assert featkd.last_backend(op.NAME) == "cpu"


def test_autocast_does_not_change_result():
    problem = Problem(2, 4, 9, 8)
    tensors = problem.tensors(torch.float32)
    want = run(tensors, problem.scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(tensors, problem.scale), want)


def test_opcheck():
    x = Problem(2, 4, 9, 8).tensors(torch.float32)
    turned = x["pre_weight"].t().contiguous().t()  # equal, and not contiguous
    given = (x["q"], x["k"], x["v"], turned, x["post_weight"], x["post_bias"], 0.3)
    assert set(torch.library.opcheck(op._forward, given).values()) == {"SUCCESS"}
    assert relative(op._forward(*given), exact(x, 0.3)) < 1e-6


def test_mix_heads_rejects_bad_tensors():
    assert extension.missing() == ""
    scores, mix, bias = torch.zeros(1, 2, 3, 3), torch.eye(2), torch.zeros(2)
    for bad in (scores.double(), scores.mT, scores[0]):
        with pytest.raises(RuntimeError, match="scores: expected contiguous float32 or bfloat16"):
            op.mix_heads(bad, mix, mix, bias)
    with pytest.raises(RuntimeError, match="expected 4 contiguous float32 numbers"):
        op.mix_heads(scores, torch.eye(3), mix, bias)


def test_fullgraph_compile():
    problem = Problem(2, 4, 9, 8)
    tensors = problem.tensors(torch.float32)

    def attention(q):
        return 2 * run({**tensors, "q": q.sin()}, problem.scale)

    compiled = torch.compile(attention, fullgraph=True)(tensors["q"])
    torch.testing.assert_close(compiled, attention(tensors["q"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q: expected shape \(B, heads, N, d\), got \(2, 3, 4\)"),
        ({"k": torch.zeros(1, 2, 5, 3)}, r"k: expected shape \(1, 2, 5, 4\), got"),
        ({"v": torch.zeros(1, 2, 5, 4).half()}, r"v: expected q's dtype torch.float32, got"),
        ({"pre_weight": torch.zeros(3, 2)}, r"pre_weight: expected shape \(2, 2\), got \(3, 2\)"),
        ({"post_bias": torch.zeros(3)}, r"post_bias: expected shape \(2\), got \(3,\)"),
        ({"scale": 0.0}, r"scale: expected a finite number > 0, got 0.0"),
        ({"q": torch.zeros(0, 2, 5, 4)}, r"q: has no elements"),
    ],
)
def test_bad_input(change, message):
    problem = Problem(1, 2, 5, 4)
    with pytest.raises(ValueError, match=message):
        talking_heads_attention(
            **{**problem.tensors(torch.float32), "scale": problem.scale, **change}
        )
    with pytest.raises(TypeError, match="q: expected a floating-point tensor"):
        run({**problem.tensors(torch.float32), "q": torch.zeros(1, 2, 5, 4).long()}, 1.0)
