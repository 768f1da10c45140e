"""Cases: every op in every direction and variant, and the agreement of the variants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from featkd import functional
from featkd.benchmarks import roofline, variants
from featkd.benchmarks.cases import OPS, select
from featkd.benchmarks.problem import AUTOCAST, DIRECTIONS, DTYPES, Case
from tests.benchmarks.conftest import CPU


def test_every_public_op_has_cases():
    assert set(OPS) == set(functional.__all__)
    cases = select(shapes="all", dtypes=tuple(DTYPES), directions=DIRECTIONS)
    assert len({case.name for case in cases}) == len(cases)
    for op in OPS:
        mine = [c for c in cases if c.problem.op == op]
        directions = DIRECTIONS if mine[0].problem.differentiable else ("forward",)
        assert {(c.dtype, c.direction) for c in mine} == {
            (t, d) for t in DTYPES for d in directions
        }
    forms = {c.problem.form for c in cases if c.problem.op == "projected_feature_kd"}
    projected = {f"{m}-{use}" for m in ("mse", "spectral") for use in ("lift", "widelast")}
    assert forms == projected | {"spectral-8pairs"}


def test_published_and_large_sizes():
    shapes = {c.problem.shape for c in select(shapes="published")}
    assert {f"{b}x196x192to384" for b in (32, 64, 128, 256)} <= shapes
    assert {f"{b}x1000" for b in (32, 64, 128, 256)} <= shapes
    large = {c.problem.shape for c in select(ops=["lift_head"], shapes="large")}
    assert large == {"32x196x384to1024", "32x196x768to1024", "32x256x1024to1280"}
    only = select(shapes="published", batches=[64])
    assert {c.problem.batch for c in only} == {64}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
def test_featkd_agrees_with_eager_in_every_case(op, direction, dtype):
    for case in select([op], "small", [dtype], [direction]):
        prepared = variants.prepare(case, ["eager", "featkd"], CPU)
        assert list(prepared.steps) == ["eager", "featkd"]
        own = op == "talking_heads_attention"  # csrc has a CPU kernel
        assert prepared.backend == ("cpu" if own else "reference")
        assert prepared.errors["featkd"] <= 2 * prepared.errors["eager"] + 1e-6
        inputs = prepared.inputs
        taught = {inputs[k].dtype for k in inputs if k.startswith("teacher")}
        learnt = {inputs[k].dtype for k in case.problem.differentiable}
        assert learnt <= {DTYPES[dtype]}
        assert taught <= {AUTOCAST.get(dtype, DTYPES[dtype])}
        for step in prepared.steps.values():
            results = step()
            expected = len(case.problem.differentiable)
            assert len(results) == (len(prepared.outputs) if direction == "forward" else expected)
            assert not any(x.requires_grad for x in results)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_variant_that_computes_something_else_is_not_timed(direction):
    (case, *_) = select(["lift_head"], "small", ["fp32"], [direction])
    honest = case.problem.featkd

    def wrong(x):
        pooled, loss = honest(x)
        return pooled, 1.01 * loss

    bad = Case(replace(case.problem, featkd=wrong), "fp32", direction)
    with pytest.raises(variants.Disagreement, match=r"featkd differs from eager in .* by "):
        variants.prepare(bad, ["eager", "featkd"], CPU)
    nothing = Case(replace(case.problem, featkd=lambda x: honest(x)[:1]), "fp32", direction)
    with pytest.raises(ValueError, match="zip"):
        variants.prepare(nothing, ["featkd"], CPU)


@pytest.mark.usefixtures("tiny")
def test_nan_is_a_disagreement():
    (case, *_) = select(["soft_kd"], "small", ["fp32"], ["forward"])
    lost = replace(case.problem, featkd=lambda x: (torch.tensor(float("nan")),))
    with pytest.raises(variants.Disagreement):
        variants.prepare(Case(lost, "fp32", "forward"), ["featkd"], CPU)


def test_floor_is_that_of_the_design():
    """S and T read and dS written are 2 (2 Cs + Ct) = 1,536 bytes per row of bf16, 192 to 384."""
    (case,) = (
        c
        for c in select(["projected_feature_kd"], "small", ["bf16"], ["both"])
        if c.problem.form == "mse-lift"
    )
    prepared = variants.prepare(case, ["featkd"], CPU)
    parameters = 2 * (384 * 192 + 2 * 384)
    scalars = 2 * 2  # the loss and its upstream gradient
    floor = {d: roofline.floor_bytes(prepared, d) for d in DIRECTIONS}
    assert floor["both"] == 4 * 196 * 1536 + 2 * parameters + scalars
    assert floor["forward"] == 4 * 196 * 1152 + parameters + 2
    assert floor["backward"] == floor["both"] - 2
    flops = {d: roofline.least_flops(case.problem, d) for d in DIRECTIONS}
    assert flops["forward"] == 2 * 4 * 196 * 192 * 384
    assert flops["both"] == 3 * flops["forward"] == flops["forward"] + flops["backward"]


def test_roofline_takes_the_slower_of_moving_and_multiplying():
    rates = roofline.Rates(copy_gb_per_s=10.0, gflop_per_s={"fp32": 50.0, "bf16": 0.6})
    assert rates.least_seconds(10**9, 10**9, "fp32") == pytest.approx(0.1)
    assert rates.least_seconds(10**8, 10**10, "fp32") == pytest.approx(0.2)
    assert rates.least_seconds(0, 10**10, "bf16") == pytest.approx(0.2)  # in fp32, which is faster
