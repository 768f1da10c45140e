"""Unreadable and replaced images in a cache."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from featkd.cache import CacheError
from featkd.cli.main import main
from featkd.data import imageset
from featkd.train.recipe import Recipe
from featkd.train.trainer import Trainer
from tests.cache.test_build_cache import filled, words
from tests.train.runs import CPU


@pytest.fixture
def one_broken(recipe, images, tmp_path) -> tuple[Recipe, Path]:
    """A recipe that skips its one unreadable image, and the path of the image."""
    broken = tmp_path / "images"
    shutil.copytree(images, broken)
    path = broken / "train" / "green" / "3.png"
    path.write_bytes(b"no picture".ljust(path.stat().st_size))
    skip = replace(recipe.data, path=str(broken), on_bad_image="skip")
    return replace(recipe, data=skip), path


def test_a_replaced_image_keeps_its_key(one_broken, tmp_path):
    """The row of an unreadable image is computed from its replacement, in training too."""
    skip, _ = one_broken
    filled(skip, tmp_path / "cache", features="full", store="fp32")
    without = Trainer(skip, CPU)
    cached = Trainer(replace(skip, cache=str(tmp_path / "cache")), CPU)
    for one, other in zip(
        without.components.train_loader, cached.components.train_loader, strict=True
    ):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(
            without.components.teacher_outputs(one).maps[0],
            cached.components.teacher_outputs(other).maps[0],
        )
    assert without.components.train_loader.bad_images


@pytest.mark.parametrize("backend", ["timm", "dali"])
@pytest.mark.parametrize("then", ["repaired", "broken"])
def test_rows_of_other_images_than_the_batch_shows_are_refused(
    recipe, images, one_broken, tmp_path, then, backend, monkeypatch
):
    """The file is repaired or broken after the cache was made, with the same size; its content is
    not among those compared."""
    monkeypatch.setattr(imageset, "FINGERPRINT_CONTENTS", 2)
    skip, path = one_broken
    skip = replace(skip, data=replace(skip.data, backend=backend))
    good, bad = (images / "train" / "green" / "3.png").read_bytes(), path.read_bytes()
    first, second = (bad, good) if then == "repaired" else (good, bad)
    path.write_bytes(first)
    filled(skip, tmp_path / "cache")
    path.write_bytes(second)
    trainer = Trainer(replace(skip, cache=str(tmp_path / "cache")), CPU)
    held, shown = (26, 25) if then == "repaired" else (25, 26)
    message = (
        rf"image 25 \({path}\) was computed from image {held}, but this run shows image {shown}: "
    )
    with pytest.raises(CacheError, match=message):
        trainer.run(quiet=True)


def test_unreadable_images_are_named_once(recipe_file, one_broken, tmp_path, capsys):
    skip, path = one_broken
    others = ["--data.path", skip.data.path, "--data.on_bad_image", "skip"]
    assert main([*words(recipe_file, tmp_path / "cache"), *others]) == 0
    said = capsys.readouterr().err
    assert said.count(f"unreadable image, its rows are computed from the next one: {path}: ") == 1
    assert "unreadable images: 1; each of their rows" in said
