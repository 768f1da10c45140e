"""Training on a cache: compares the cache with the recipe and reads the teacher's outputs."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featkd.cache import CacheError, Manifest, TeacherCache, TeacherOutputs
from featkd.cache.ahead import ReadAhead
from featkd.cache.manifest import differing, read_manifest
from featkd.data import Batch, Loader
from featkd.data.augment import AUGMENTATION_VERSION
from featkd.models.adapters import same_values
from featkd.models.features import Layer
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.remote import Location, locate, locate_once
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.teacher import OutputShapes
from featkd.train.teacher_checks import check_cached_classifier, check_teacher, read_run
from featkd.train.teacher_images import teacher_size, teacher_statistics

_CHUNK = 1 << 22


class CachedTeacher:
    """Reads the teacher's logits and feature maps from a cache.

    Args:
        cache: a cache that fits the recipe.
        layers: layers whose feature maps are returned, in this order.
        device: device of the returned tensors.
        image_name: image number -> file name, for error messages.

    Raises:
        RecipeError: the cache does not hold one of the layers.
    """

    def __init__(
        self,
        cache: TeacherCache,
        layers: tuple[Layer, ...],
        device: torch.device,
        image_name: Callable[[int], str],
    ) -> None:
        layout = cache.manifest.layout
        stored = {shape.layer: shape for shape in layout.layers}
        self.layers = layers
        missing = [layer for layer in dict.fromkeys(layers) if layer not in stored]
        if missing:
            raise RecipeError(
                f"cache: {cache.folder} holds the maps of layers {[*stored] or 'none'} of the "
                f"teacher's {cache.manifest.depth}, the loss (loss.pairs, loss.pooled) needs "
                f"{missing} too"
            )
        maps = tuple(stored[layer] for layer in layers)
        self.shapes = OutputShapes(layout.classes, layout.logits_dtype, maps)
        self._folder, self._image_name = cache.folder, image_name
        self._ahead = ReadAhead(lambda keys: cache.read(keys, layers, device))

    def prefetch(self, upcoming: Iterator[Tensor]) -> None:
        """Reads rows ahead for the next batches, given their keys."""
        self._ahead.prefetch(upcoming)

    def outputs(self, batch: Batch) -> TeacherOutputs:
        """Reads logits and feature maps of a batch onto the device.

        Raises:
            CacheError: a row is damaged, or belongs to another image than the batch shows.
        """
        outputs, held = self._ahead.read(batch.keys)
        for number in (held != batch.source_index).nonzero().flatten().tolist():
            image = int(batch.keys[number, 1])
            raise CacheError(
                f"{self._folder}: the row of image {image} ({self._image_name(image)}) was "
                f"computed from image {held[number]}, but this run shows image "
                f"{batch.source_index[number]}: the file was readable in only one of the two; "
                "expected it to be readable in both, or in neither"
            )
        return outputs


def cache_views(recipe: Recipe) -> int | None:
    """Number of views of the recipe's cache; None without a cache."""
    return None if recipe.cache is None else read_manifest(Path(recipe.cache)).views


def open_cache(
    recipe: Recipe, loader: Loader, context: ProcessContext, notes: list[str]
) -> TeacherCache:
    """Opens the recipe's cache and compares it with the recipe; all processes must call it.

    Args:
        recipe: the run; its cache is not null.
        loader: the training loader.
        context: this process.
        notes: notes for the user are appended here.

    Raises:
        RecipeError: the cache was made with other images, another teacher, resolution,
            augmentation or seed, or has too few views; lists all differences. Or the teacher can't
            be used (see `featkd.train.teacher_checks`).
        CacheError: the cache is damaged or unfinished.
    """
    assert recipe.cache is not None
    teacher = recipe.required_teacher
    run = check_teacher(recipe, loader.classes)
    check_no_mixing(recipe)
    # Views beyond this run's epochs may still be missing.
    cache = TeacherCache(Path(recipe.cache), views=recipe.optim.epochs)
    manifest = cache.manifest
    held, asked = dict(manifest.subject), cache_subject(recipe, loader, context)
    name = checkpoint_name(recipe)
    if name is not None and asked["teacher.checkpoint"] is None:
        if name != manifest.checkpoint:  # the name may be mistyped
            raise RecipeError(
                f"teacher.checkpoint: no file {teacher.checkpoint!r}, and {recipe.cache} "
                f"was made from {manifest.checkpoint or 'no checkpoint'}; expected an existing "
                "file, or that file's name"
            )
        notes.append(
            f"cache: no file {teacher.checkpoint!r}: the teacher of {recipe.cache} was "
            "compared by file name only"
        )
        del held["teacher.checkpoint"], asked["teacher.checkpoint"]
        for field in ("teacher.mean", "teacher.std"):  # the file knows them
            if getattr(teacher, field.removeprefix("teacher.")) is None:
                held.pop(field, None)
    different = differing(held, asked)
    if different:
        raise RecipeError(
            f"cache: {recipe.cache} does not fit this run (cache's value, not the run's): "
            f"{'; '.join(different)}"
        )
    _check_epochs(recipe, manifest, loader, context)
    check_cached_classifier(recipe, run)
    top, loss = manifest.layout.logits_top, recipe.loss
    if top is not None and loss.alpha > 0 and loss.tau != 1:
        notes.append(
            f"cache: {recipe.cache} keeps {top} of {manifest.layout.classes} classes; with "
            f"loss.tau {loss.tau:g} the soft loss differs from that of all classes "
            "(docs/cache-sizes.md)"
        )
    return cache


