"""The Triton kernels: their sm_80 PTX executed on odd shapes in every dtype, with all checks on."""

from __future__ import annotations

import pytest
import torch

import featkd
from featkd.kernels import widelast_projection as kernels
from featkd.kernels.configs import Config, split_count
from featkd.kernels.widelast_launch import (
    forward_config,
    input_config,
    parameter_config,
)
from tests.kernels.conftest import executing, tokens_far_apart
from tests.kernels.feature_kd_cases import relative
from tests.kernels.widelast_cases import Problem, assert_as_exact_as_eager
from tests.ops.test_projected_feature_kd import views
from tests.ops.test_widelast_projection import op, run

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HELD, SWEPT = (Config(16, 16, 32, 16, hold, num_warps=1) for hold in (True, False))
# between them: h held and swept; several tiles, channel blocks and groups, and one; rows and
# channels that do not fill their tiles; both outputs used, and either
CASES = [
    (Problem(2, 10, 24, 40), HELD, torch.bfloat16),
    (Problem(3, 9, 20, 33), SWEPT, torch.float32),
    (Problem(1, 1, 5, 7, "residual"), SWEPT, torch.float16),
]
FORWARD = "project_and_normalise"
BACKWARD = ["input_gradient", "parameter_gradients", *["sum_and_scale"] * 5]


@pytest.fixture
def tiles(monkeypatch):
    """Every launch by the given configuration, so that small problems have several tiles."""

    def use(config: Config) -> None:
        for name in ("forward_config", "input_config", "parameter_config"):
            monkeypatch.setattr(kernels, name, lambda *_: config)
        monkeypatch.setattr(kernels, "split_count", lambda rows: 2)

    return use


@pytest.mark.parametrize(
    ("problem", "config", "dtype"),
    CASES,
    ids=lambda x: str(x) if not isinstance(x, Config) else "held" if x.hold else "swept",
)
def test_exact_as_eager(executed, tiles, problem, config, dtype):
    tiles(config)
    tensors = problem.tensors(dtype)
    with featkd.use_backend("triton"):
        got = run(tensors, problem.used)
    assert featkd.last_backend("widelast_projection") == "triton"
    assert executed == [FORWARD, *BACKWARD]
    assert {x.dtype for x in got.values()} == {dtype}
    assert_as_exact_as_eager(got, tensors, problem.used)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "arch"), [*((dtype, 80) for dtype in DTYPES), (torch.bfloat16, 90)], ids=str
)
def test_exact_as_eager_at_the_published_widths(dtype, arch):
    rows = 140 if arch == 90 else 76  # more than a tile there, and the last is not full
    tensors = Problem(1, rows, 192, 384).tensors(dtype)
    with executing(arch) as executed, featkd.use_backend("triton"):
        got = run(tensors)
    assert executed == [FORWARD, *BACKWARD]
    assert_as_exact_as_eager(got, tensors, "both")


def test_views_and_expanded_gradients_give_the_same_bits(executed, tiles):
    tiles(HELD)
    tensors = Problem(2, 10, 24, 40).tensors(torch.bfloat16)
    tensors[7] = tensors[7][:1, :, :1].expand(2, 10, 40).contiguous()
    with featkd.use_backend("triton"):
        plain = run(tensors)
        for name in ("sliced", "transposed"):
            viewed = [views(x)[name] if x.dim() == 3 else x for x in tensors]
            viewed[7] = tensors[7][:1, :, :1].expand(2, 10, 40)
            for key, value in run(viewed).items():
                assert torch.equal(value, plain[key]), (name, key)


@pytest.mark.usefixtures("executed_unchecked")
def test_tokens_more_than_two_to_the_31_elements_apart(tiles):
    tiles(HELD)
    tensors = Problem(1, 3, 24, 40).tensors(torch.bfloat16)
    far = [tokens_far_apart(x) if x.dim() == 3 else x for x in tensors]
    with featkd.use_backend("triton"):
        plain = run(tensors)
        for key, value in run(far).items():
            assert torch.equal(value, plain[key]), key


