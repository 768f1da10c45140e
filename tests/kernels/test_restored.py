"""The kernels chunk by chunk, of a teacher's map in its factors: sm_80's PTX, executed."""

from __future__ import annotations

import pytest
import torch

import featkd
from featkd.factors import LowRank, restore
from featkd.kernels import lift_head, projected_feature_kd, restored
from featkd.kernels.configs import Config
from tests.kernels import lift_head_cases
from tests.kernels.feature_kd_cases import Problem, assert_as_exact_as_eager
from tests.ops.test_teacher_in_factors import run

SMALL = Config(16, 16, 16, 16, num_warps=1, num_stages=1)


@pytest.fixture
def teacher(monkeypatch) -> LowRank:
    """Of three images, cut into two chunks; and small tiles."""
    monkeypatch.setattr(restored, "_ROWS", 16)
    for module in (projected_feature_kd, lift_head):
        for name in (key for key in vars(module) if key.endswith("_config")):
            monkeypatch.setattr(module, name, lambda *_: SMALL)
    generator = torch.Generator().manual_seed(2)
    factors = (torch.randn(3, size, 4, generator=generator) for size in (8, 16))
    return LowRank(*(x.to(torch.float16) for x in factors))


@pytest.mark.parametrize("norm", ["both", "none"])
def test_projected_feature_kd(executed, teacher, norm):
    tensors = Problem(3, 8, 16, 16, 4, norm=norm).tensors(torch.bfloat16)
    tensors[1] = restore(teacher, torch.float64)
    with featkd.use_backend("triton"):
        got = run(tensors, teacher, 4)
    assert featkd.last_backend("projected_feature_kd") == "triton"
    assert executed.count("loss_and_student_gradient") == 2
    assert executed.count("parameter_gradients") == 2
    assert_as_exact_as_eager(got, tensors, 4)


def test_lift_head(executed, teacher):
    x = lift_head_cases.Problem(3, 8, 16, 16, 4).inputs(torch.bfloat16)
    with featkd.use_backend("triton"):
        got = lift_head_cases.run(x._replace(teacher=teacher), 4)
    assert featkd.last_backend("lift_head") == "triton"
    assert executed.count("pool_and_distance") == executed.count("head_gradients") == 2
    whole = x._replace(teacher=restore(teacher, torch.float64))
    lift_head_cases.assert_as_exact_as_eager(got, whole, 4)
