"""The DALI loader beside timm's: the same decisions, nearly the same pixels, odd files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from featkd.data import AugmentConfig, DataConfig, build_loader
from featkd.data.dali import why_not
from tests.data.conftest import MakeSet, save_noise

pytest.importorskip("nvidia.dali")
# erased boxes are likely, and so are small windows
PLAIN = AugmentConfig(rand_augment=None, random_erasing=0.5, repeats=1)


def batches(root, split, backend, **options):
    config = DataConfig(str(root), **{"img_size": 32, "augment": PLAIN, "workers": 0, **options})
    loader = build_loader(replace(config, backend=backend), split=split, batch_size=4, seed=3)
    found = list(loader)
    loader.close()
    return torch.cat([b.images for b in found]), torch.cat([b.targets for b in found])


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_close_to_timm(make_set: MakeSet, split, interpolation):
    """A wrong window, flip, box or filter would differ by tens of levels."""
    root = make_set(train=12, val=8)
    for number, path in enumerate(sorted(root.rglob("*.jpg"))):
        save_noise(path, (90 + 7 * number, 150 - 5 * number), number)
    options = {"interpolation": interpolation}
    ours, targets = batches(root, split, "dali", **options)
    theirs, expected = batches(root, split, "timm", **options)
    assert torch.equal(targets, expected)
    levels = (ours - theirs).abs().mean((1, 2, 3)) * 255 * 0.225
    assert len(ours) == (12 if split == "train" else 8)
    assert levels.max() < 0.6


def test_odd_files_are_read_as_timm_reads_them(make_set: MakeSet):
    root = make_set(train=3, val=6)
    paths = sorted((root / "val").rglob("*.jpg"))
    smooth = Image.open(paths[0]).resize((60, 50), Image.Resampling.BICUBIC)
    smooth.convert("CMYK").save(paths[0], "JPEG")
    smooth.convert("L").save(paths[1], "JPEG")
    smooth.save(paths[2], "WEBP", lossless=True)  # named .jpg
    smooth.save(paths[3], "PNG")
    grey = np.asarray(smooth.convert("L")).astype(np.uint16) * 256
    Image.fromarray(grey).save(paths[4], "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees, which timm ignores
    smooth.save(paths[5], "JPEG", exif=exif, quality=95)
    ours, _ = batches(root, "val", "dali")
    theirs, _ = batches(root, "val", "timm")
    assert len(ours) == 6
    assert ((ours - theirs).abs().mean((1, 2, 3)) * 255 * 0.225).max() < 0.7


def test_what_it_does_not_do_is_refused_or_left_to_timm(make_set: MakeSet):
    root = make_set()
    config = DataConfig(str(root), img_size=16, workers=0, backend="dali")
    with pytest.raises(ValueError, match=r'data.backend: "dali" can\'t be used: .*rand_augment'):
        build_loader(config, split="train", batch_size=4)
    jitter = AugmentConfig(rand_augment=None, color_jitter=0.3)
    assert "color_jitter" in why_not(replace(config, augment=jitter), training=True)
    assert not why_not(replace(config, augment=jitter), training=False)
    with pytest.warns(UserWarning, match="loaded by timm, not by DALI: .*rand_augment"):
        build_loader(replace(config, backend="auto"), split="train", batch_size=4, device="cuda")
    with pytest.raises(ValueError, match=r"data.backend: expected one of auto, timm, dali"):
        replace(config, backend="DALI")  # type: ignore[arg-type]
