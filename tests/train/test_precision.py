"""Weights held in bf16 give autocast's own numbers, and counts of operations don't change."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from featkd.models import create_teacher
from featkd.train import components
from featkd.train.dryrun import forward_macs
from featkd.train.precision import hold_products
from tests.conftest import TEACHER
from tests.train.runs import CPU


def test_held_weights_give_autocasts_numbers():
    for name in ("vit_tiny_patch16_224", "cait_xxs24_224"):
        options = TEACHER | {"img_size": 16, "num_classes": 5}
        if name.startswith("cait"):
            options |= {"num_heads": 4}
        teacher = create_teacher(name, **options)
        held = copy.deepcopy(teacher)
        hold_products(held, torch.bfloat16)
        assert held.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
        assert held.blocks[0].norm1.weight.dtype == torch.float32
        images = torch.randn(2, 3, 16, 16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            want = teacher.forward_with_features(images, [0, -1])
            got = held.forward_with_features(images, [0, -1])
        assert torch.equal(got[0], want[0])
        assert all(torch.equal(x, y) for x, y in zip(got[1], want[1], strict=True))
        assert forward_macs(held, 16) == forward_macs(teacher, 16) > 0


def test_a_bf16_run_holds_its_teacher_and_says_where_bf16_is_slow(recipe, monkeypatch):
    monkeypatch.setattr(components, "multiplies_bf16", lambda device: False)
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16)):
        parts = components.build(replace(recipe, amp=amp), CPU)
        assert parts.teacher.blocks[0].mlp.fc1.weight.dtype == dtype
        assert parts.student.blocks[0].mlp.fc1.weight.dtype == torch.float32
        slow = [note for note in parts.notes if note.startswith("amp: bf16")]
        assert len(slow) == (amp == "bf16")


@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_compiled_bf16_student_on_a_cpu_has_its_attention_apart(
    recipe, monkeypatch, has_instructions
):
    monkeypatch.setattr(components, "multiplies_bf16", lambda device: has_instructions)
    for amp, compiled in (("bf16", True), ("bf16", False), ("off", True)):
        parts = components.build(replace(recipe, amp=amp, compile=compiled), CPU)
        apart = has_instructions and amp == "bf16" and compiled
        assert {block.attn.fused_attn for block in parts.student.blocks} == {not apart}


def test_attention_apart_is_the_same_function(recipe, monkeypatch):
    monkeypatch.setattr(components, "multiplies_bf16", lambda device: True)
    images = torch.randn(2, 3, 16, 16)
    found = []
    for apart in (False, True):
        student = components.build_student(recipe, 3).eval()
        if apart:
            components.unfuse_attention(student, CPU)
        student(images).square().sum().backward()
        found.append([p.grad for p in student.parameters() if p.grad is not None])
    assert len(found[0]) > 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
