"""talking_heads_attention's Triton kernel: its PTX executed on odd shapes, with all checks on."""

from __future__ import annotations

import pytest
import torch

import featkd
from featkd.functional import talking_heads_attention
from featkd.kernels import talking_heads_attention as kernels
from tests.kernels.conftest import tokens_far_apart
from tests.kernels.feature_kd_cases import relative
from tests.kernels.talking_heads_cases import Problem, assert_as_exact_as_eager, exact

SMALL = kernels.Config(16, 16, 16, group=16, num_warps=2, num_stages=1)
# between them: rows, keys and channels that do not fill their blocks, two groups of channels, one
# query; the true tiles of a CaiT of 192 channels
CASES = [
    (Problem(2, 3, 17, 8), torch.bfloat16, SMALL),
    (Problem(1, 2, 7, 16), torch.float16, SMALL),
    (Problem(1, 3, 19, 6), torch.float32, SMALL),
    (Problem(1, 2, 1, 5), torch.bfloat16, SMALL),
    (Problem(1, 4, 37, 48), torch.bfloat16, None),
]


def run(tensors, problem):
    with featkd.use_backend("triton"):
        got = talking_heads_attention(**tensors, scale=problem.scale)
    assert featkd.last_backend("talking_heads_attention") == "triton"
    return got


@pytest.mark.parametrize(("problem", "dtype", "config"), CASES, ids=str)
def test_exact_as_timm(executed, monkeypatch, problem, dtype, config):
    if config is not None:
        monkeypatch.setattr(kernels, "config", lambda *_: config)
    tensors = problem.tensors(dtype)
    got = run(tensors, problem)
    assert executed == ["attend"]
    assert got.transpose(1, 2).is_contiguous()
    assert_as_exact_as_eager(got, tensors, problem.scale)


def test_views_and_repetition_give_the_same_bits(executed, monkeypatch):
    monkeypatch.setattr(kernels, "config", lambda *_: SMALL)
    problem, dtype, _ = CASES[2]  # compiled already
    tensors = problem.tensors(dtype)
    want = run(tensors, problem)
    again = run(tensors, problem)
    copies = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    copies["pre_weight"] = copies["pre_weight"].t().contiguous().t()
    assert torch.equal(run(copies, problem), want)
    assert torch.equal(again, want)
    assert executed == ["attend"] * 3


def test_tokens_more_than_two_to_the_31_elements_apart(executed_unchecked, monkeypatch):
    monkeypatch.setattr(kernels, "config", lambda *_: SMALL)
    problem = Problem(1, 2, 3, 8)
    tensors = problem.tensors(torch.bfloat16)
    want = run(tensors, problem)
    for name in "qkv":
        far = tokens_far_apart(tensors[name].transpose(1, 2).reshape(1, 3, 16))
        tensors[name] = far.unflatten(2, (2, 8)).transpose(1, 2)
        assert tensors[name].stride(2) == 2**30
    assert torch.equal(run(tensors, problem), want)
    assert executed_unchecked == ["attend"] * 2


def test_autocast_rounds_the_products_alone(executed, monkeypatch):
    monkeypatch.setattr(kernels, "config", lambda *_: SMALL)
    problem = Problem(1, 2, 9, 8)
    tensors = problem.tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(tensors, problem)
    assert got.dtype == torch.float32
    assert executed == ["attend"]
    rounded = {name: x.bfloat16() for name, x in tensors.items()}
    assert relative(got, exact(rounded, problem.scale)) < 0.01


def test_more_channels_than_tiles_hold_run_on_the_reference(executed):
    tensors = Problem(1, 16, 3, 64).tensors(torch.float32)
    with featkd.use_backend("triton"), pytest.warns(UserWarning, match="together more than 768"):
        talking_heads_attention(**tensors, scale=1.0)
    assert executed == []


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [16, 48, 192, 240, 288, 384, 768])
def test_launch_sizes(channels, compute, arch):
    config = kernels.config(channels, compute, arch)
    blocks = -(-channels // config.block)
    assert blocks % config.group_blocks(channels) == 0
    assert config.group_blocks(channels) * config.block <= max(config.group, config.block)
    for size in (config.rows, config.keys, config.block):
        assert size >= 16
        assert size.bit_count() == 1
