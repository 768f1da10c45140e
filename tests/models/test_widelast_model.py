"""Students with wide late blocks: schedules, and comparison with equations on tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor

from featkd.models import create_student
from featkd.models.widelast import SCHEDULES, WideBlock, schedule
from tests.models.conftest import TINY, layer_norm

PUBLISHED = {  # [EM26]: widths and heads of DeiT-Tiny's 12 blocks
    "widelast": ([192] * 11 + [384], [3] * 11 + [6]),
    "fixed_step": ([192] * 11 + [384], [3] * 12),
    "heads_linear": ([192] * 9 + [256, 320, 384], [3] * 9 + [4, 5, 6]),
    "fixed_linear": ([192] * 9 + [240, 312, 384], [3] * 12),
}
# with 8 blocks, linear schedules widen two
SIZES = {
    "widelast": ([24] * 7 + [96], [3] * 7 + [12]),
    "fixed_step": ([24] * 7 + [96], [3] * 8),
    "heads_linear": ([24] * 6 + [56, 96], [3] * 6 + [7, 12]),
    "fixed_linear": ([24] * 6 + [48, 96], [3] * 8),
}
SMALL = {**TINY, "embed_dim": 24, "depth": 8}


def student(arch: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return create_student("deit_tiny_patch16_224", arch, 96, **{**SMALL, **options})


@pytest.mark.parametrize("arch", SCHEDULES)
def test_published_sizes(arch):
    widths, heads = PUBLISHED[arch]
    sizes = schedule(arch, 192, 3, 12, 384)
    assert [size.width for size in sizes] == widths
    assert [size.heads for size in sizes] == heads


@pytest.mark.parametrize("arch", SCHEDULES)
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 7, 8, 12, 24, 40])
@pytest.mark.parametrize(("width", "heads", "teacher"), [(24, 3, 96), (192, 3, 768), (66, 3, 132)])
def test_schedules_for_other_sizes(arch, depth, width, heads, teacher):
    sizes = schedule(arch, width, heads, depth, teacher)
    widths = [size.width for size in sizes]
    assert len(sizes) == depth
    assert widths == sorted(widths)
    assert widths[-1] == teacher
    widened = max(1, depth // 4) if arch.endswith("linear") else 1
    assert widths[: depth - widened] == [width] * (depth - widened)
    for size in sizes:
        assert size.width % size.heads == 0
        if arch.startswith("fixed"):
            assert size.heads == heads
        else:
            assert size.width // size.heads == width // heads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wide", 192, 3, 12, 384), r"arch: expected one of widelast, .*; got 'wide'"),
        (("widelast", 200, 3, 12, 384), r"embed_dim: .* multiple of num_heads \(3\), got 200"),
        (("widelast", 192, 3, 12, 100), r"teacher_dim: .* more than the student's 192, got 100"),
        (("widelast", 192, 3, 12, 192), r"teacher_dim: .* more than the student's 192, got 192"),
        (("widelast", 192, 3, 12, 400), r"teacher_dim: .* a multiple of 64; got 400"),
        (("heads_linear", 192, 3, 12, 400), r"teacher_dim: .* a multiple of 64; got 400"),
        (("fixed_step", 192, 3, 12, 400), r"teacher_dim: .* a multiple of 3; got 400"),
        (("fixed_linear", 192, 3, 12, 400), r"teacher_dim: .* a multiple of 3; got 400"),
    ],
)
def test_bad_schedule_sizes_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)


@pytest.mark.parametrize("arch", SCHEDULES)
def test_maps_logits_and_gradients_match_equations(arch, images, plain_vit, perturb):
    widths, heads = SIZES[arch]
    model = perturb(student(arch)).double().eval()
    images = images.double()
    state = dict(model.named_parameters())
    blocks = plain_vit(state, images, heads)
    normed = layer_norm(blocks[-1][:, 0], state["norm.weight"], state["norm.bias"], 1e-6)
    expected = normed @ state["head.weight"].T + state["head.bias"]
    logits, maps = model.forward_with_features(images, range(8))
    assert [found.shape[-1] for found in maps] == widths
    for found, block in zip(maps, blocks, strict=True):
        torch.testing.assert_close(found, block[:, 1:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(model(images), logits)
    pairs = (blocks[0][:, 1:], maps[0]), (blocks[-1][:, 1:], maps[-1]), (expected, logits)
    for outputs in pairs:  # separately, so that a detached map shows
        gradients = [
            torch.autograd.grad(
                output.sin().sum(), list(state.values()), retain_graph=True, allow_unused=True
            )
            for output in outputs
        ]
        for name, wanted, got in zip(state, *gradients, strict=True):
            assert (got is None) == (wanted is None), name
            if got is not None:
                torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)
    assert all(gradient is not None for gradient in gradients[1])  # of the logits


def test_initialization_matches_timm():
    model = student("widelast", img_size=32, embed_dim=48, depth=2)
    for weight in (model.blocks[-1].proj_in.weight, model.head.weight):
        assert 0.017 < float(weight.detach().std()) < 0.023
    assert not model.head.bias.any()
    assert model.blocks[-1].proj_in.bias is None
    for norm in (model.blocks[-1].proj_norm, model.norm):
        assert norm.eps == 1e-6
        assert bool((norm.weight == 1).all())
        assert not norm.bias.any()
    zeros = student("widelast", weight_init="jax_nlhb").head
    assert not zeros.weight.any()
    torch.testing.assert_close(zeros.bias.exp(), torch.full((10,), 0.1))


def test_uses_scaled_dot_product_attention(images, monkeypatch):
    heads: list[int] = []
    fused = F.scaled_dot_product_attention

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        heads.append(q.shape[1])
        return fused(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    student("heads_linear").eval()(images)
    assert heads == SIZES["heads_linear"][1]


def test_timm_options_apply_to_every_block(images):
    model = student("widelast", init_values=0.1, qk_norm=True, mlp_ratio=2.0, drop_path_rate=0.3)
    assert [type(block) for block in model.blocks] == [Block] * 7 + [WideBlock]
    last = model.blocks[-1]
    assert last.ls1.gamma.shape == (96,)
    assert last.attn.q_norm.weight.shape == (8,)
    assert last.mlp.fc1.weight.shape == (192, 96)
    assert last.drop_path1.drop_prob == pytest.approx(0.3)
    model.forward_with_features(images, [-1])[0].sum().backward()


@pytest.mark.parametrize(("first", "second"), [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
def test_drop_path_of_wide_block(first, second):
    block: Any = student("widelast", drop_path_rate=0.5).blocks[-1].train()
    block.drop_path1.drop_prob, block.drop_path2.drop_prob = first, second
    x = torch.randn(2, 5, 24)
    residual, normed = block.project(x)
    expected = residual if first else residual + block.attn(normed)
    expected = expected if second else expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_global_pooling(pool, images):
    model = student("widelast", global_pool=pool, class_token=False).eval()
    logits, (features,) = model.forward_with_features(images, [-1])
    assert features.shape == (2, 16, 96)
    mean, largest = features.mean(dim=1), features.amax(dim=1)
    pooled = {"avg": mean, "max": largest, "avgmax": (mean + largest) / 2}[pool]
    normed = F.layer_norm(pooled, (96,), model.fc_norm.weight, model.fc_norm.bias, 1e-6)
    torch.testing.assert_close(logits, F.linear(normed, model.head.weight, model.head.bias))


def test_classifier_and_timm_metadata(images):
    model = student("heads_linear")
    assert (model.embed_dim, model.num_features, model.head_hidden_size) == (24, 96, 96)
    assert [info["num_chs"] for info in model.feature_info] == SIZES["heads_linear"][0]
    assert "block_fn" not in model._model_args
    assert model.get_classifier() is model.head
    model.reset_classifier(5)
    assert model(images).shape == (2, 5)
    model.reset_classifier(7, global_pool="avg")
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images).shape == (2, 96)
    model.set_input_size(img_size=(48, 32))
    assert model.forward_with_features(torch.zeros(1, 3, 48, 32), [-1])[1][0].shape == (1, 24, 96)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_a_graph_break(images):
    """tests/train/test_trainer.py::test_compiled_run compares a run compiled by Inductor."""
    function = student("widelast", depth=1).eval().forward_with_features
    compiled: Any = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = (call(images, (0, -1)) for call in (compiled, function))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
