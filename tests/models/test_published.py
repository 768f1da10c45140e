"""load_published on synthetic files with the published names and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from featkd.models import CheckpointMismatch, Lift, WideLast, create_student, load_published
from tests.models.conftest import layer_norm

CLASSES, PATCH, GRID, CHANNELS = 10, 8, 3, 3


def vit_tensors(widths: Sequence[int]) -> dict[str, Tensor]:
    """Random tensors with the published names of a ViT [EM26], for blocks of the given widths."""
    generator = torch.Generator().manual_seed(len(widths))

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    first = widths[0]
    state = {
        "cls_token": draw(1, 1, first),
        "pos_embed": draw(1, 1 + GRID * GRID, first),
        "patch_embed.proj.weight": draw(first, CHANNELS, PATCH, PATCH),
        "patch_embed.proj.bias": draw(first),
    }
    for index, (before, width) in enumerate(zip((first, *widths), widths, strict=False)):
        name = f"blocks.{index}"
        if before != width:
            state[f"{name}.proj_in.weight"] = draw(width, before)
            state[f"{name}.proj_norm.weight"] = 1 + draw(width)
            state[f"{name}.proj_norm.bias"] = draw(width)
        for norm in ("norm1", "norm2"):
            state[f"{name}.{norm}.weight"] = 1 + draw(width)
            state[f"{name}.{norm}.bias"] = draw(width)
        shapes = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for layer, (rows, columns) in shapes.items():
            state[f"{name}.{layer}.weight"] = draw(rows * width, columns * width)
            state[f"{name}.{layer}.bias"] = draw(rows * width)
    state["norm.weight"], state["norm.bias"] = 1 + draw(widths[-1]), draw(widths[-1])
    state["head.weight"], state["head.bias"] = draw(CLASSES, widths[-1]), draw(CLASSES)
    return state


def lift_tensors(width: int = 24, depth: int = 3, teacher: int = 40) -> dict[str, Tensor]:
    """Tensors of the published Lift, including the unused norm and head of its base model."""
    state = {f"base_model.{name}": v for name, v in vit_tensors([width] * depth).items()}
    generator = torch.Generator().manual_seed(9)
    last = depth - 1
    state[f"projections.{last}.weight"] = 0.01 * torch.randn(teacher, width, generator=generator)
    state[f"layer_norms.{last}.weight"] = 1 + torch.randn(teacher, generator=generator)
    state[f"layer_norms.{last}.bias"] = torch.randn(teacher, generator=generator)
    state["head.weight"] = torch.randn(CLASSES, teacher, generator=generator)
    state["head.bias"] = torch.randn(CLASSES, generator=generator)
    return state


WIDE = {  # widths and heads of the blocks; the first block has 24 channels and 3 heads
    "widelast": ([24, 24, 24, 48], [3, 3, 3, 6]),
    "fixed_step": ([24, 24, 24, 48], [3, 3, 3, 3]),
    "heads_linear": ([24] * 6 + [56, 96], [3] * 6 + [7, 12]),
    "fixed_linear": ([24] * 6 + [48, 96], [3] * 8),
}


@pytest.fixture
def images() -> Tensor:
    size = GRID * PATCH
    return torch.randn(2, CHANNELS, size, size, generator=torch.Generator().manual_seed(1))


def saved(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    path = tmp_path / "published.pth"
    torch.save({"model": state, "epoch": 300}, path)
    return path


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_published_lift_matches_equations(tmp_path, suffix, images, plain_vit):
    state = lift_tensors()
    path = saved(tmp_path, state)
    if suffix == "safetensors":
        path = path.with_suffix(".safetensors")
        safetensors.torch.save_file(state, path)
    model: Any = load_published(path)
    assert isinstance(model, Lift)
    assert not model.training
    base = {n.removeprefix("base_model."): v.double() for n, v in state.items()}
    tokens = plain_vit(base, images.double(), [3, 3, 3])[-1][:, 1:]
    norm = base["layer_norms.2.weight"], base["layer_norms.2.bias"]
    z = layer_norm(tokens @ base["projections.2.weight"].T, *norm, 1e-5)
    expected = z.mean(dim=1) @ state["head.weight"].double().T + state["head.bias"].double()
    logits, (features,) = model.double().forward_with_features(images.double(), [-1])
    torch.testing.assert_close(features, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arch", WIDE)
def test_published_wide_students_match_equations(arch, tmp_path, images, plain_vit):
    widths, heads = WIDE[arch]
    state = vit_tensors(widths)
    chosen = "fixed_step" if arch == "fixed_step" else None  # the others are detected
    model: Any = load_published(saved(tmp_path, state), arch=chosen)
    assert isinstance(model, WideLast)
    assert [size.heads for size in model.sizes] == heads
    double = {name: value.double() for name, value in state.items()}
    expected = plain_vit(double, images.double(), heads)[-1][:, 1:]
    _, (features,) = model.double().forward_with_features(images.double(), [-1])
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)


def test_published_sizes_of_deit_tiny(tmp_path):
    meta: Any = create_student(arch="widelast", device="meta")
    state = {name: torch.zeros(value.shape) for name, value in meta.state_dict().items()}
    model: Any = load_published(saved(tmp_path, state))
    assert [tuple(size) for size in model.sizes] == [(192, 3)] * 11 + [(384, 6)]
    assert model.patch_embed.img_size == (224, 224)
    assert sum(p.numel() for p in model.parameters()) == 7_313_896


def test_default_is_last_weights(tmp_path):
    last = vit_tensors([24, 48])
    averaged = {name: value + 1 for name, value in last.items()}
    path = tmp_path / "both.pth"
    torch.save({"model": last, "model_ema": averaged}, path)
    for weights, expected in (({}, last), ({"weights": "model_ema"}, averaged)):
        found: Any = load_published(path, **weights)
        assert torch.equal(found.head.bias, expected["head.bias"])


def test_num_heads_argument(tmp_path):
    path = saved(tmp_path, vit_tensors([24, 24, 24, 48]))
    model: Any = load_published(path, num_heads=2)
    assert [size.heads for size in model.sizes] == [2, 2, 2, 4]
    with pytest.raises(ValueError, match=r"num_heads: expected a divisor .* 24; got 5"):
        load_published(path, num_heads=5)
    lift: Any = load_published(saved(tmp_path, lift_tensors()), num_heads=4)
    assert lift.blocks[0].attn.num_heads == 4


def test_missing_tensors_raise(tmp_path):
    """One of each kind: sizes, blocks, a projection, what only the Lift has."""
    common = ("pos_embed", "cls_token", "blocks.1.norm1.weight", "blocks.0.attn.qkv.bias")
    of_lift = ("projections.2.weight", "layer_norms.2.bias", "head.weight")
    wide = (*common, "blocks.1.proj_in.weight", "norm.weight", "head.weight")
    for state, names in (
        (lift_tensors(), (*of_lift, *(f"base_model.{name}" for name in common))),
        (vit_tensors([24, 48]), wide),
    ):
        for name in names:
            path = saved(tmp_path, {n: x for n, x in state.items() if n != name})
            missing = name.removeprefix("base_model.")
            with pytest.raises(CheckpointMismatch, match=rf"1 missing: {missing}"):
                load_published(path)
    unused = ("base_model.norm.", "base_model.head.")
    used = {n: x for n, x in lift_tensors().items() if not n.startswith(unused)}
    load_published(saved(tmp_path, used))


LIFT, TWO = lift_tensors(), vit_tensors([24, 48])
EIGHT = vit_tensors([24] * 6 + [56, 96])


@pytest.mark.parametrize(
    ("state", "added", "arch", "message"),
    [
        (LIFT, {"extra": (1,)}, None, "1 unexpected: extra"),
        (LIFT, {"base_model.extra": (1,)}, None, "1 unexpected: extra"),
        (LIFT, {"projections.0.weight": (1,)}, None, "1 unexpected: projections.0.weight"),
        (LIFT, {"layer_norms.2.extra": (1,)}, None, "1 unexpected: layer_norms.2.extra"),
        (LIFT, {"norm.weight": (1,)}, None, "1 unexpected: norm.weight"),
        (TWO, {"blocks.0.proj_in.weight": (24, 24)}, None, r"1 unexpected: blocks\.0\.proj_in\.w"),
        (TWO, {"cls_token": (1, 1, 7)}, None, r"1 of another shape: cls_token \(1, 1, 7\)"),
        (TWO, {"pos_embed": (5, 24)}, None, r"1 of another rank: pos_embed \(5, 24\)"),
        (TWO, {"pos_embed": (1, 7, 24)}, None, "has 6 patch positions, which form no square"),
        ({}, {"conv.weight": (1,)}, None, r"1 missing: blocks\.0\.\*"),
        (vit_tensors([24, 24, 24]), {}, None, r"widths 24/24/24, which are no schedule's"),
        (vit_tensors([24, 48, 48]), {}, None, r"widths 24/48/48, .*widelast: has 24/24/48"),
        (EIGHT, {}, "fixed_linear", "fixed_linear: has 24/24/24/24/24/24/48/96"),
        (TWO, {}, "heads_step", r"arch: expected one of widelast, .* got 'heads_step'"),
        (LIFT, {}, "widelast", r"arch: .* holds a Lift student, got 'widelast'"),
    ],
)
def test_bad_files_raise(state, added, arch, message, tmp_path):
    error = ValueError if message.startswith("arch") else CheckpointMismatch
    path = saved(tmp_path, state | {name: torch.zeros(shape) for name, shape in added.items()})
    with pytest.raises(error, match=message):
        load_published(path, arch=arch)
