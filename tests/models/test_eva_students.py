"""Lift and WideLast on other timm ViTs: registers, rotary embeddings, SwiGLU, attention pooling.

The expected outputs are composed of timm's own modules: the wide last block, the final norm and
the pooling belong to a timm model of the last block's width.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva, EvaBlock
from torch import Tensor

from featkd.models import create_student, feature_grid
from featkd.models.lift import LiftEva
from featkd.models.widelast import WideEvaBlock, WideLastEva

SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 4}
WIDTH, HEADS, CLASSES = 128, 8, 5
BASES: dict[str, dict[str, Any]] = {
    # Eva: registers, rotary embeddings, layer scale
    "vit_small_patch16_dinov3": {"init_values": 0.1},
    # position and rotary embeddings, packed SwiGLU
    "eva02_tiny_patch14_224": {},
    # separate projections, SwiGLU with a norm inside
    "eva02_base_patch14_224": {},
    # norm before the blocks, attention pooling
    "vit_pe_core_tiny_patch16_384": {},
    # no rotary embeddings
    "eva_giant_patch14_224": {},
    # VisionTransformer: registers and layer scale
    "vit_small_patch14_reg4_dinov2": {"init_values": 0.1},
    # SwiGLU
    "vit_giant_patch14_reg4_dinov2": {"mlp_ratio": 4.0},
    # attention pooling, no class token
    "vit_base_patch16_siglip_224": {},
    # root mean square norms
    "aimv2_large_patch14_224": {},
}


def build(base: str, arch: str, perturb: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SMALL, **BASES[base], **options}
    return perturb(create_student(base, arch, WIDTH, CLASSES, **sizes)).double().eval()


def reference(base: str, **options: Any) -> Any:
    sizes = {**SMALL, **BASES[base], "num_classes": CLASSES, **options}
    return timm.create_model(base, **sizes).double().eval()


def embedded(model: Any, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens before the first block, and the blocks' other arguments."""
    x = model._pos_embed(model.patch_embed(images))
    x, rope = x if isinstance(model, Eva) else (x, None)
    return model.norm_pre(x), {} if rope is None else {"rope": rope}


def normed(x: Tensor, norm: Any) -> Tensor:
    kind = F.rms_norm if "Rms" in type(norm).__name__ else F.layer_norm
    bias = () if kind is F.rms_norm else (norm.bias,)
    return kind(x, x.shape[-1:], norm.weight, *bias, eps=norm.eps)


