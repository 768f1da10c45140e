"""Backend selection across threads, in compiled code and in autograd's threads."""

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
from featkd.functional import projected_feature_kd
from featkd.ops import backends


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resets the default backend, the warnings and the compiler."""
    monkeypatch.setattr(backends, "_default", "auto")
    monkeypatch.setattr(backends, "_last", backends._Last())
    monkeypatch.setattr(backends, "_warned", set())
    reset: Any = torch.compiler.reset  # untyped in torch
    reset()


def maps() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 9, 6, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def ran(call: Callable[[], object]) -> str | None:
    """Backend of projected_feature_kd in a call."""
    call()
    return featkd.last_backend("projected_feature_kd")


def test_use_backend_is_local_to_thread():
    """The first thread leaves its context while the second is inside its own."""
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
        with featkd.use_backend("triton"):
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
        "second": "triton",
        "second, after": "auto",
    }
    assert backends.wanted_backend() == "auto"


def test_use_backend_nests_and_is_restored_after_error(monkeypatch):
    monkeypatch.setattr(backends, "_default", "triton")
    with featkd.use_backend("reference"):
        with pytest.raises(KeyError), featkd.use_backend("auto"):
            raise KeyError(backends.wanted_backend())
        assert backends.wanted_backend() == "reference"
    assert backends.wanted_backend() == "triton"


def test_backward_in_another_thread_uses_backend_of_forward(recorded):
    """Autograd runs backward passes for GPUs in other threads."""
    student, teacher = maps()
    for inside, outside in (("triton", "reference"), ("reference", "triton")):
        with featkd.use_backend(inside):
            loss = projected_feature_kd(student, teacher)

        def differentiate(outside=outside, loss=loss) -> None:
            with featkd.use_backend(outside):
                torch.autograd.grad(loss, student)

        recorded.clear()
        thread = threading.Thread(target=differentiate)
        thread.start()
        thread.join()
        assert recorded == ["distance_backward"] * (inside == "triton")
        assert featkd.last_backend("projected_feature_kd") == inside


def test_use_backend_around_compiled_function(recorded):
    student, teacher = maps()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def loss(student: Tensor) -> Tensor:
        return 2 * projected_feature_kd(student, teacher)

    for _ in range(3):
        assert ran(lambda: loss(student)) == "reference"
        with featkd.use_backend("triton"):
            assert ran(lambda: loss(student)) == "triton"
            thread = threading.Thread(target=loss, args=(student,))
            thread.start()
            thread.join()
            assert featkd.last_backend("projected_feature_kd") == "reference"
    assert counter.frame_count == 2, "recompiled for a backend that was compiled before"


def test_use_backend_inside_compiled_function(recorded):
    student, teacher = maps()

    @torch.compile(backend="eager", fullgraph=True)
    def losses(student: Tensor) -> tuple[Tensor, Tensor]:
        with featkd.use_backend("triton"):
            fused = projected_feature_kd(student, teacher)
        return projected_feature_kd(student, teacher), fused

    for _ in range(2):
        plain, fused = losses(student)
        assert "featkd" not in type(plain.grad_fn).__name__.lower()
        assert "featkd" in type(fused.grad_fn).__name__.lower()
        assert backends.wanted_backend() == "auto"
    assert not counters["graph_break"]


def test_compiled_function_warns_once():
    """A warning appears once per process, also for other graphs and eager calls."""
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
            assert counter.frame_count == compiled, "recompiled because of the warning"
            loss(student.detach().double(), 2.0)
            assert counter.frame_count > compiled
            projected_feature_kd(student, teacher)
    assert featkd.last_backend("projected_feature_kd") == "reference"


def outputs(x: Tensor) -> Tensor:
    heads = (x.unsqueeze(1) for _ in range(3))
    mix = (torch.ones(1, 1, dtype=x.dtype), torch.ones(1, dtype=x.dtype))
    return featkd.functional.talking_heads_attention(*heads, *mix, *mix, scale=1.0)


@pytest.mark.parametrize(
    ("op", "call"), [("talking_heads_attention", outputs), ("spectrum", featkd.linalg.svdvals)]
)
def test_forward_mode_uses_reference(op: str, call: Callable[[Tensor], Tensor]) -> None:
    """Ops of csrc; tests/ops/test_autograd.py tests the Triton kernels."""
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 3, 9, 6, dtype=torch.float64, generator=generator)
    with pytest.warns(UserWarning, match=f"{op} runs on the reference"):
        out, tangent = torch.func.jvp(call, (x,), (direction,))
    assert featkd.last_backend(op) == "reference"
    after, before = (call(x + step * direction) for step in (1e-5, -1e-5))
    torch.testing.assert_close(tangent, (after - before) / 2e-5, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(call(x), out)
