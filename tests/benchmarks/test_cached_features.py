"""Sizes and errors of stored maps: by hand, and the command on a few images."""

from __future__ import annotations

import pytest
import torch

from featkd.benchmarks import cached_features
from featkd.cache.lowrank import compress
from featkd.data import DataConfig
from featkd.models import create_teacher
from tests.conftest import TEACHER


def falling(batch: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(batch, 20, 30, generator=generator)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return (u * 2.0 ** -torch.arange(20)) @ vh


def test_figures_by_hand():
    generator = torch.Generator().manual_seed(0)
    maps = [falling(3, generator), falling(2, generator)]
    rows = cached_features.measure(iter(maps))
    assert list(rows) == list(cached_features.forms())
    assert rows["full fp32"] == (20, 20 * 30 * 4, 0, 0, 0)
    assert rows["full bf16"][:2] == (20, 20 * 30 * 2)
    assert rows["full int8"][:2] == (20, 20 * 30 + 30 * 4)
    for energy in cached_features.ENERGIES:
        ranks = torch.cat([compress(x, energy=energy)[1] for x in maps]).double().mean().item()
        for form, size in (("fp16", 2), ("int8", 1)):
            rank, count, loss, *gradients = rows[f"energy {energy:g} {form}"]
            assert rank == pytest.approx(ranks)
            assert count == pytest.approx(ranks * ((20 + 30) * size + 2 * 4))
            assert -(1 - energy) < loss < 0.01
            for error in gradients:
                assert 0 < error < (1 - energy) ** 0.5 + 0.02


def test_other_forms_err_as_their_digits():
    maps = [torch.randn(4, 20, 30, generator=torch.Generator().manual_seed(1))]
    rows = cached_features.measure(iter(maps))
    for name, most in (("full fp16", 2**-11), ("full bf16", 2**-8), ("full int8", 2**-6)):
        assert most / 20 < rows[name][3] < most, name


def test_nothing_read():
    with pytest.raises(ValueError, match="--data: none of its images"):
        cached_features.measure(iter(()))


def test_main(images, tmp_path, monkeypatch, capsys):
    model = create_teacher("vit_tiny_patch16_224", **TEACHER, img_size=16)
    config = DataConfig(img_size=16, workers=0)
    monkeypatch.setattr(cached_features, "_model", lambda *_: (model, config, "a tiny ViT"))
    document = tmp_path / "sizes.md"
    document.write_text("<!-- bench sizes -->\n<!-- end bench sizes -->\n")
    words = ["--data", str(images / "val"), "--batch-size", "5", "--mark", "sizes"]
    cached_features.main([*words, "--out", str(document)])
    printed = capsys.readouterr().out
    assert printed.startswith("a tiny ViT; 12 images, last layer; ")
    assert len(printed.splitlines()) == 2 + len(cached_features.forms())
    size = 16 * TEACHER["embed_dim"] * 4  # bytes of a map of 4 x 4 patches in float32
    total = size * cached_features.IMAGENET / 1e9
    assert f"| {size:,.0f} | {total:.3g} GB |" in document.read_text()
    assert f"| {size // 2:,.0f} |" in document.read_text()  # bf16


def test_a_checkpoint_beside_a_run():
    with pytest.raises(ValueError, match=r"--checkpoint: got w, but best\.pt already"):
        cached_features.main(["--data", ".", "--teacher", "best.pt", "--checkpoint", "w"])
    with pytest.raises(ValueError, match="--images: expected a finite number > 0"):
        cached_features.main(["--data", ".", "--images", "0"])
