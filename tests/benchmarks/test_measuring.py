"""The clock's order, the quantiles, and the peak of memory."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from featkd.benchmarks.memory import extra_peak
from featkd.benchmarks.timing import clock_for, quantiles, speedup, take_turns
from featkd.benchmarks.variants import Step
from tests.benchmarks.conftest import CPU


def nothing():
    return ()


def test_steps_take_turns_and_none_is_always_first():
    order: list[str] = []
    steps = {name: Step(nothing, lambda _: ()) for name in "abc"}

    def clock(step):
        assert not gc.isenabled()
        order.append(next(name for name, known in steps.items() if known is step))
        return 1.0

    times = take_turns(steps, clock, min_seconds=0, min_rounds=3)
    assert "".join(order) == "abcbcacab"
    assert times == {name: [1.0] * 3 for name in "abc"}
    assert gc.isenabled()


def test_turns_go_on_until_the_time_is_spent():
    steps = {"a": Step(nothing, lambda _: ())}
    assert len(take_turns(steps, clock_for(CPU), min_seconds=0.01)["a"]) > 100


def test_only_the_run_is_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds
        return ()

    assert clock_for(CPU)(Step(lambda: wait(5), lambda _: wait(2))) == 2


def test_quantiles_and_speedup():
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    # a machine that slows down halfway: the medians' ratio would be 4 / 4
    assert speedup([2.0, 2.0, 4.0, 4.0, 4.0], [1.0, 1.0, 4.0, 2.0, 4.0]) == 2.0


def test_peak_of_a_function_whose_peak_is_known():
    """8,000 bytes are held, then 4,000 of them and 24,000 more: 28,000."""

    def run(_):
        a = torch.empty(1000)
        b = a + 1
        del a
        c = torch.empty(3000, dtype=torch.float64)
        del b
        return (c,)

    assert [extra_peak(Step(nothing, run), CPU) for _ in range(3)] == [28_000] * 3


def test_peak_counts_memory_inside_of_operators_and_releases():
    x, weight = torch.randn(64, 8), torch.randn(16, 8)

    def run(_):
        y = F.linear(x, weight)  # 4,096
        y = F.gelu(y)  # and 4,096
        return (y.t().contiguous().softmax(1),)  # gelu's, its transpose's and softmax's

    assert extra_peak(Step(nothing, run), CPU) == 3 * 4096


def test_peak_starts_at_what_was_held_before():
    """What was prepared doesn't count, and releasing it makes room."""

    def prepare():
        return (torch.empty(1000), torch.empty(5000))

    assert extra_peak(Step(prepare, lambda _: (torch.empty(2000),)), CPU) == 8_000
    held: list[torch.Tensor] = []

    def hold():
        held.append(torch.empty(5000))
        return ()

    def release(_):
        held.clear()
        return (torch.empty(6000),)

    assert extra_peak(Step(hold, release), CPU) == 4_000


def test_a_profiler_without_memory_events_is_no_peak_of_zero(monkeypatch):
    monkeypatch.setattr(
        "featkd.benchmarks.memory.profile",
        lambda **options: torch.profiler.profile(activities=options["activities"]),
    )
    with pytest.raises(RuntimeError, match="its profiler recorded no allocation"):
        extra_peak(Step(nothing, lambda _: (torch.empty(10),)), CPU)
