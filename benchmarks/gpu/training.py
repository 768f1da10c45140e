"""Parts: the trainer's updates in every precision and mode; cache, distill --cache, diagnose."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

import featkd
from featkd.cache import CacheConfig
from featkd.data import AugmentConfig, DataConfig
from featkd.diagnostics import DiagnoseConfig, Settings, diagnose
from featkd.runtime.distributed import ProcessContext
from featkd.train.build_cache import build_cache
from featkd.train.recipe import LossConfig, OptimConfig, Recipe, StudentConfig, TeacherConfig
from featkd.train.trainer import Trainer

from .recorder import Figure, Recorder

_QUIET = 6  # first updates, which may wait: for compilation and the recording of CUDA graphs
_CLASSES = 3
_OPS = {"lift": "lift_head", "widelast": "widelast_projection"}


@dataclass(frozen=True)
class Size:
    """Sizes of images, models and runs."""

    pixels: int
    student: dict[str, Any]
    teacher: dict[str, Any]
    batch: int
    updates: int


_GPU = Size(
    112,  # a 7 x 7 grid
    {"patch_size": 16, "embed_dim": 192, "depth": 3, "num_heads": 3},
    {"patch_size": 16, "embed_dim": 384, "depth": 3, "num_heads": 6},
    batch=32,
    updates=30,
)
_CPU = Size(
    16,
    {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3},
    {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3},
    batch=4,
    updates=2,
)


def updates(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """Runs 30 updates of a Lift and a WideLast student in each precision and mode."""
    small = device.type == "cpu"
    amps: tuple[Literal["off", "bf16", "fp16"], ...] = ("off",) if small else ("bf16", "fp16")
    modes = ("off",) if small else ("off", "default", "reduce-overhead")
    items = {}
    with images(_size(device)) as folder:
        for arch, amp, mode in product(_OPS, amps, modes):
            recipe = recipe_for(folder, arch, device)
            recipe.amp = amp
            recipe.compile = mode != "off"
            recipe.compile_mode = "reduce-overhead" if mode == "reduce-overhead" else "default"
            items[f"{arch}/{amp}/compile-{mode}"] = partial(_updates, recipe, device)
        recorder.run_share(items, shard, shards)


def tools(recorder: Recorder, device: torch.device, shard: int, shards: int) -> None:
    """Runs the cache, a run from it, a whole run, and diagnostics, all with random weights."""
    with images(_size(device)) as folder:
        items = {
            "cache and distill --cache": partial(_cached, folder, device),
            "distill, evaluate, resume": partial(_whole, folder, device),
            "diagnose": partial(_diagnose, folder, device),
        }
        recorder.run_share(items, shard, shards)


def _size(device: torch.device) -> Size:
    return _CPU if device.type == "cpu" else _GPU


def _context(device: torch.device) -> ProcessContext:
    return ProcessContext(0, 1, torch.device("cuda", 0) if device.type == "cuda" else device)


@contextmanager
def images(size: Size) -> Iterator[Path]:
    """Generates a folder of JPEGs, for each class 40 to train and 8 to validate."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="featkd-gpu-") as name:
        root = Path(name)
        for split, each in (("train", 40), ("val", 8)):
            for label in range(_CLASSES):
                folder = root / "images" / split / f"class{label}"
                folder.mkdir(parents=True)
                for number in range(each):
                    pixels = rng.integers(0, 160, (size.pixels, size.pixels, 3), dtype=np.uint8)
                    pixels[..., label] += 90
                    Image.fromarray(pixels).save(folder / f"{number}.jpg")
        yield root


def recipe_for(folder: Path, arch: Any, device: torch.device) -> Recipe:
    """Returns a recipe with soft labels, a feature loss, and augmentation that is fast."""
    size = _size(device)
    model = "vit_tiny_patch16_224"
    metric: Literal["mse", "spectral"] = "spectral" if arch == "widelast" else "mse"
    return Recipe(
        out=str(folder / f"run-{arch}"),
        batch_size=size.batch,
        student=StudentConfig(model, arch, size.teacher["embed_dim"], options=dict(size.student)),
        teacher=TeacherConfig(model, random=True, options=dict(size.teacher)),
        loss=LossConfig(alpha=0.5, feature=metric),
        data=DataConfig(
            path=str(folder / "images"),
            img_size=size.pixels,
            workers=0,
            backend="timm",
            augment=AugmentConfig(rand_augment=None, repeats=1),
        ),
        optim=OptimConfig(lr=1e-3, lr_batch=size.batch, epochs=2, warmup_epochs=0),
        ema_decay=0.9,
        amp="off",
        device=str(_context(device).device),
        log_every=10,
    )


