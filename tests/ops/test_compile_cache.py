"""torch's compile cache is used only if the sources of the ops are unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch.compiler.config as config

import featkd
from featkd.ops.compile_cache import tag_compile_cache


def test_cache_tag_depends_on_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = config.cache_key_tag  # set on import
    assert own.count("featkd.ops-") == 1
    tag_compile_cache()
    assert own == config.cache_key_tag

    copy = tmp_path / "featkd"
    shutil.copytree(
        Path(featkd.__file__).parent,
        copy,
        ignore=lambda _, names: {*names} & {"kernels", "_csrc.so"},
    )
    monkeypatch.setattr("featkd.ops.compile_cache.resources.files", lambda _: copy)
    with config.patch(cache_key_tag="user"):
        tag_compile_cache()
        assert "user" + own == config.cache_key_tag
    with (copy / "ops" / "soft_kd.py").open("a") as source:
        source.write("\n")
    with config.patch(cache_key_tag="user"):
        tag_compile_cache()
        assert config.cache_key_tag.startswith("userfeatkd.ops-")
        assert own not in config.cache_key_tag
