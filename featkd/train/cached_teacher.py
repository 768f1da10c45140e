"""A run on a cache: does it fit the recipe, and what does it say of each batch?"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featkd.cache import CacheError, Manifest, Taught, TeacherCache
from featkd.cache.ahead import ReadAhead
from featkd.cache.manifest import differing, read_manifest
from featkd.data import Batch, Loader
from featkd.data.augment import AUGMENTATION_VERSION
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.remote import Location, locate
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.teacher import Shapes, resolve_pairs

_CHUNK = 1 << 22


class OpenCache:
    """What says of each batch what the student is to learn: the rows of a cache.

    Args:
        cache: that fits the recipe.
        recipe: the run.
        device: where the rows go.
        name: the file of an image, by its number.

    Raises:
        RecipeError: it lacks a layer that the loss compares.
    """

    def __init__(
        self,
        cache: TeacherCache,
        recipe: Recipe,
        device: torch.device,
        name: Callable[[int], str],
    ) -> None:
        layout = cache.manifest.layout
        held = {shape.layer: shape for shape in layout.layers}
        self.layers: tuple[int, ...] = ()
        if recipe.loss.feature is not None:
            self.layers = resolve_pairs(recipe, cache.manifest.depth, "teacher")
        lacking = sorted(set(self.layers) - set(held))
        if lacking:
            raise RecipeError(
                f"cache: {cache.folder} holds the maps of layers {sorted(held) or 'none'} of the "
                f"teacher's {cache.manifest.depth}, loss.pairs needs {lacking} too"
            )
        maps = tuple(held[layer] for layer in self.layers)
        self.shapes = Shapes(layout.classes, layout.logits_dtype, maps)
        self._folder, self._name = cache.folder, name
        self._ahead = ReadAhead(lambda keys: cache.read(keys, self.layers, device))

    def expect(self, upcoming: Iterator[Tensor]) -> None:
        """Read the rows of the coming batches, of these keys, before they are asked for."""
        self._ahead.follow(upcoming)

    def teach(self, batch: Batch) -> Taught:
        """Logits and maps of a batch, on the device.

        Raises:
            CacheError: what is stored of an image is damaged, or of another one than the batch
                shows.
        """
        taught, held = self._ahead.rows(batch.keys)
        for number in (held != batch.shown).nonzero().flatten().tolist():
            image = int(batch.keys[number, 1])
            raise CacheError(
                f"{self._folder}: its row of image {image} ({self._name(image)}) is of image "
                f"{held[number]}, this run shows {batch.shown[number]}: the file could be read in "
                "one of the two only; expected it readable in both, or in neither"
            )
        return taught


def views_of(recipe: Recipe) -> int | None:
    """Views of the recipe's cache, None without one."""
    return None if recipe.cache is None else read_manifest(Path(recipe.cache)).views


def open_cache(
    recipe: Recipe, loader: Loader, context: ProcessContext, notes: list[str]
) -> OpenCache:
    """The recipe's cache; all processes must call it.

    Raises:
        RecipeError: it is of other images, another teacher, resolution, augmentation or seed, or
            has too few views; names all that differs.
        CacheError: it is damaged or unfinished.
    """
    assert recipe.cache is not None
    check_unmixed(recipe)
    cache = TeacherCache(Path(recipe.cache), views=recipe.optim.epochs)  # more are for others
    manifest = cache.manifest
    held, asked = dict(manifest.subject), subject_of(recipe, loader, context)
    name = checkpoint_name(recipe)
    if name is not None and asked["teacher.checkpoint"] is None:
        assert recipe.teacher is not None
        if name != manifest.checkpoint:  # as likely mistyped as elsewhere
            raise RecipeError(
                f"teacher.checkpoint: there is no {recipe.teacher.checkpoint} here, and "
                f"{recipe.cache} was made of {manifest.checkpoint or 'no checkpoint'}; expected "
                "that file's name, or a file that is here"
            )
        notes.append(
            f"cache: there is no {recipe.teacher.checkpoint} here, so that it is not compared "
            f"with the checkpoint that {recipe.cache} was made of"
        )
        del held["teacher.checkpoint"], asked["teacher.checkpoint"]
    different = differing(held, asked)
    if different:
        raise RecipeError(
            f"cache: {recipe.cache} was made otherwise than this run would be: "
            f"{'; '.join(different)}"
        )
    _check_epochs(recipe, manifest, loader, context)
    top, loss = manifest.layout.logits_top, recipe.loss
    if top is not None and loss.alpha > 0 and loss.tau != 1:
        notes.append(
            f"cache: {recipe.cache} keeps {top} of {manifest.layout.classes} classes, of which "
            f"loss.tau {loss.tau:g} makes another soft loss than of all (docs/cache-sizes.md)"
        )
    return OpenCache(cache, recipe, context.device, loader.dataset.name)