@pytest.fixture(name="images")
def _images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("base", BASES)
def test_lift_equals_its_equations(base, images, perturb):
    lift = build(base, "lift", perturb)
    plain = reference(base)
    assert isinstance(lift, LiftEva) == isinstance(plain, Eva)
    own = lift.state_dict()
    assert not {name.partition(".")[0] for name in own} & {"norm", "fc_norm", "attn_pool"}
    plain.load_state_dict(
        {n: own[n] for n in own if not n.startswith(("proj", "head"))}, strict=False
    )
    (raw,) = plain.forward_intermediates(images, [2], output_fmt="NLC", intermediates_only=True)
    z = F.layer_norm(
        raw @ own["projection.weight"].T,
        (WIDTH,),
        own["projection_norm.weight"],
        own["projection_norm.bias"],
        1e-5,
    )
    logits = z.mean(dim=1) @ own["head.weight"].T + own["head.bias"]
    found, (first, last) = lift.forward_with_features(images, [0, -1])
    torch.testing.assert_close(last, z)
    torch.testing.assert_close(found, logits)
    torch.testing.assert_close(lift(images), logits)
    (wanted,) = plain.forward_intermediates(images, [0], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(first, wanted)
    teacher = torch.randn(z.shape, dtype=z.dtype)
    found, loss = lift.forward_with_loss(images, teacher, grid=feature_grid(lift))
    torch.testing.assert_close(found, logits)
    torch.testing.assert_close(loss, (z - teacher).square().mean().to(loss), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_widelast_equals_a_wide_model_of_timm(base, images, perturb):
    model = build(base, "widelast", perturb)
    wide = reference(base, embed_dim=WIDTH, num_heads=HEADS)
    of_last = ("blocks.2.", "norm.", "fc_norm.", "attn_pool.", "head.")
    own = model.state_dict().items()
    part = {n: x for n, x in own if n.startswith(of_last) and ".proj_" not in n}
    assert not wide.load_state_dict(part, strict=False).unexpected_keys
    x, more = embedded(model, images)
    for block in model.blocks[:2]:
        x = block(x, **more)
    last = model.blocks[2]
    residual = normed(x @ last.proj_in.weight.T, last.proj_norm)
    x = wide.blocks[2](residual, **more)
    logits = wide.forward_head(wide.norm(x))
    found, (features,) = model.forward_with_features(images, [-1])
    torch.testing.assert_close(features, x[:, model.num_prefix_tokens :])
    torch.testing.assert_close(found, logits)
    torch.testing.assert_close(model(images), logits)
    kernel = last.proj_in.weight
    (wanted,) = torch.autograd.grad(logits.sin().sum(), kernel)
    (gradient,) = torch.autograd.grad(found.sin().sum(), kernel)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("base", ["vit_small_patch16_dinov3", "vit_pe_core_tiny_patch16_384"])
def test_heads_linear_widens_two_of_eight_blocks(base, images, perturb):
    model = build(base, "heads_linear", perturb, depth=8)
    assert [type(block) for block in model.blocks] == [EvaBlock] * 6 + [WideEvaBlock] * 2
    assert [block.attn.num_heads for block in model.blocks] == [4] * 6 + [6, 8]
    _, maps = model.forward_with_features(images, range(8))
    assert [x.shape[-1] for x in maps] == [64] * 6 + [96, 128]
    assert [info["num_chs"] for info in model.feature_info] == [64] * 6 + [96, 128]


@pytest.mark.parametrize("arch", ["lift", "widelast"])
@pytest.mark.parametrize("base", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_training_state_and_copies(base, arch, images, perturb):
    model = build(base, arch, perturb).train()
    logits, (features,) = model.forward_with_features(images, [-1])
    (logits.square().mean() + features.sin().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
    model.eval()
    again = build(base, arch, lambda x: x)
    again.load_state_dict(model.state_dict())
    for copied in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        assert torch.equal(copied(images), model(images))
    program = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(program(images), model(images))
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)


def test_wide_eva_block_starts_as_those_of_timm():
    """Same scales of the weights as in a timm model of the last width; new values for each seed."""
    options = {**SMALL, "embed_dim": 96, "num_heads": 3, "init_values": 0.1, "drop_path_rate": 0.2}
    base = "vit_small_patch16_dinov3"
    torch.manual_seed(0)
    model: Any = create_student(base, "widelast", 192, CLASSES, **options)
    assert isinstance(model, WideLastEva)
    wide = timm.create_model(base, **{**options, "embed_dim": 192, "num_heads": 6})
    block, like = model.blocks[2], wide.blocks[2]
    assert block.drop_path1.drop_prob == like.drop_path1.drop_prob == pytest.approx(0.2)
    for name, parameter in like.named_parameters():
        own = block.get_parameter(name)
        torch.testing.assert_close(own.std(), parameter.std(), rtol=0.03, atol=1e-7, msg=name)
        assert torch.equal(own, parameter) == (parameter.std() < 1e-6), name
    assert torch.equal(block.proj_norm.weight, torch.ones(192))
    torch.testing.assert_close(block.proj_in.weight.std(), torch.tensor(0.02), rtol=0.03, atol=0)
    assert block.attn.k_bias is None or not block.attn.k_bias.any()


@pytest.mark.parametrize(
    ("base", "arch", "message"),
    [
        ("vit_small_patch16_dinov3", "fixed_step", r"arch: 'fixed_step' changes the channels per "),
        ("vit_small_patch16_rope_mixed_224", "widelast", r"base: .* learned rotary frequencies"),
        ("naflexvit_base_patch16_gap", "widelast", r"Eva, got NaFlexVit"),
        ("vit_small_patch16_dinov3", "widelast", r"teacher_dim: .* multiple of 16; got 100"),
    ],
)
def test_bases_that_cannot_be_changed(base, arch, message):
    sizes = {name: SMALL[name] for name in ("embed_dim", "depth", "num_heads")}
    with pytest.raises(ValueError, match=message):
        create_student(base, arch, 100 if "100" in message else WIDTH, **sizes)


def test_no_rotary_embeddings_allow_wider_heads(images, perturb):
    model = build("eva_giant_patch14_224", "fixed_step", perturb)
    assert model.blocks[2].attn.num_heads == 4
    assert model(images).shape == (2, CLASSES)