def test_without_gradients_one_kernel_runs_and_keeps_nothing(executed, tiles):
    """What runs for some gradients alone: see `float64_widelast_projection.gradcheck`."""
    tiles(HELD)
    tensors = Problem(2, 10, 24, 40).tensors(torch.bfloat16)
    before = [t.clone() for t in tensors]
    with featkd.use_backend("triton"):
        want = run(tensors)
        executed.clear()
        outputs = op(*tensors[:6])
    assert executed == [FORWARD]
    assert all(torch.equal(y, want[name]) for y, name in zip(outputs, want, strict=False))
    assert all(torch.equal(t, y) for t, y in zip(tensors, before, strict=True))


def test_nan_stays_in_its_row(executed, tiles):
    tiles(HELD)
    tensors = Problem(2, 10, 24, 40).tensors(torch.bfloat16)
    tensors[0][1, 3, 2] = float("nan")
    tensors[7][0, 1, 5] = float("inf")
    with featkd.use_backend("triton"):
        got = run(tensors)
    for name, bad in (("residual", [(1, 3)]), ("normed", [(1, 3)]), ("x", [(0, 1), (1, 3)])):
        rows = (~got[name].isfinite().all(2)).nonzero().tolist()
        assert rows == [list(place) for place in bad]
    assert not got["weight"].isfinite().all()


def test_no_rows_launch_nothing(executed):
    tensors = Problem(0, 5, 6, 10).tensors(torch.bfloat16)
    with featkd.use_backend("triton"):
        got = run(tensors)
    assert executed == []
    assert got["residual"].shape == (0, 5, 10)
    assert not got["weight"].any()


def test_autocast_rounds_the_product_and_the_normed_map(executed, tiles):
    tiles(HELD)
    x, *parameters, d_residual, d_normed = Problem(1, 17, 16, 32).tensors(torch.float32)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with featkd.use_backend("triton"):
            r, u = op(x, *parameters)
        assert featkd.last_backend("widelast_projection") == "triton"
        with featkd.use_backend("reference"):
            assert op(x, *parameters)[1].dtype == torch.float32
    assert (r.dtype, u.dtype) == (torch.float32, torch.bfloat16)
    (d_x,) = torch.autograd.grad((r, u), x, (d_residual, d_normed.bfloat16()))
    assert d_x.dtype == torch.float32
    rounded = x.detach().bfloat16().float().requires_grad_()
    want = op(rounded, parameters[0].bfloat16().float(), *parameters[1:])
    torch.testing.assert_close(r, want[0], rtol=1e-5, atol=1e-5)
    assert relative(u.detach(), want[1].detach()) < 2e-3
    upstream = d_residual, d_normed.bfloat16().float()
    assert relative(d_x, torch.autograd.grad(want, rounded, upstream)[0]) < 3e-3


def test_too_many_student_channels_go_to_the_reference(executed):
    x, *parameters, _, _ = Problem(1, 2, 1025, 8).tensors(torch.float32)
    with (
        featkd.use_backend("triton"),
        pytest.warns(UserWarning, match="1025 student channels, more than 1024"),
    ):
        op(x, *parameters)
    assert executed == []
    assert featkd.last_backend("widelast_projection") == "reference"


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_configurations_fit_every_width(arch, dtype):
    for student in (5, 32, 100, 192, 384, 700, 768, 1024):
        for teacher in (7, 64, 384, 1000, 1280, 2048):
            choices = (forward_config, input_config, parameter_config)
            configs = [choose(student, teacher, dtype, arch) for choose in choices]
            for config in configs:
                assert min(config.rows, config.student_block, config.teacher_block) >= 16
            last = configs[2]
            blocks = -(-student // last.student_block) / last.groups(student)
            assert blocks.is_integer()
            assert blocks * last.student_block <= last.group


@pytest.mark.parametrize("rows", [1, 2047, 50176, 10**9])
def test_splits_are_bounded(rows):
    assert 1 <= split_count(rows) <= 44
