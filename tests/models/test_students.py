"""create_student, names registered with timm, and parameter groups of optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor

from featkd.losses import DistillationLoss
from featkd.models import ARCHS, create_student
from tests.models.conftest import TINY

# [EM26], for 1000 classes
PARAMETERS = {
    "deit_tiny_patch16_224": 5_717_416,
    "deit_tiny_lift384_patch16_224": 5_983_528,
    "deit_tiny_widelast384_patch16_224": 7_313_896,
    "deit_tiny_fixed_step384_patch16_224": 7_313_896,
    "deit_tiny_heads_linear384_patch16_224": 8_628_264,
    "deit_tiny_fixed_linear384_patch16_224": 8_458_816,
    "deit_tiny_w204_patch16_224": 6_427_204,
    "deit_tiny_w219_patch16_224": 7_372_759,
}
REGISTERED = [name for name in PARAMETERS if name != "deit_tiny_patch16_224"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_counts(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_students(name):
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.1, img_size=32, depth=4)
    logits, (features,) = model.forward_with_features(torch.zeros(2, 3, 32, 32), [-1])
    assert logits.shape == (2, 10)
    width = int(name.split("_w")[1][:3]) if "_w2" in name else 384
    assert features.shape == (2, 4, width)
    heads = 6 if name.startswith(("deit_tiny_widelast", "deit_tiny_heads")) else 3
    assert model.blocks[-1].attn.num_heads == heads
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    config = resolve_model_data_config(model)
    assert config == resolve_model_data_config(timm.create_model("deit_tiny_patch16_224", depth=1))
    assert model.pretrained_cfg["architecture"] == name
    assert not {"url", "hf_hub_id", "file"} & set(model.pretrained_cfg)
    assert model.default_cfg is model.pretrained_cfg
    assert timm.list_models(name) == [name]
    assert timm.list_pretrained(name) == []
    with pytest.raises(ValueError, match=r"pretrained: .* no weights to download; allowed: False"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("arch", ["lift", "widelast"])
def test_changed_architecture_has_no_pretrained_weights(arch, tiny):
    own_name = f"deit_tiny_{arch}384_patch16_224"
    for width, name in ((96, "featkd_student"), (384, own_name)):
        student: Any = create_student("deit_tiny_patch16_224", arch, width, **tiny)
        assert not {"url", "hf_hub_id"} & set(student.pretrained_cfg)
        assert student.pretrained_cfg["architecture"] == name


DISTILLED = {"base": "deit_tiny_distilled_patch16_224"}
PARALLEL = {"base": "vit_small_patch16_18x2_224"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "wide_last"}, r"arch: unknown 'wide_last'; did you mean 'widelast'\?; allowed"),
        ({"arch": "?"}, r"arch: unknown '\?'; allowed: plain, lift, widelast, fixed_step"),
        ({"base": "deit_tinny"}, r"base: .* did you mean 'deit_tiny_patch16_224'\?"),
        ({"base": "diet_tiny_patch16_224"}, r"base: .* did you mean 'deit_tiny_patch16_224'\?"),
        ({"base": "vit_tiny_patch16_224.augreg_in1"}, r"mean 'vit_tiny_patch16_224.augreg_in21k"),
        ({"base": "resnet10t", "arch": "lift"}, r"base: arch 'lift' needs .* got ResNet"),
        (DISTILLED | {"arch": "lift"}, r"base: arch 'lift' needs .* got VisionTransformerDist"),
        (DISTILLED | {"arch": "widelast"}, r"got VisionTransformerDistilled"),
        ({"base": "cait_xxs24_224", "arch": "widelast"}, r"base: .*'widelast' needs .* got Cait"),
        (PARALLEL | {"arch": "widelast"}, r"base: .* standard Block, .* ParallelThingsBlock"),
        ({"arch": "lift", "teacher_dim": 0}, r"teacher_dim: expected an int >= 1, got 0"),
        ({"features_only": True}, r"features_only: True is not supported"),
        ({"arch": "widelast", "teacher_dim": 100}, r"teacher_dim: .* got 100"),
        ({"arch": "fixed_step", "embed_dim": 200}, r"embed_dim=200, .*divisible by num_heads"),
        ({"arch": "lift", "embed_dim": 200}, r"embed_dim=200, .*divisible by num_heads"),
        ({"num_heads": 5}, r"num_heads=5, .*divisible by num_heads"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_student(**arguments)


VIT = "deit_tiny_patch16_224"
SWIN = {"img_size": 32, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16}


@pytest.mark.parametrize(
    ("base", "arch", "options"),
    [
        (VIT, "lift", TINY),
        (VIT, "widelast", TINY),
        ("vit_small_patch14_reg4_dinov2", "widelast", TINY),
        ("deit_tiny_distilled_patch16_224", "plain", TINY),
        ("cait_xxs24_224", "plain", TINY),
        ("swin_tiny_patch4_window7_224", "plain", SWIN),
    ],
)
def test_no_weight_decay_for_embeddings_norms_and_biases(base, arch, options):
    student: Any = create_student(base, arch, 96, **options)
    optimizer = create_optimizer_v2(student, opt="adamw", lr=1e-3, weight_decay=0.05)
    decayed = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    names = {name: decayed[id(p)] for name, p in student.named_parameters()}
    tokens = {"pos_embed", "cls_token", "dist_token", "reg_token"}
    for name, decay in names.items():
        small = name.endswith((".bias", "bias_table")) or "norm" in name or "gamma" in name
        assert decay == (0.0 if small or name in tokens else 0.05), name
    if options is SWIN:
        assert sum(name.endswith("relative_position_bias_table") for name in names) == 2
    else:
        assert {"pos_embed", "cls_token"} < names.keys()


@pytest.mark.parametrize("arch", ARCHS)
def test_layer_decay_covers_every_parameter(arch, tiny):
    student: Any = create_student("deit_tiny_patch16_224", arch, 96, **tiny)
    groups = param_groups_layer_decay(
        student, 0.05, no_weight_decay_list=student.no_weight_decay(), layer_decay=0.5
    )
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    names = {name: scale[id(p)] for name, p in student.named_parameters()}
    assert names["head.weight"] == 1.0
    assert names["blocks.0.attn.qkv.weight"] < names["blocks.3.attn.qkv.weight"] <= 1.0
    assert names["patch_embed.proj.weight"] == names["cls_token"] == min(names.values())
    if arch == "lift":
        assert names["projection.weight"] == 1.0
    elif arch != "plain":
        assert names["blocks.3.proj_in.weight"] == names["blocks.3.attn.qkv.weight"]


@pytest.mark.parametrize("arch", ["lift", "widelast"])
def test_gradient_checkpointing_keeps_gradients(arch, tiny):
    student: Any = create_student("deit_tiny_patch16_224", arch, 96, **tiny).to(torch.float64)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def gradients() -> dict[str, Tensor]:
        student.zero_grad()
        logits, maps = student.forward_with_features(images, [0, -1])
        (logits.square().sum() + maps[0].sum() + maps[1].sin().sum()).backward()
        return {name: p.grad.clone() for name, p in student.named_parameters()}

    wanted = gradients()
    student.set_grad_checkpointing(True)
    calls: list[int] = []
    student.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, wanted[name])
    assert len(calls) == 2  # in forward, and recomputed in backward


@pytest.mark.parametrize("arch", ["plain", "lift", "widelast"])
def test_torch_func_gradients_per_sample(arch, tiny):
    """Compares grad and vmap of torch.func with autograd, through the model and the loss."""
    student = create_student(arch=arch, teacher_dim=96, **tiny)
    parameters = dict(student.named_parameters())
    images, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
    loss = DistillationLoss(alpha=0.5)
    teacher_logits = torch.randn(2, 10)

    def total(parameters, image, target, teacher_logits):
        logits = torch.func.functional_call(student, parameters, (image[None],))
        return loss(logits, target[None], teacher_logits[None]).total

    per_sample = torch.func.vmap(torch.func.grad(total), (None, 0, 0, 0))
    found = per_sample(parameters, images, target, teacher_logits)
    loss(student(images), target, teacher_logits).total.backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name].mean(0), parameter.grad, msg=name)
