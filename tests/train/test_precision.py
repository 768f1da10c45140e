"""Teachers with bf16 weights, and unfused attention of students."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from featkd.models import create_teacher
from featkd.train import components
from featkd.train.dryrun import forward_macs
from featkd.train.precision import cast_matmul_weights
from tests.conftest import TEACHER
from tests.train.runs import CPU


def test_bf16_weights_give_the_outputs_of_autocast():
    for name in ("vit_tiny_patch16_224", "cait_xxs24_224"):
        options = TEACHER | {"img_size": 16, "num_classes": 5}
        if name.startswith("cait"):
            options |= {"num_heads": 4}
        teacher = create_teacher(name, **options)
        cast = copy.deepcopy(teacher)
        cast_matmul_weights(cast, torch.bfloat16)
        assert cast.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
        assert cast.blocks[0].norm1.weight.dtype == torch.float32
        images = torch.randn(2, 3, 16, 16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            want = teacher.forward_with_features(images, [0, -1])
            got = cast.forward_with_features(images, [0, -1])
        assert torch.equal(got[0], want[0])
        assert all(torch.equal(x, y) for x, y in zip(got[1], want[1], strict=True))
        assert forward_macs(cast, 16) == forward_macs(teacher, 16) > 0


def test_a_bf16_run_casts_its_teacher_and_notes_slow_bf16(recipe, monkeypatch):
    monkeypatch.setattr(components, "has_fast_bf16", lambda device: False)
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16)):
        parts = components.build(replace(recipe, amp=amp), CPU)
        assert parts.teacher_model.blocks[0].mlp.fc1.weight.dtype == dtype
        assert parts.student.blocks[0].mlp.fc1.weight.dtype == torch.float32
        slow = [note for note in parts.notes if note.startswith("amp: bf16")]
        assert len(slow) == (amp == "bf16")


@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_compiled_bf16_student_on_a_cpu_has_unfused_attention(
    recipe, monkeypatch, has_instructions
):
    monkeypatch.setattr(components, "has_fast_bf16", lambda device: has_instructions)
    for amp, compiled in (("bf16", True), ("bf16", False), ("off", True)):
        parts = components.build(replace(recipe, amp=amp, compile=compiled), CPU)
        unfused = has_instructions and amp == "bf16" and compiled
        assert {block.attn.fused_attn for block in parts.student.blocks} == {not unfused}


def test_unfused_attention_is_the_same_function(recipe, monkeypatch):
    monkeypatch.setattr(components, "has_fast_bf16", lambda device: True)
    images = torch.randn(2, 3, 16, 16)
    found = []
    for unfused in (False, True):
        student = components.build_student(recipe, 3).eval()
        if unfused:
            components.unfuse_attention(student, CPU)
        student(images).square().sum().backward()
        found.append([p.grad for p in student.parameters() if p.grad is not None])
    assert len(found[0]) > 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
