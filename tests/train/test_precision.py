"""Precision that is measured, teachers with half-precision weights, unfused attention."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import pytest
import torch

from featkd.models import create_teacher
from featkd.runtime.environment import product_speedup
from featkd.train import components
from featkd.train.dryrun import forward_macs
from featkd.train.precision import cast_matmul_weights
from tests.conftest import TEACHER
from tests.train.runs import CPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_the_outputs_of_autocast(dtype):
    for name in ("vit_tiny_patch16_224", "cait_xxs24_224"):
        options = TEACHER | {"img_size": 16, "num_classes": 5}
        if name.startswith("cait"):
            options |= {"num_heads": 4}
        teacher = create_teacher(name, **options)
        cast = copy.deepcopy(teacher)
        cast_matmul_weights(cast, dtype)
        assert cast.blocks[0].mlp.fc1.weight.dtype == dtype
        assert cast.blocks[0].norm1.weight.dtype == torch.float32
        images = torch.randn(2, 3, 16, 16)
        with torch.no_grad(), torch.autocast("cpu", dtype):
            want = teacher.forward_with_features(images, [0, -1])
            got = cast.forward_with_features(images, [0, -1])
        assert torch.equal(got[0], want[0])
        assert all(torch.equal(x, y) for x, y in zip(got[1], want[1], strict=True))
        assert forward_macs(cast, 16) == forward_macs(teacher, 16) > 0


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_run_casts_its_teacher_and_says_how_slow_its_precision_is(
    recipe, monkeypatch, amp, dtype
):
    monkeypatch.setattr(
        components, "product_speedup", lambda asked, device: 0.4 if asked == dtype else 2.0
    )
    for chosen, held in (("off", torch.float32), (amp, dtype)):
        parts = components.build(replace(recipe, amp=chosen), CPU)
        assert parts.teacher_model.blocks[0].mlp.fc1.weight.dtype == held
        assert parts.student.blocks[0].mlp.fc1.weight.dtype == torch.float32
        notes = [note for note in parts.notes if note.startswith("amp:")]
        assert len(notes) == (chosen != "off")
        assert all(f"a matrix product in {amp} takes 2.5 times as long" in x for x in notes)


@pytest.mark.parametrize(("dtype", "slower"), [(torch.bfloat16, 4), (torch.float16, 1 / 4)])
def test_the_speed_of_products_is_the_ratio_of_their_times(monkeypatch, dtype, slower):
    seconds = {torch.float32: 0.01, dtype: 0.01 * slower}
    monkeypatch.setattr(torch, "mm", lambda x, y: time.sleep(seconds[x.dtype]))
    product_speedup.cache_clear()
    speedup = product_speedup(dtype, torch.device("cpu"))
    product_speedup.cache_clear()
    assert 0.5 < speedup * slower < 2  # a busy machine wakes late


def test_the_product_is_measured_once_and_outside_of_autocast(monkeypatch):
    product_speedup.cache_clear()
    dtypes = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, y: dtypes.append(mm(x, y).dtype))
    with torch.autocast("cpu", torch.bfloat16):
        first = product_speedup(torch.bfloat16, torch.device("cpu"))
    asked = len(dtypes)
    assert dtypes[:2] == [torch.float32, torch.bfloat16]
    assert product_speedup(torch.bfloat16, torch.device("cpu")) == first
    assert len(dtypes) == asked
    product_speedup.cache_clear()  # of a measurement that multiplied within a list


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
