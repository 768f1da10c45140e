"""Fixtures: a tiny set of image files, and tiny recipes for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featkd.data import AugmentConfig, DataConfig
from featkd.train.recipe import (
    LossConfig,
    OptimConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    to_yaml,
)
from tests.forking import Server

CLASSES = ("blue", "green", "red")
TINY = {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
TEACHER = TINY | {"embed_dim": 24, "num_heads": 6}


@pytest.fixture(scope="session")
def compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes ptx_emulator compile into a temporary folder that the workers of a test run share."""
    worker = "PYTEST_XDIST_WORKER" in os.environ  # its folder is inside that of the run
    folder = tmp_path_factory.getbasetemp() / (".." if worker else ".") / "compiled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.resolve()))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sets one thread, which is fastest for small problems."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 12 validation images of 3 classes, 16 x 16, distinguished by color."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for channel, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 160, (16, 16, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 90
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture
def recipe(images: Path, tmp_path: Path) -> Recipe:
    """A WideLast student with a random teacher: 2 epochs of 6 updates, drop-path, EMA."""
    return Recipe(
        out=str(tmp_path / "run"),
        batch_size=8,
        student=StudentConfig(
            base="vit_tiny_patch16_224",
            arch="widelast",
            teacher_dim=24,
            options=TINY | {"drop_path_rate": 0.2},
        ),
        teacher=TeacherConfig(name="vit_tiny_patch16_224", random=True, options=dict(TEACHER)),
        loss=LossConfig(alpha=0.5, feature="spectral"),
        data=DataConfig(
            path=str(images),
            img_size=16,
            workers=0,
            augment=AugmentConfig(repeats=1, random_erasing=0.5),
        ),
        optim=OptimConfig(lr=2e-3, lr_batch=8, epochs=2, warmup_epochs=1, step_on="update"),
        ema_decay=0.9,
        amp="off",
        device="cpu",
        log_every=1,
    )


@pytest.fixture
def alone(recipe: Recipe) -> Recipe:
    """`recipe` without a teacher."""
    return replace(recipe, teacher=None, loss=LossConfig())


@pytest.fixture
def recipe_file(recipe: Recipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Server that runs commands in processes with featkd already imported."""
    server = Server(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()
