"""Compiled code is taken from torch's cache only where the ops are the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch.compiler.config as config

import featkd.ops
from featkd.compile_cache import tell_ops_apart


def test_the_tag_is_that_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = config.cache_key_tag  # set on import
    assert own.count("featkd.ops-") == 1
    tell_ops_apart()
    assert own == config.cache_key_tag

    copy = tmp_path / "ops"
    shutil.copytree(Path(featkd.ops.__file__).parent, copy)
    monkeypatch.setattr("featkd.compile_cache.resources.files", lambda _: copy)
    monkeypatch.setattr(config, "cache_key_tag", "user")
    tell_ops_apart()
    assert "user" + own == config.cache_key_tag
    with (copy / "soft_kd.py").open("a") as source:
        source.write("\n")
    monkeypatch.setattr(config, "cache_key_tag", "user")
    tell_ops_apart()
    assert config.cache_key_tag.startswith("userfeatkd.ops-")
    assert own not in config.cache_key_tag
