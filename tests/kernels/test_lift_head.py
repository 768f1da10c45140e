"""The Triton kernels: their sm_80 PTX executed on odd shapes in every dtype, with all checks on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import featkd
from featkd.kernels import lift_head as kernels
from featkd.kernels.configs import Config
from tests.kernels.feature_kd_cases import relative
from tests.kernels.lift_head_cases import (
    UPSTREAM,
    Problem,
    assert_as_exact_as_eager,
    evaluate,
    run,
)

ALL = ["pool_and_distance", "features_gradient", "head_gradients", *["sum_and_scale"] * 3]
# tiles of 16 places and blocks of few channels, so that small problems have several
SMALL = Config(16, 16, 32, 16, num_warps=1, num_stages=1)
# several images whose tokens do not fill their tiles, channels that do not fill their blocks and
# make one group and several; mse, spectral with an odd and an even grid
MSE = Problem(2, 19, 24, 40)
CASES = [
    (MSE, torch.bfloat16, SMALL),
    (Problem(3, 15, 40, 24, 5), torch.float16, replace(SMALL, num_stages=2)),
    (Problem(2, 20, 24, 33, 4), torch.float32, replace(SMALL, group=32)),
]


def choose(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    """Let every launch take this configuration, and two programs share dW's rows."""
    for name in ("distance_config", "features_config", "head_config"):
        monkeypatch.setattr(kernels, name, lambda *_: config)
    monkeypatch.setattr(kernels, "split_count", lambda rows: 2)


@pytest.fixture
def small(monkeypatch):
    choose(monkeypatch, SMALL)


@pytest.mark.parametrize(
    ("problem", "dtype", "config"), CASES, ids=[f"{p}-{dtype}" for p, dtype, _ in CASES]
)
def test_exact_as_eager(executed, monkeypatch, problem, dtype, config):
    choose(monkeypatch, config)
    x = problem.inputs(dtype)
    with featkd.use_backend("triton"):
        got = run(x, problem.width)
    assert featkd.last_backend("lift_head") == "triton"
    assert executed == ALL
    assert_as_exact_as_eager(got, x, problem.width)


@pytest.mark.slow
def test_exact_as_eager_at_the_published_widths(executed):
    problem = Problem(2, 49, 192, 384, 7)
    x = problem.inputs(torch.bfloat16)
    with featkd.use_backend("triton"):
        got = run(x, problem.width)
    assert executed == ALL
    assert_as_exact_as_eager(got, x, problem.width)


@pytest.mark.usefixtures("small")
def test_without_a_teacher_under_autocast(executed):
    x = replace(MSE, compare=False).inputs(torch.float32)
    rounded = x._replace(features=x.features.bfloat16(), weight=x.weight.bfloat16())
    want = evaluate(rounded.to(torch.float64), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16), featkd.use_backend("triton"):
        got, eager = run(x, 0), evaluate(x, 0)
    assert executed == ALL
    assert all(y.dtype == torch.float32 for y in got.values())
    assert relative(got["pooled"], want["pooled"]) < 1e-6
    for name, value in want.items():
        assert relative(got[name], value) <= 2 * relative(eager[name], value), name


@pytest.mark.usefixtures("executed", "small")
def test_views_give_the_same_bits_and_so_does_a_second_run():
    x = MSE.inputs(torch.bfloat16)
    wider = x.features.new_zeros(2, 20, 32)
    wider[:, 1:, 8:] = x.features
    teacher = x.teacher.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    viewed = x._replace(
        features=wider[:, 1:, 8:], teacher=teacher, weight=x.weight.t().contiguous().t()
    )
    one = x._replace(features=x.features[:1], direction=x.direction[:1].expand(2, -1))
    expanded = one._replace(features=one.features.expand(2, -1, -1))
    whole = one._replace(features=one.features.repeat(2, 1, 1))
    with featkd.use_backend("triton"):
        for a, b in ((x, viewed), (x, x), (whole, expanded)):
            want, got = run(a, 0), run(b, 0)
            assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.usefixtures("executed", "small")
def test_an_upstream_gradient_of_any_strides():
    x = replace(MSE, compare=False).inputs(torch.bfloat16)
    with featkd.use_backend("triton"):
        for name, laid_out in UPSTREAM.items():
            viewed = x._replace(direction=laid_out(x.direction))
            got = run(viewed, 0)
            whole = viewed._replace(direction=viewed.direction.contiguous())
            for key, value in run(whole, 0).items():
                assert torch.equal(got[key], value), (name, key)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.usefixtures("executed", "small")
def test_nan_and_inf_reach_their_image_and_no_other(bad):
    x = MSE.inputs(torch.bfloat16)
    x.features[1, 3, 2] = bad
    with featkd.use_backend("triton"):
        got = run(x, 0)
    assert not got["loss"].isfinite()
    assert not got["weight"].isfinite().all()
    for name in ("pooled", "features"):
        assert not got[name][1].isfinite().all()
        assert got[name][0].isfinite().all()


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("student", [32, 192, 320, 448, 768])
def test_groups_share_the_blocks_evenly(student, dtype, arch):
    for choose_config in (kernels.features_config, kernels.head_config):
        for width in (0, 14, 37):
            config = choose_config(student, 384, width, dtype, arch)
            blocks = -(-student // config.student_block)
            assert blocks % config.groups(student) == 0
            assert blocks // config.groups(student) * config.student_block <= config.group


@pytest.mark.parametrize("rows", [1, 2047, 50176, 10**9])
def test_splits_are_bounded(rows):
    assert 1 <= kernels.split_count(rows) <= 44