def _updates(recipe: Recipe, device: torch.device) -> list[Figure]:
    """Runs the updates; from the seventh on neither they nor their batches may wait for the GPU."""
    torch.compiler.reset()
    cuda = device.type == "cuda"
    trainer = Trainer(recipe, _context(device))
    size = _size(device)
    try:
        trainer.components.student.train()
        totals, seconds = [], []
        batches = chain.from_iterable(map(trainer.batches, count()))
        for number in range(size.updates):
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error" if number >= _QUIET else "default")
            try:
                batch = next(batches)
                started = time.perf_counter()
                terms = trainer.step([batch])
            finally:
                if cuda:
                    torch.cuda.set_sync_debug_mode("default")
            totals.append(float(terms.total.detach()))
            seconds.append(time.perf_counter() - started)
    finally:
        trainer.components.close()
    assert len(totals) == size.updates
    assert all(np.isfinite(totals)), f"losses {totals}"
    if cuda:
        for op in (_OPS[recipe.student.arch], "soft_kd"):
            assert featkd.last_backend(op) == "triton", f"{op} ran on {featkd.last_backend(op)}"
        first, last = np.mean(totals[:5]), np.mean(totals[-5:])
        assert last < first, f"the loss went from {first:.3f} to {last:.3f}"
    median = float(np.median(seconds[_QUIET:] or seconds))
    return [
        ("featkd", "update", "ms", 1e3 * median),
        ("featkd", "images_per_s", "images/s", recipe.batch_size / median),
        ("featkd", "first_loss", "1", totals[0]),
        ("featkd", "last_loss", "1", totals[-1]),
    ]


def _cached(folder: Path, device: torch.device) -> None:
    recipe = recipe_for(folder, "widelast", device)
    context = _context(device)
    for features in ("full",) if device.type == "cpu" else ("full", "lowrank"):
        cache = folder / f"cache-{features}"
        config = CacheConfig(views=2, features=features)  # type: ignore[arg-type]
        built = build_cache(recipe, config, context, cache, quiet=True)
        assert built.written > 0
        run = replace(recipe, cache=str(cache), out=str(folder / f"run-{features}"))
        outcome = Trainer(run, context).run("never", quiet=True)
        _check_outcome(outcome, run, device)


def _whole(folder: Path, device: torch.device) -> None:
    recipe = recipe_for(folder, "lift", device)
    half = replace(recipe, optim=replace(recipe.optim, epochs=1))
    Trainer(half, _context(device)).run("never", quiet=True)
    outcome = Trainer(recipe, _context(device)).run("auto", quiet=True)
    _check_outcome(outcome, recipe, device)


def _check_outcome(outcome: Any, recipe: Recipe, device: torch.device) -> None:
    expected = recipe.optim.epochs * (40 * _CLASSES // _size(device).batch)
    assert outcome.updates == expected, f"{outcome.updates} updates, expected {expected}"
    for weights, scores in outcome.scores.items():
        assert all(np.isfinite(list(scores.values()))), f"{weights}: {scores}"


def _diagnose(folder: Path, device: torch.device) -> None:
    size = _size(device)
    config = DiagnoseConfig(
        student="vit_tiny_patch16_224",
        student_options=dict(size.student),
        teacher="vit_tiny_patch16_224",
        teacher_options=dict(size.teacher),
        data=str(folder / "images"),
        out=str(folder / "diagnostics"),
        images=24,
        batch_size=8,
        img_size=size.pixels,
        workers=0,
        device=device.type,
        settings=Settings(sample=8, permuted=4, permutations=4),
    )
    found = diagnose(config)
    assert found.images == 24
    assert {layer.model for layer in found.layers} == {"student", "teacher"}
