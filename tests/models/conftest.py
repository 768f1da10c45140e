"""Small models, and a ViT written as equations on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
TINY: dict[str, Any] = {**SIZES, "num_classes": 10}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Applies to all tests of this folder."""


@pytest.fixture
def tiny() -> dict[str, Any]:
    """timm arguments of a ViT with 16 patches, 4 blocks, 48 channels and 3 heads."""
    return dict(TINY)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fresh_compiler() -> None:
    """Resets torch.compile, so that graph breaks of earlier tests do not count."""
    torch.compiler.reset()


@pytest.fixture
def perturb() -> Callable[[nn.Module], nn.Module]:
    """Function that adds noise to all parameters, so that no norm, bias or scale is trivial."""

    def apply(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise.to(parameter))
        return model

    return apply


@pytest.fixture
def plain_vit() -> Callable[..., list[Tensor]]:
    """Function that computes each block's output (B, 1 + N, C) from a state dict of timm."""

    def run(
        state: Mapping[str, Tensor], images: Tensor, heads: Sequence[int], eps: float = 1e-6
    ) -> list[Tensor]:
        def linear(x: Tensor, name: str) -> Tensor:
            return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.tensor(0.0))

        def norm(x: Tensor, name: str) -> Tensor:
            return layer_norm(x, state[f"{name}.weight"], state[f"{name}.bias"], eps)

        patch = state["patch_embed.proj.weight"].shape[-1]
        b, c, h, w = images.shape
        cells = images.reshape(b, c, h // patch, patch, w // patch, patch)
        cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)
        kernel = state["patch_embed.proj.weight"].flatten(1)
        x = cells @ kernel.T + state["patch_embed.proj.bias"]
        x = torch.cat([state["cls_token"].expand(b, -1, -1), x], dim=1) + state["pos_embed"]
        outputs = []
        for index, count in enumerate(heads):
            name = f"blocks.{index}"
            if f"{name}.proj_in.weight" in state:
                x = norm(linear(x, f"{name}.proj_in"), f"{name}.proj_norm")
            qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
            q, k, v = (
                part.reshape(*part.shape[:2], count, -1).transpose(1, 2)
                for part in qkv.chunk(3, dim=-1)
            )
            attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
            mixed = (attention @ v).transpose(1, 2).flatten(2)
            x = x + linear(mixed, f"{name}.attn.proj")
            hidden = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
            x = x + linear(hidden, f"{name}.mlp.fc2")
            outputs.append(x)
        return outputs

    return run


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, by its definition."""
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weight + bias
