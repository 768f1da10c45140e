"""CaiT's attention by the fused op, compared with timm."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.cait import TalkingHeadAttn
from torch import nn

import featkd
from featkd.models import create_teacher, talking_heads
from featkd.models.talking_heads import FusedTalkingHeads, fuse_talking_heads


@pytest.fixture
def pair() -> tuple[TalkingHeadAttn, nn.Module]:
    """timm's attention with random biases, and its fused version, in evaluation mode."""
    torch.manual_seed(0)
    ours = TalkingHeadAttn(24, 4, qkv_bias=True, attn_drop=0.5).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    timms = copy.deepcopy(ours)
    fuse_talking_heads(ours)
    assert type(ours) is FusedTalkingHeads
    return timms, ours


def test_matches_timm(pair):
    timms, ours = pair
    x = torch.randn(3, 7, 24)
    with torch.no_grad():
        want, got = (module(x) for module in pair)
    assert featkd.last_backend("talking_heads_attention") == "cpu"
    assert (got - want).norm() < 1e-6 * want.norm()
    assert not torch.equal(got, want)  # not timm's code
    assert ours.state_dict().keys() == timms.state_dict().keys()


def test_autocast_error_is_close_to_timms(pair):
    x = torch.randn(3, 7, 24)
    want = copy.deepcopy(pair[0]).double()(x.double())
    errors = []
    for module in pair:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            errors.append((module(x) - want).norm() / want.norm())
    assert errors[1] <= 1.5 * errors[0]


def test_uses_timms_code_for_gradients_hooks_training_and_other_backends(pair):
    timms, ours = pair
    x = torch.randn(3, 7, 24)
    assert torch.equal(ours(x), timms(x))  # weights require grad
    ours.requires_grad_(False)
    timms.requires_grad_(False)
    assert not torch.equal(ours(x), timms(x))
    assert torch.equal(ours(x.requires_grad_()), timms(x))
    x = x.detach()
    for backend in ("reference", "triton"):
        with featkd.use_backend(backend):
            assert torch.equal(ours(x), timms(x))
    seen = []
    handle = ours.proj_w.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(ours(x), timms(x))
    assert seen
    handle.remove()
    ours.train()
    torch.manual_seed(1)
    dropped = ours(x)
    torch.manual_seed(1)
    assert torch.equal(timms.train()(x), dropped)
    assert not torch.equal(timms(x), dropped)


def test_uses_timms_code_on_other_devices(pair, monkeypatch):
    called = []
    monkeypatch.setattr(talking_heads, "talking_heads_attention", lambda *_, **__: called.append(1))
    ours = pair[1].requires_grad_(False).to("meta")
    assert ours(torch.zeros(3, 7, 24, device="meta")).shape == (3, 7, 24)
    assert not called


def test_cait_teacher_uses_fused_attention():
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4}
    teacher = create_teacher("cait_xxs24_224", **size)
    assert [type(block.attn) for block in teacher.blocks] == [FusedTalkingHeads] * 2
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        got, _ = teacher.forward_with_features(images, [-1])
        with featkd.use_backend("reference"):
            want, _ = teacher.forward_with_features(images, [-1])
    torch.testing.assert_close(got, want)
