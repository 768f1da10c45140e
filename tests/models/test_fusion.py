"""Fused ops replace only unchanged modules without hooks."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize

import featkd
from featkd.models import create_student
from featkd.ops import backends

OPS = {"lift": "lift_head", "widelast": "widelast_projection"}
MODULES = {
    "lift": ("projection", "projection_norm"),
    "widelast": ("proj_in", "proj_norm", "norm1"),
}
CASES = [(arch, name) for arch, names in MODULES.items() for name in names]


class Entry:
    """A student, and the submodule whose layers a fused op replaces."""

    def __init__(self, arch: str, tiny: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.model: Any = create_student("deit_tiny_patch16_224", arch, 96, **tiny).eval()
        self.owner = self.model if arch == "lift" else self.model.blocks[-1]
        self.op = OPS[arch]
        self.linear, *self.norms = MODULES[arch]
        self.images = torch.randn(2, 3, 32, 32)

    def fused(self, call: Callable[[Tensor], object] | None = None) -> bool:
        """Checks whether a forward pass runs the op."""
        vars(backends._last).clear()
        with torch.no_grad():
            (self.model if call is None else call)(self.images)
        return featkd.last_backend(self.op) is not None


@pytest.fixture
def entry(arch: str, tiny: dict[str, Any]) -> Entry:
    return Entry(arch, tiny)


class Adapter(nn.Module):
    """Wraps a layer like LoRA: the same attributes, another output."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x.mean(-1, keepdim=True)


def adapted(entry: Entry) -> None:
    setattr(entry.owner, entry.linear, Adapter(getattr(entry.owner, entry.linear)))


def quantised(entry: Entry) -> None:
    """Dynamic quantisation, which makes `weight` a method."""
    whole = nn.Sequential(getattr(entry.owner, entry.linear))
    changed = torch.ao.quantization.quantize_dynamic(whole, {nn.Linear}, dtype=torch.qint8)
    setattr(entry.owner, entry.linear, changed[0])


def with_bias(entry: Entry) -> None:
    linear = getattr(entry.owner, entry.linear)
    linear.bias = nn.Parameter(torch.randn(linear.out_features))


def parametrised(entry: Entry) -> None:
    linear = getattr(entry.owner, entry.linear)
    parametrize.register_parametrization(linear, "weight", nn.Identity())


def root_mean_square(entry: Entry) -> None:
    setattr(entry.owner, entry.norms[-1], nn.RMSNorm(96))


def without_shift(entry: Entry) -> None:
    setattr(entry.owner, entry.norms[-1], nn.LayerNorm(96, bias=False))


def over_tokens_too(entry: Entry) -> None:
    tokens = 16 if entry.op == "lift_head" else 17
    setattr(entry.owner, entry.norms[-1], nn.LayerNorm((tokens, 96), eps=1e-6))


def another_forward(entry: Entry) -> None:
    """Replaces `forward` of an instance, as accelerate does."""
    norm = getattr(entry.owner, entry.norms[0])
    norm.forward = MethodType(lambda self, x: 2 * type(self).forward(self, x), norm)


CHANGES = [
    *(adapted, quantised, with_bias, parametrised),
    *(root_mean_square, without_shift, over_tokens_too, another_forward),
]


@pytest.mark.parametrize("arch", OPS)
def test_plain_modules_are_fused(entry):
    assert entry.fused()
    assert entry.fused(torch.compile(entry.model, backend="eager", fullgraph=True))


@pytest.mark.filterwarnings("ignore:.*quanti")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("arch", OPS)
def test_changed_modules_are_called(entry, change):
    change(entry)
    given: dict[str, Tensor] = {}
    for name in (entry.linear, *entry.norms):
        module = getattr(entry.owner, name)
        module.register_forward_hook(lambda _m, _i, y, name=name: given.update({name: y}))
    logits, (last,) = entry.model.forward_with_features(entry.images, [-1])
    expected = given.copy()
    for name in (entry.linear, *entry.norms):  # without hooks, the change alone must prevent fusion
        getattr(entry.owner, name)._forward_hooks.clear()
    assert not entry.fused()
    torch.testing.assert_close(entry.model(entry.images), logits)
    again, (map_again,) = entry.model.forward_with_features(entry.images, [-1])
    torch.testing.assert_close(again, logits)
    torch.testing.assert_close(map_again, last)
    if entry.op == "lift_head":
        torch.testing.assert_close(last, expected["projection_norm"])
        torch.testing.assert_close(entry.model.forward_head(last), logits)


@pytest.mark.parametrize("arch", ["widelast"])
def test_norms_with_different_eps_are_not_fused(entry):
    entry.owner.norm1.eps = 1e-2
    assert not entry.fused()


@pytest.mark.parametrize(("arch", "name"), CASES)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_module_hooks_run(entry, name, kind):
    seen: list[object] = []
    module = getattr(entry.owner, name)
    handle = getattr(module, f"register_{kind}_hook")(lambda m, *_: seen.append(m))
    for forward in (entry.model, lambda x: entry.model.forward_with_features(x, [-1])[0]):
        seen.clear()
        forward(entry.images).sum().backward()
        assert seen == [module]
    handle.remove()
    assert entry.fused()


@pytest.mark.parametrize("arch", OPS)
@pytest.mark.parametrize(
    "register", [register_module_forward_hook, register_module_forward_pre_hook]
)
def test_global_hooks_run(entry, register):
    seen: list[object] = []
    handle = register(lambda m, *_: seen.append(m))
    try:
        assert not entry.fused()
    finally:
        handle.remove()
    for name in (entry.linear, *entry.norms):
        assert sum(m is getattr(entry.owner, name) for m in seen) == 1
    assert entry.fused()