def check_no_mixing(recipe: Recipe) -> None:
    """Checks that training mixes no images, as a cache's row belongs to a single image.

    Raises:
        RecipeError: mixup or CutMix is on.
    """
    augment = recipe.data.augment
    if augment.mixes:
        raise RecipeError(
            f"data.augment.mixup, data.augment.cutmix: {augment.mixup:g} and {augment.cutmix:g}, "
            "but a cache holds the teacher's outputs for single images; expected 0 and 0"
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
    # The epoch is padded to whole batches on all processes, with its first samples.
    last = len(loader) * recipe.batch_size * context.world_size
    if last > manifest.rows:
        raise RecipeError(
            f"batch_size: {recipe.batch_size} on {context.world_size} processes takes {last} "
            f"samples per epoch, {last - manifest.rows} of them twice, but the cache has "
            f"{manifest.rows} per view; expected a batch size that repeats none"
        )


def checkpoint_name(recipe: Recipe) -> str | None:
    """File name of the teacher's checkpoint, without its folder, which differs between machines."""
    if recipe.teacher is None or recipe.teacher.checkpoint is None:
        return None
    return locate(recipe.teacher.checkpoint, "teacher.checkpoint").name


def cache_subject(recipe: Recipe, loader: Loader, context: ProcessContext) -> dict[str, Any]:
    """Everything that a cache's rows depend on, as plain values; all processes must call it."""
    teacher, data = recipe.required_teacher, recipe.data
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
        "data.pixels": loader.decoder,
        "amp": recipe.amp,
        "seed": recipe.seed,
        # Where nothing is drawn, all versions agree, but for an image whose sides differ by one
        # pixel: its window is drawn from two.
        "augmentation_version": AUGMENTATION_VERSION if data.augment.is_random else 1,
    }
    if data.labels == "none":  # absent from the caches of earlier versions
        found["data.labels"] = data.labels
    if (size := teacher_size(recipe)) != data.img_size:
        found["teacher.img_size"] = size
    found |= {f"data.augment.{k}": v for k, v in dataclasses.asdict(data.augment).items()}
    found |= {f"versions.{k}": v for k, v in _versions(loader.decoder).items()}

    def read_files() -> dict[str, Any]:
        file, weights = None, None
        if checkpoint is not None:
            file = locate_once(checkpoint, "teacher.checkpoint")
            weights = _sha256(file) if file.is_file() else None
        statistics = teacher_statistics(recipe, read_run(file))
        # Only where they differ: older caches have no entry, as there they never did.
        other = {
            f"teacher.{name}": wanted
            for name in ("mean", "std")
            if not same_values(wanted := getattr(statistics, name), getattr(data, name))
        }
        # reads the size of every image file
        images = loader.dataset.fingerprint()
        return {"data.images_sha256": images, "teacher.checkpoint": weights, **other}

    found |= context.on_main(read_files)
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _versions(decoder: str) -> Mapping[str, str]:
    """Versions of the packages that determine the pixels, without build suffixes ("+cu130").

    With DALI too NumPy draws, timm defines RandAugment, torch resizes on the CPU, and Pillow
    decodes unusual files.
    """
    names = ("torch", "numpy", "timm", "torchvision", "pillow")
    found = {name: metadata.version(name).partition("+")[0] for name in names}
    if decoder != "timm":
        from nvidia import dali  # not by metadata: the wheel's name contains the CUDA version

        found["dali"] = dali.__version__
    return found


def _sha256(file: Location) -> str:
    digest = hashlib.sha256()
    with file.open("rb") if isinstance(file, Path) else io.BytesIO(file.read_bytes()) as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
