"""Maps in bf16 multiplied in bf16, as on processors that do: no less exact than eager torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from featkd.cpu import chunks
from tests.kernels import feature_kd_cases, lift_head_cases, widelast_cases
from tests.ops import test_lift_head as lift
from tests.ops import test_projected_feature_kd as projected
from tests.ops import test_widelast_projection as widelast

BF16 = torch.bfloat16
LOSS = 2e-4  # of few rows of few channels: their products are rounded, as eager's are

Run = Callable[[], dict[str, Tensor]]


@pytest.fixture
def multiplied(float32_products, monkeypatch) -> Callable[[Run], dict[str, Tensor]]:
    """Runs in float32 products and in bf16's, which give other bits; returns the latter's."""

    def both(run: Run) -> dict[str, Tensor]:
        plain = run()
        monkeypatch.setattr(chunks, "multiplies_bf16", lambda device: True)
        got = run()
        assert any(not torch.equal(got[name], plain[name]) for name in got)
        return got

    return both


@pytest.mark.parametrize(
    "problem",
    [
        feature_kd_cases.Problem(9, 196, 24, 40, 14, bias=True),  # two chunks
        feature_kd_cases.Problem(3, 10, 8, 20, bias=True, norm="weight"),
        feature_kd_cases.Problem(2, 30, 12, 6, norm="none"),
    ],
    ids=str,
)
def test_projected_feature_kd(problem, multiplied):
    tensors = problem.tensors(BF16)
    got = multiplied(lambda: projected.run(tensors, problem.width))
    feature_kd_cases.assert_as_exact_as_eager(got, tensors, problem.width, half_loss=LOSS)


@pytest.mark.parametrize(
    "problem",
    [
        lift_head_cases.Problem(17, 196, 24, 40, 14),  # two chunks
        lift_head_cases.Problem(3, 10, 8, 20),
        lift_head_cases.Problem(17, 196, 24, 40, compare=False),
    ],
    ids=str,
)
def test_lift_head(problem, multiplied):
    x = problem.inputs(BF16)
    got = multiplied(lambda: lift_head_cases.run(x, problem.width))
    lift_head_cases.assert_as_exact_as_eager(got, x, problem.width, half_loss=LOSS)


@pytest.mark.parametrize("used", ["both", "normed"])
def test_widelast_projection(used, multiplied):
    problem = widelast_cases.Problem(9, 196, 24, 40, used)
    tensors = problem.tensors(BF16)
    got = multiplied(lambda: widelast.run(tensors, problem.used))
    widelast_cases.assert_as_exact_as_eager(got, tensors, problem.used)


def test_what_is_kept_is_as_the_fakes_say(monkeypatch):
    """opcheck, of ops that keep a product in bf16."""
    monkeypatch.setattr(chunks, "multiplies_bf16", lambda device: True)
    x, *parameters, _, _ = widelast_cases.Problem(2, 12, 6, 10).tensors(BF16)
    arguments = (x.requires_grad_(), *parameters, 1e-5, BF16, BF16, True, "cpu")
    assert widelast._forward(*arguments)[3].dtype == BF16
    torch.library.opcheck(widelast._forward, arguments)
    leaves = lift_head_cases.Problem(2, 12, 6, 10, 4).inputs(BF16)
    leaves.features.requires_grad_()
    arguments = (*leaves[:5], 1e-5, 4, BF16, True, True, "cpu")
    assert lift._forward(*arguments)[-1].dtype == BF16
    torch.library.opcheck(lift._forward, arguments)
