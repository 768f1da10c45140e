"""Tries one teacher of every family of timm: maps, three updates of a Lift student, a cache.

    python -m featkd.benchmarks.any_teacher [NAME ...]

Weights are random and the models small where timm allows it. Each row compares the losses of a run
whose teacher runs with those of a run that reads a float32 cache.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from featkd.benchmarks.table import aligned
from featkd.cache import CacheConfig
from featkd.data import AugmentConfig, DataConfig
from featkd.models import create_teacher
from featkd.runtime.distributed import ProcessContext
from featkd.train.build_cache import build_cache
from featkd.train.recipe import LossConfig, OptimConfig, Recipe, StudentConfig, TeacherConfig
from featkd.train.trainer import Trainer

_SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
_STAGES = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
# timm's arguments that make a model small, and the images' size if it isn't 64 pixels
FAMILIES: dict[str, dict[str, Any]] = {
    "vit_small_patch14_dinov2": {**_SMALL, "img_size": 56},
    "vit_small_patch14_reg4_dinov2": {**_SMALL, "img_size": 56},
    "vit_small_patch16_dinov3": _SMALL,
    "eva02_tiny_patch14_224": {**_SMALL, "img_size": 56},
    "vit_pe_core_tiny_patch16_384": _SMALL,
    "vit_base_patch16_siglip_224": _SMALL,
    "vit_base_patch32_clip_224": _SMALL,
    "beit_base_patch16_224": _SMALL,
    "beitv2_base_patch16_224": _SMALL,
    "swinv2_tiny_window8_256": {**_STAGES, "window_size": 2},
    "hiera_tiny_224": {},
    "convnext_atto": {},
    "convnextv2_atto": {},
    "resnet18": {},
    "mobilenetv4_conv_small": {},
    "xcit_nano_12_p16_224": {"depth": 2},
    "davit_tiny": {"depths": (1, 1, 1, 1)},
    "fastvit_t8": {},
    "maxvit_rmlp_pico_rw_256": {},
    "naflexvit_base_patch16_gap": _SMALL,
    "efficientvit_b0": {},
    "tiny_vit_5m_224": {},
    "mvitv2_tiny": {},
    "pvt_v2_b0": {},
    "cait_xxs24_224": {"depth": 2},
    "aimv2_large_patch14_224": {**_SMALL, "img_size": 56},
    "regnetx_002": {},
    "levit_128s": {},
    "focalnet_tiny_srf": {},
    "crossvit_tiny_240": {"img_size": 240},
    "coatnet_pico_rw_224": {},
    "repvit_m0_9": {},
    "volo_d1_224": {},
    "nextvit_small": {},
    "twins_pcpvt_small": {},
    "swin_tiny_patch4_window7_224": {**_STAGES, "window_size": 2},
    "deit_tiny_patch16_224": _SMALL,
}
_CPU = ProcessContext(0, 1, torch.device("cpu"))


def _make_images(folder: Path) -> None:
    """24 training and 8 validation images of noise, of two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (72, 72, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


def _recipe(name: str, images: Path, out: Path) -> Recipe:
    """A Lift student with patches of 16 for the last map of a teacher with random weights."""
    options = dict(FAMILIES[name])
    size = options.pop("img_size", 64)
    model: Any = create_teacher(name, img_size=size, num_classes=2, **options)
    (last,) = model.forward_maps(torch.zeros(1, 3, size, size), [-1])
    student = {**_SMALL, "patch_size": 16}
    return Recipe(
        out=str(out),
        batch_size=8,
        student=StudentConfig("vit_tiny_patch16_224", "lift", last.shape[2], options=student),
        teacher=TeacherConfig(name, random=True, img_size=size, options=options),
        loss=LossConfig(alpha=0.5, feature="mse"),
        data=DataConfig(
            path=str(images), img_size=64, workers=0, augment=AugmentConfig(rand_augment=None)
        ),
        optim=OptimConfig(lr=1e-3, lr_batch=8, epochs=1, warmup_epochs=0),
        amp="off",
        device="cpu",
    )


def _losses(recipe: Recipe) -> tuple[list[float], Trainer]:
    """Losses of three updates."""
    trainer = Trainer(recipe, _CPU)
    try:
        trainer.components.student.train()
        losses = [trainer.step([batch]).total.item() for batch in trainer.batches(0)]
    finally:
        trainer.components.close()
    return losses, trainer


def try_family(name: str, folder: Path) -> tuple[str, ...]:
    """Returns a row of the table for one model."""
    recipe = _recipe(name, folder / "images", folder / name)
    losses, trainer = _losses(recipe)
    model: Any = trainer.components.teacher_model
    assert recipe.teacher is not None
    size = recipe.teacher.img_size or 0
    (raw,) = model.forward_maps(torch.zeros(1, 3, size, size), [-1])
    side = round(raw.shape[1] ** 0.5)
    cache = folder / name / "cache"
    build_cache(recipe, CacheConfig(store="fp32"), _CPU, cache, quiet=True)
    cached, _ = _losses(replace(recipe, cache=str(cache)))
    difference = max(abs(a - b) for a, b in zip(losses, cached, strict=True))
    kind = type(model).__name__.removeprefix("Feature")
    words = f"{losses[0]:.4f}, {losses[-1]:.4f}"
    grid = f"{side} x {side} at {size}"
    return name, kind, grid, str(raw.shape[2]), words, f"{difference:.1e}"


def main(names: Sequence[str]) -> int:
    """Prints the table; returns the number of models that failed."""
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        _make_images(Path(folder) / "images")
        for name in names or FAMILIES:
            try:
                rows.append(try_family(name, Path(folder)))
            except Exception as error:
                failed += 1
                rows.append((name, f"{type(error).__name__}: {error}", "", "", "", ""))
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    head = ("teacher", "class", "grid", "channels", "losses 1, 3", "cached minus not")
    print(aligned(head, rows))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
