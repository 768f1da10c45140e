"""forward_with_features, compared with forward hooks on an unchanged timm model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from featkd.models import feature_grid, num_layers, resolve_layers, with_features
from tests.models.conftest import TINY

VIT = TINY
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 2, "embed_dim": 24, "num_classes": 10}
SWIN |= {"depths": (1, 2, 1), "num_heads": (1, 2, 3)}
# family: timm name, arguments, number of prefix tokens
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "deit": ("deit_tiny_patch16_224", VIT, 1),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", VIT, 2),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", VIT, 5),
    "clip": ("vit_base_patch16_clip_224", VIT, 1),
    "siglip": ("vit_base_patch16_siglip_224", VIT, 0),
    "average_pooled": ("vit_tiny_patch16_224", {**VIT, "global_pool": "avg"}, 1),
    "cait": ("cait_xxs24_224", {**VIT, "num_heads": 4}, 0),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 0),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, perturb: Any) -> tuple[nn.Module, int]:
    """An unchanged timm model in evaluation mode, and its number of prefix tokens."""
    name, options, prefix = FAMILIES[request.param]
    torch.manual_seed(0)
    return perturb(timm.create_model(name, **options)).eval(), prefix


def hooked(model: nn.Module, images: Tensor, prefix: int) -> tuple[Tensor, list[Tensor]]:
    """Logits and the patch tokens of each layer, by hooks on timm's modules."""
    maps: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        tokens = output.reshape(len(output), -1, output.shape[-1])
        maps.append(tokens[:, prefix:])

    stages: Any = model.layers if hasattr(model, "layers") else model.blocks
    handles = [stage.register_forward_hook(keep) for stage in stages]
    logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, maps


def test_maps_and_logits_match_timm(family, images):
    untouched, prefix = family
    logits, maps = hooked(untouched, images, prefix)
    before, kind = copy.deepcopy(untouched.state_dict()), type(untouched)
    model: Any = with_features(untouched)  # in place, so results are bitwise equal
    assert model is with_features(model) is untouched
    assert isinstance(model, kind)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    depth = len(maps)
    layers = [-1, 0, 1, depth - 1, 0, -depth]
    got_logits, got = model.forward_with_features(images, layers)
    assert torch.equal(got_logits, logits)
    assert torch.equal(model(images), logits)
    assert num_layers(model) == depth
    assert len(got) == len(layers)
    for layer, found in zip(layers, got, strict=True):
        assert torch.equal(found, maps[layer])
    logits_alone, nothing = model.forward_with_features(images, [])
    assert torch.equal(logits_alone, logits)
    assert nothing == []


def test_forward_maps_stops_at_deepest_layer(family, images):
    untouched, _ = family
    model: Any = with_features(copy.deepcopy(untouched))
    stages = model.layers if hasattr(model, "layers") else model.blocks
    calls: list[int] = []
    for index, stage in enumerate(stages):
        stage.register_forward_hook(lambda *_, index=index: calls.append(index))
    for layers in ([0], [1, 0, 1], [-1], []):
        want = model.forward_with_features(images, layers)[1]
        assert calls == list(range(len(stages)))  # each once
        calls.clear()
        got = model.forward_maps(images, layers)
        assert calls == list(range(max(resolve_layers(layers, len(stages)), default=-1) + 1))
        calls.clear()
        assert len(got) == len(want)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_maps_and_logits(family, images, checkpointing):
    untouched, prefix = family[0].double(), family[1]
    images = images.double()
    model: Any = with_features(copy.deepcopy(untouched))
    model.set_grad_checkpointing(checkpointing)
    wanted_logits, maps = hooked(untouched, images, prefix)
    logits, got = model.forward_with_features(images, [0, -1])
    for y, first, last in ((wanted_logits, maps[0], maps[-1]), (logits, *got)):
        (y.square().sum() + first.square().sum() + last.sin().sum()).backward()
    wanted = dict(untouched.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, wanted[name].grad)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("family", ["deit_distilled", "cait", "swin"], indirect=True)
def test_compiles_without_a_graph_break(family, images):
    model: Any = with_features(family[0])
    compiled: Any = torch.compile(model.forward_with_features, fullgraph=True, backend="eager")
    for layers in ((0, -1), ()):
        logits, maps = model.forward_with_features(images, layers)
        got_logits, got = compiled(images, layers)
        assert torch.equal(got_logits, logits)
        assert len(got) == len(layers)
        assert all(torch.equal(a, b) for a, b in zip(got, maps, strict=True))


