"""Weight files: all layouts, and no execution of pickled code."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from featkd.models import CheckpointMismatch, read_state_dict
from featkd.models.weights import load_strictly

LAST = {"a.weight": torch.zeros(2, 3), "b.bias": torch.zeros(4)}
AVERAGED = {name: value + 1 for name, value in LAST.items()}


def saved(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    return path


def same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return list(got) == list(wanted) and all(torch.equal(got[n], wanted[n]) for n in wanted)


def pair(last: str, averaged: str) -> dict[str, Any]:
    return {"epoch": 3, last: LAST, averaged: AVERAGED, "optimizer": {"lr": 0.1}}


PAIRS = [pair("model", "model_ema"), pair("state_dict", "state_dict_ema")]
PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "module.module.")
MIXED = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
DEIT_ARGUMENTS = argparse.Namespace(lr=5e-4, model="deit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("content", "weights", "wanted"),
    [
        (LAST, "auto", LAST),
        (LAST, "model", LAST),
        *((both, "auto", AVERAGED) for both in PAIRS),
        *((both, "model_ema", AVERAGED) for both in PAIRS),
        *((both, "model", LAST) for both in PAIRS),
        ({"epoch": 3, "model": LAST, "model_ema": None}, "auto", LAST),
        ({"epoch": 3, "state_dict": LAST, "state_dict_ema": None}, "auto", LAST),
        ({"model": LAST, "args": DEIT_ARGUMENTS}, "auto", LAST),
        *(({"model": {f"{p}{n}": x for n, x in LAST.items()}}, "auto", LAST) for p in PREFIXES),
        (MIXED, "auto", MIXED),  # a prefix on some names only is kept
    ],
)
def test_files_of_torch(tmp_path, content, weights, wanted):
    path = saved(tmp_path, content)
    for name in (path, str(path)):
        assert same(read_state_dict(name, weights), wanted)


def test_safetensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(AVERAGED, path)
    assert same(read_state_dict(path), AVERAGED)


class _Harmful:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_run(tmp_path, zipped):
    victim = tmp_path / "made by the file"
    path = tmp_path / "harmful.pth"
    content = {"model": LAST, "args": _Harmful(victim)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"checkpoint: .*harmful\.pth is not a weight file, or"):
        read_state_dict(path)
    assert not victim.exists()


@pytest.mark.parametrize("name", ["damaged.pth", "damaged.safetensors"])
def test_damaged_file_raises(tmp_path, name):
    path = tmp_path / name
    for content in (b"", b"nothing like a weight file" * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"checkpoint: .*{name} is "):
            read_state_dict(path)
    torch.save({"model": {"a": torch.randn(1000)}}, path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match=rf"checkpoint: .*{name} is "):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "weights", "message"),
    [
        ([torch.zeros(1)], "auto", "holds a list, expected a dict of tensors"),
        ({}, "auto", "holds no tensor"),
        ({"model": {}}, "auto", "holds no tensor"),
        ({"a": torch.zeros(1), "epoch": 3}, "auto", "holds more than tensors: epoch"),
        ({"model": LAST, "best": np.array([1.0])}, "auto", "save its state dict alone"),
        ({"model": LAST, "model_ema": None}, "model_ema", "'model_ema' is not in .* holds model$"),
        ({"state_dict": LAST}, "model_ema", "'model_ema' is not in .* holds state_dict$"),
        ({"model_ema": AVERAGED}, "model", "weights: 'model' is not in .* holds model_ema"),
        (LAST, "model_ema", "'model_ema' is not in .* holds a plain state dict"),
        (LAST, "ema", "weights: expected one of .*, got 'ema'"),
    ],
)
def test_files_without_these_weights_raise(tmp_path, content, weights, message):
    with pytest.raises(ValueError, match=message):
        read_state_dict(saved(tmp_path, content), weights)


def test_missing_file_raises(tmp_path):
    for name in ("none.pth", "none.safetensors"):
        with pytest.raises(FileNotFoundError):
            read_state_dict(tmp_path / name)


def test_mismatch_raises_and_leaves_model_unchanged():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    del state["0.bias"]
    state["2.bias"] = torch.zeros(1)
    state["1.weight"] = torch.zeros(4, 4)
    with pytest.raises(CheckpointMismatch) as caught:
        load_strictly(model, state, "x.pth", "net")
    assert str(caught.value) == (
        "checkpoint: x.pth does not fit net; 1 missing: 0.bias; 1 unexpected: 2.bias; "
        "1 of another shape: 1.weight (4, 4) instead of (4, 3)"
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_long_name_lists_are_shortened():
    state = {f"odd.{index}": torch.zeros(1) for index in range(25)}
    with pytest.raises(CheckpointMismatch, match=r"25 unexpected: odd\.0, .*odd\.2, and 22"):
        load_strictly(nn.Linear(1, 1), state, "x.pth", "net")
