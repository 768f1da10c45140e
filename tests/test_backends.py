"""Which backend is chosen: by thread, in compiled code, in autograd's threads."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import featkd
from featkd import backends
from featkd.functional import projected_feature_kd, widelast_projection


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No default asked for yet, no warning given, nothing compiled."""
    monkeypatch.delenv("FEATKD_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_default", None)
    monkeypatch.setattr(backends, "_warned", set())
    reset: Any = torch.compiler.reset  # untyped in torch
    reset()


def maps() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 9, 6, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def ran(call: Callable[[], object]) -> str | None:
    """The backend that a call of projected_feature_kd ran on."""
    call()
    return featkd.last_backend("projected_feature_kd")


def test_overlapping_blocks_of_two_threads_do_not_meet():
    """One's block ends inside of the other's; afterwards either's choice is gone."""
    entered, left = threading.Event(), threading.Event()
    seen: dict[str, str] = {}

    def first() -> None:
        with featkd.use_backend("reference"):
            entered.set()
            assert left.wait(10)
            seen["first"] = backends.wanted_backend()
        seen["first, after"] = backends.wanted_backend()

    def second() -> None:
        assert entered.wait(10)
        with featkd.use_backend("cpu"):
            left.set()
            threads[0].join()
            seen["second"] = backends.wanted_backend()
        seen["second, after"] = backends.wanted_backend()

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {
        "first": "reference",
        "first, after": "auto",
        "second": "cpu",
        "second, after": "auto",
    }
    assert backends.wanted_backend() == "auto"


def test_blocks_nest_and_end_with_an_error(monkeypatch):
    monkeypatch.setenv("FEATKD_BACKEND", "cpu")
    with featkd.use_backend("reference"):
        with pytest.raises(KeyError), featkd.use_backend("triton"):
            raise KeyError(backends.wanted_backend())
        assert backends.wanted_backend() == "reference"
    assert backends.wanted_backend() == "cpu"


def test_a_backward_pass_in_another_thread_keeps_the_backend():
    """As autograd's threads for GPUs do: they have no choice of their own."""
    student, teacher = maps()
    for inside, outside in (("cpu", "reference"), ("reference", "cpu")):
        with featkd.use_backend(inside):
            loss = projected_feature_kd(student, teacher)
        (want,) = torch.autograd.grad(loss, student, retain_graph=True)
        got: list[Tensor] = []

        def differentiate(outside=outside, loss=loss, got=got) -> None:
            with featkd.use_backend(outside):
                got.extend(torch.autograd.grad(loss, student))

        thread = threading.Thread(target=differentiate)
        thread.start()
        thread.join()
        assert torch.equal(got[0], want)
        assert featkd.last_backend("projected_feature_kd") == inside


def test_compiled_code_follows_the_block_around_a_call():
    student, teacher = maps()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def loss(student: Tensor) -> Tensor:
        return 2 * projected_feature_kd(student, teacher)

    for _ in range(3):
        assert ran(lambda: loss(student)) == "cpu"
        with featkd.use_backend("reference"):
            assert ran(lambda: loss(student)) == "reference"
            thread = threading.Thread(target=loss, args=(student,))
            thread.start()
            thread.join()
            assert featkd.last_backend("projected_feature_kd") == "cpu"
    assert counter.frame_count <= 3, "compiled again for a choice that it had been compiled for"


def test_compiled_code_may_hold_the_block():
    student, teacher = maps()

    @torch.compile(backend="eager", fullgraph=True)
    def losses(student: Tensor) -> tuple[Tensor, Tensor]:
        with featkd.use_backend("reference"):
            plain = projected_feature_kd(student, teacher)
        return plain, projected_feature_kd(student, teacher)

    for _ in range(2):
        plain, fused = losses(student)
        assert "featkd" not in type(plain.grad_fn).__name__.lower()
        assert "featkd" in type(fused.grad_fn).__name__.lower()
        torch.testing.assert_close(plain, fused)
        assert backends.wanted_backend() == "auto"
    assert not counters["graph_break"]


def test_compiled_code_warns_once_as_it_is_traced():
    """Whether compiled or not, and not once more for another graph or a run of it."""
    student, teacher = maps()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def loss(student: Tensor, factor: float) -> Tensor:
        return factor * projected_feature_kd(student, teacher)

    with featkd.use_backend("triton"):
        message = "featkd.projected_feature_kd runs on the reference backend: Triton kernels cannot"
        with pytest.warns(UserWarning, match=message) as caught:
            got = loss(student, 2.0)
        assert ["featkd" in str(warning.message) for warning in caught].count(True) == 1
        compiled = counter.frame_count
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="featkd")
            assert torch.equal(loss(student, 2.0), got)
            assert counter.frame_count == compiled, "what was warned of is guarded on"
            loss(student.detach().double(), 2.0)
            assert counter.frame_count > compiled
            projected_feature_kd(student, teacher)
    assert featkd.last_backend("projected_feature_kd") == "reference"


def test_compiled_code_warns_of_a_size_that_varies(monkeypatch):
    monkeypatch.setattr("featkd.kernels.launch._redirected", lambda *_: pytest.fail("launched"))

    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def outputs(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return widelast_projection(*inputs)

    for channels in (1025, 1030):
        inputs = torch.ones(1, 2, channels), torch.ones(3, channels), *torch.ones(4, 3)
        with (
            featkd.use_backend("triton"),
            pytest.warns(UserWarning, match=f"{channels} student channels, more than 1024"),
        ):
            outputs(*inputs)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "projected_feature_kd": lambda x: projected_feature_kd(x, torch.ones(3, 9, 6)),
    "widelast_projection": lambda x: widelast_projection(
        x, torch.ones(4, 6).triu(), *(torch.arange(4.0) for _ in range(4))
    )[1],
    "lift_head": lambda x: featkd.functional.lift_head(
        x, torch.ones(4, 6).triu(), torch.arange(4.0), torch.ones(4)
    )[0],
    "soft_kd": lambda x: featkd.functional.soft_kd(x[0], torch.eye(9, 6), x[2], alpha=0.5),
    "talking_heads_attention": lambda x: featkd.functional.talking_heads_attention(
        *(x.unsqueeze(1) for _ in range(3)), *(torch.ones(1, 1), torch.ones(1)) * 2, scale=1.0
    ),
    "spectrum": featkd.linalg.svdvals,
}


@pytest.mark.parametrize("op", CALLS)
def test_forward_mode_derivatives_are_the_references(op: str) -> None:
    """An op would drop the tangent without a word where nothing requires grad."""
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 3, 9, 6, dtype=torch.float64, generator=generator)
    call = CALLS[op]
    with pytest.warns(UserWarning, match=f"{op} runs on the reference.*forward-mode"):
        out, tangent = torch.func.jvp(call, (x,), (direction,))
    assert featkd.last_backend(op) == "reference"
    after, before = (call(x + step * direction) for step in (1e-5, -1e-5))
    torch.testing.assert_close(tangent, (after - before) / 2e-5, rtol=1e-6, atol=1e-6)
    assert featkd.last_backend(op) == "cpu"
    torch.testing.assert_close(call(x), out)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        again = torch.autograd.forward_ad.unpack_dual(call(dual)).tangent
    torch.testing.assert_close(again, tangent)
