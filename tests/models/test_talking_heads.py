"""CaiT's attention by the fused op: timm's numbers and weights, and timm's code where asked."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.cait import TalkingHeadAttn
from torch import nn

import featkd
from featkd.models import create_teacher
from featkd.models.talking_heads import FusedTalkingHeads, fuse_talking_heads


@pytest.fixture
def pair() -> tuple[TalkingHeadAttn, nn.Module]:
    """timm's attention with biases that matter, and its fused twin, in evaluation mode."""
    torch.manual_seed(0)
    ours = TalkingHeadAttn(24, 4, qkv_bias=True, attn_drop=0.5).double().eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    timms = copy.deepcopy(ours)
    fuse_talking_heads(ours)
    assert type(ours) is FusedTalkingHeads
    return timms, ours


def test_it_computes_what_timm_does(pair):
    timms, ours = pair
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    with torch.no_grad():
        want, got = (module(x) for module in pair)
    assert featkd.last_backend("talking_heads_attention") == "cpu"
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert not torch.equal(got, want)  # it did go another way
    assert ours.state_dict().keys() == timms.state_dict().keys()


def test_autocast_is_as_close_as_timms(pair):
    x = torch.randn(3, 7, 24)
    want = pair[0](x.double())
    errors = []
    for module in pair:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            errors.append((module.float()(x) - want).norm() / want.norm())
    assert errors[1] <= 1.5 * errors[0]


def test_it_is_timms_where_asked_watched_trained_or_differentiated(pair):
    timms, ours = pair
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    assert torch.equal(ours(x), timms(x))  # its weights require grad
    ours.requires_grad_(False)
    timms.requires_grad_(False)
    assert not torch.equal(ours(x), timms(x))
    assert torch.equal(ours(x.requires_grad_()), timms(x))
    x = x.detach()
    with featkd.use_backend("reference"):
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


def test_teachers_have_it():
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4}
    teacher = create_teacher("cait_xxs24_224", **size)
    assert [type(block.attn) for block in teacher.blocks] == [FusedTalkingHeads] * 2
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        got, _ = teacher.forward_with_features(images, [-1])
        with featkd.use_backend("reference"):
            want, _ = teacher.forward_with_features(images, [-1])
    torch.testing.assert_close(got, want)