def test_autocast_and_training_mode_match_forward(family, images):
    model: Any = with_features(family[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.forward_with_features(images, [-1])[0], model(images))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    torch.manual_seed(3)
    logits = model(images)
    torch.manual_seed(3)
    assert torch.equal(model.forward_with_features(images, [0, -1])[0], logits)
    assert not torch.equal(model(images), logits)  # the forward pass is random


def test_distilled_training_returns_two_logits(images):
    model: Any = with_features(timm.create_model(FAMILIES["deit_distilled"][0], **VIT))
    model.set_distilled_training(True)
    logits, (features,) = model.forward_with_features(images, [-1])
    assert [tuple(head.shape) for head in logits] == [(2, 10), (2, 10)]
    assert features.shape == (2, 16, 48)


SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
# timm name, arguments, and the (tokens, channels) of the first and of the last layer at 64 pixels
OTHERS: list[tuple[str, dict[str, Any], tuple[int, int], tuple[int, int]]] = [
    ("vit_small_patch16_dinov3", {**SMALL, "img_size": 64}, (16, 48), (16, 48)),
    ("vit_pe_core_tiny_patch16_384", {**SMALL, "img_size": 64}, (16, 48), (16, 48)),
    ("beitv2_base_patch16_224", {**SMALL, "img_size": 64}, (16, 48), (16, 48)),
    ("naflexvit_base_patch16_gap", SMALL, (16, 48), (16, 48)),
    ("xcit_nano_12_p16_224", {"depth": 2, "img_size": 64, "num_classes": 10}, (16, 128), (16, 128)),
    ("swinv2_tiny_window8_256", {**SWIN, "img_size": 64, "patch_size": 4}, (256, 24), (16, 96)),
    ("convnext_atto", {"num_classes": 10}, (256, 40), (4, 320)),
    ("resnet18", {"num_classes": 10}, (1024, 64), (4, 512)),
    ("mobilenetv4_conv_small", {"num_classes": 10}, (1024, 32), (4, 960)),
]


@pytest.mark.parametrize(
    ("name", "options", "first", "last"), OTHERS, ids=[name for name, *_ in OTHERS]
)
def test_models_of_other_classes_give_maps(name, options, first, last):
    torch.manual_seed(0)
    untouched: Any = timm.create_model(name, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = untouched(images)
        pooled = untouched.forward_head(untouched.forward_features(images), pre_logits=True)
        maps = untouched.forward_intermediates(images, intermediates_only=True)
        model: Any = with_features(copy.deepcopy(untouched))
        depth = num_layers(model)
        logits, got = model.forward_with_features(images, ["pooled", *range(depth)])
        (alone,) = model.forward_maps(images, [0])
        twins = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    assert torch.equal(logits, want)
    assert torch.equal(got[0], pooled[:, None])
    assert len(maps) == depth
    for tokens, x in zip(got[1:], maps, strict=True):
        assert torch.equal(tokens, x.flatten(2).transpose(1, 2))
    assert torch.equal(alone, got[1])
    for twin in twins:
        assert torch.equal(twin.forward_maps(images, [0])[0], got[1])
    assert (got[1].shape[1:], got[-1].shape[1:]) == (first, last)


def test_a_model_without_maps_raises():
    with pytest.raises(ValueError, match=r"^model: Linear gives no feature maps: it has no forwar"):
        with_features(nn.Linear(2, 2))


def test_resolve_layers():
    assert resolve_layers([0, 11, -1, -12, 3, 3], 12) == (0, 11, 11, 0, 3, 3)
    assert resolve_layers((), 12) == ()


@pytest.mark.parametrize("layer", [12, -13])
def test_layer_out_of_range_raises(layer, images):
    message = rf"^layers: {layer} is out of range for a model with 12 layers \(valid: -12\.\.11\)$"
    with pytest.raises(ValueError, match=message):
        resolve_layers([0, layer], 12)
    model: Any = with_features(timm.create_model("deit_tiny_patch16_224", **{**VIT, "depth": 12}))
    with pytest.raises(ValueError, match=message):
        model.forward_with_features(images, [layer])
    with pytest.raises(ValueError, match=message):
        feature_grid(model, layer)


@pytest.mark.parametrize("layers", [[1.0], ["1"], [True], [None], 3, "12"])
def test_layers_of_wrong_type_raise(layers):
    with pytest.raises(TypeError, match=r"^layers: expected"):
        resolve_layers(layers, 12)


@pytest.mark.parametrize(
    ("name", "options", "layer", "grid"),
    [
        ("deit_tiny_patch16_224", {**VIT, "img_size": (32, 48)}, -1, (4, 6)),
        ("vit_small_patch14_reg4_dinov2", {**VIT, "img_size": (48, 32)}, 0, (6, 4)),
        ("cait_xxs24_224", {**VIT, "num_heads": 4, "img_size": (32, 48)}, -1, (4, 6)),
        ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": (32, 48)}, 0, (16, 24)),
        ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": (32, 48)}, -1, (4, 6)),
        ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": 28}, -1, (4, 4)),  # 14, 7, 4
        ("vit_tiny_patch16_224", {**VIT, "img_size": 50}, -1, (6, 6)),  # the rest is left out
        ("vit_small_patch14_dinov2", {**VIT, "patch_size": 14, "img_size": 56}, -1, (4, 4)),
    ],
)
def test_feature_grid(name, options, layer, grid):
    model: Any = with_features(timm.create_model(name, **options))
    assert feature_grid(model, layer) == grid
    size = options["img_size"]
    images = torch.zeros(1, 3, *(size if isinstance(size, tuple) else (size, size)))
    _, (features,) = model.forward_with_features(images, [layer])
    assert features.shape[1] == grid[0] * grid[1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_patch16_224", {**VIT, "dynamic_img_size": True}),
        ("deit_tiny_patch16_224", {**VIT, "patch_drop_rate": 0.5}),
        ("swin_tiny_patch4_window7_224", {**SWIN, "dynamic_img_size": True}),
    ],
)
def test_feature_grid_is_none_for_dynamic_sizes(name, options):
    model = with_features(timm.create_model(name, **options))
    assert feature_grid(model) is None


def test_dynamic_image_size():
    options = {**VIT, "dynamic_img_size": True}
    model: Any = with_features(timm.create_model("deit_tiny_patch16_224", **options))
    _, (features,) = model.forward_with_features(torch.zeros(1, 3, 16, 48), [-1])
    assert features.shape == (1, 12, 48)