def check_unmixed(recipe: Recipe) -> None:
    """Rows are of single images.

    Raises:
        RecipeError: training would mix them.
    """
    augment = recipe.data.augment
    if augment.mixes:
        raise RecipeError(
            f"data.augment.mixup, data.augment.cutmix: {augment.mixup:g} and {augment.cutmix:g}, "
            "but a cache holds what the teacher says of images by themselves; expected 0 and 0"
        )


def _check_epochs(
    recipe: Recipe, manifest: Manifest, loader: Loader, context: ProcessContext
) -> None:
    epochs = recipe.optim.epochs
    if epochs > manifest.views and recipe.cache_epochs == "error":
        raise RecipeError(
            f"cache_epochs: error, and optim.epochs is {epochs}, but {recipe.cache} holds "
            f"{manifest.views} views; expected at most as many epochs, cache_epochs: cycle, or a "
            "cache with more views"
        )
    # Processes share an epoch's positions out, and the last ones can lie past its end.
    last = len(loader) * recipe.batch_size * context.world_size
    if last > manifest.rows:
        raise RecipeError(
            f"batch_size: {recipe.batch_size} on {context.world_size} processes takes {last} "
            f"samples an epoch, {last - manifest.rows} of them a second time; the cache has "
            f"{manifest.rows} a view; expected a batch size that leaves those out"
        )


def checkpoint_name(recipe: Recipe) -> str | None:
    """Of the teacher's file, without its folder, which differs between machines."""
    if recipe.teacher is None or recipe.teacher.checkpoint is None:
        return None
    return locate(recipe.teacher.checkpoint, "teacher.checkpoint").name


def subject_of(recipe: Recipe, loader: Loader, context: ProcessContext) -> dict[str, Any]:
    """All that a cache's rows depend on, as plain values; all processes must call it."""
    teacher, data = recipe.teacher, recipe.data
    assert teacher is not None
    checkpoint = teacher.checkpoint
    found: dict[str, Any] = {
        "teacher.name": teacher.name,
        "teacher.options": teacher.options,
        "teacher.pretrained": teacher.pretrained,
        "teacher.weights": None if checkpoint is None else teacher.weights,
        "data.images": len(loader.dataset),
        "data.img_size": data.img_size,
        "data.mean": data.mean,
        "data.std": data.std,
        "data.interpolation": data.interpolation,
        "data.pixels": loader.pixels,
        "amp": recipe.amp,
        "seed": recipe.seed,
        "augmentation_version": AUGMENTATION_VERSION,
    }
    found |= {f"data.augment.{k}": v for k, v in dataclasses.asdict(data.augment).items()}
    found |= {f"versions.{k}": v for k, v in _versions(loader.pixels).items()}
    digests: dict[str, str | None] = {}
    if context.is_main:  # a million files' sizes: once a run
        digests["data.images_sha256"] = loader.dataset.fingerprint()
        digests["teacher.checkpoint"] = None
        if checkpoint is not None and (file := locate(checkpoint, "teacher.checkpoint")).is_file():
            digests["teacher.checkpoint"] = _sha256(file)
    found |= context.broadcast(digests)
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _versions(pixels: str) -> Mapping[str, str]:
    """Of what draws and computes the pixels, builds aside ("+cu130"), which machines differ in.

    Under DALI too Pillow and torchvision draw, and torch and numpy the flips and the order.
    """
    names = ("torch", "numpy", "timm", "torchvision", "pillow")
    found = {name: metadata.version(name).partition("+")[0] for name in names}
    if pixels != "timm":
        from nvidia import dali  # the wheel's name has CUDA's version in it

        found["dali"] = dali.__version__
    return found


def _sha256(file: Location) -> str:
    digest = hashlib.sha256()
    if not isinstance(file, Path):
        digest.update(file.read_bytes())
        return digest.hexdigest()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
