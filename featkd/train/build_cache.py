"""`featkd cache`: stores the teacher's outputs for the samples of some epochs."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn
from tqdm import tqdm

from featkd.cache import CacheConfig, CacheWriter, Manifest
from featkd.cache.background import BackgroundWriter
from featkd.cache.estimate import CacheSize, estimate_size
from featkd.cache.rows import TeacherOutputs
from featkd.cache.writer import lock_folder, prepare_folder
from featkd.data import Batch, EpochSampler, ImageSet, Loader
from featkd.data.factory import build_loader_for
from featkd.data.sampler import RangeSampler
from featkd.models.features import POOLED, Layer, num_layers
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.interrupt import Interrupt
from featkd.runtime.names import printable_lines
from featkd.train.cached_teacher import cache_subject, check_no_mixing, checkpoint_name
from featkd.train.layer_pairs import check_fit, resized_maps, resolve_layer_pairs
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.student import build_student, classes_of, count_classes
from featkd.train.teacher import (
    OutputShapes,
    Teacher,
    begin_graph_step,
    create_teacher_model,
    output_shapes,
)

Found = TypeVar("Found")


class CacheBuild(NamedTuple):
    """Result of `build_cache`.

    Attributes:
        manifest: the manifest in the folder.
        written: shards written, by all processes.
        damaged: shards that were there but damaged, and are written again.
        bad_files: unreadable images: path -> cause.
        interrupted_by: the signal that ended the command early, if any.
        size: estimated size of the cache.
    """

    manifest: Manifest
    written: int
    damaged: int
    bad_files: dict[str, str]
    interrupted_by: int | None
    size: CacheSize


def build_cache(
    recipe: Recipe,
    config: CacheConfig,
    context: ProcessContext,
    folder: Path,
    *,
    quiet: bool = False,
    show_notes: bool = True,
    strict_classes: bool = True,
    dry_run: bool = False,
) -> CacheBuild:
    """Writes the missing shards of a cache; all processes must call it.

    The teacher runs on the batches of a run with one process. Neither the number of processes nor
    an interruption therefore changes a byte of the cache.

    Args:
        recipe: the run that will read the cache.
        config: what to store.
        context: this process.
        folder: folder of the cache; created if missing.
        quiet: print nothing.
        show_notes: print the notes on the recipe and the cache's size.
        strict_classes: refuse a student with more outputs than there are class folders.
        dry_run: run the teacher on the first batch only, to estimate the size; write nothing.

    Raises:
        RecipeError, ValueError: a field or argument can't be used.
        CacheError: the folder holds something else, another process writes to it, the disk is
            full, or an output can't be stored.
        featkd.data.BadImageError: an unreadable image under on_bad_image="error".
    """
    if recipe.teacher is None:
        raise RecipeError("teacher: null; expected the teacher whose outputs are to be stored")
    check_no_mixing(recipe)
    config = config.resolved(recipe.loss.feature is not None)
    dataset = ImageSet(recipe.data, "train", recipe.seed)
    repeats = recipe.data.augment.repeats
    sampler = RangeSampler(len(dataset), repeats=repeats, seed=recipe.seed)
    loader = build_loader_for(dataset, sampler, batch_size=recipe.batch_size, device=context.device)
    notes: list[str] = []
    try:
        classes = count_classes(recipe, dataset.classes, notes, strict=strict_classes)
        source = create_teacher_model(recipe, classes, dataset.classes, context, notes)
        model = source.model
        classes = classes_of(source) if classes is None else classes
        student = build_student(recipe, classes).to(context.device)
        stores_maps = config.features != "none"
        compared, stored = (
            resolve_layer_pairs(recipe, num_layers(student), num_layers(model), maps=maps)
            for maps in (recipe.loss.feature is not None, stores_maps)
        )
        # A recipe that can't be trained is refused before the teacher runs, whatever is stored.
        pairs = stored if stores_maps else compared
        shapes = output_shapes("teacher", model, pairs.teacher, recipe, context)
        own = output_shapes("student", student, pairs.student, recipe, context)
        shapes = shapes._replace(maps=resized_maps(own.maps, shapes.maps, notes))
        _check_grids(shapes)
        fitted = shapes.of(compared.teacher)
        check_fit(recipe, num_layers(student), own.of(compared.student), fitted, notes)
        del student
        layers = sorted({*stored.teacher}, key=lambda layer: (layer == POOLED, layer))
        teacher = Teacher(source, recipe, context, logits=True, shapes=shapes.of(layers))
        manifest = Manifest(
            subject=cache_subject(recipe, loader, context),
            weights=_weights_sha256(cast(nn.Module, model)),
            depth=num_layers(model),
            layout=config.layout(*teacher.shapes),
            rows=len(EpochSampler(len(dataset), training=True, repeats=repeats)),
            shard_rows=-(-config.shard_rows // recipe.batch_size) * recipe.batch_size,
            batch_size=recipe.batch_size,
            views=config.views,
            checkpoint=checkpoint_name(recipe),
        )
        if dry_run:
            sampler.set_ranges(0, [range(min(recipe.batch_size, manifest.rows))])
            batch = next(iter(loader))
            size = estimate_size(manifest, teacher.outputs(batch))
            return CacheBuild(manifest, 0, 0, dict(loader.bad_images), None, size)
        size = estimate_size(manifest)
        notes.append(f"size of the cache: {size.describe(folder)}")
        with ExitStack() as lock, Interrupt() as interrupt:

            def prepare() -> Manifest:
                lock.enter_context(lock_folder(folder))
                return prepare_folder(folder, manifest)

            manifest = context.on_main(prepare)
            writer = CacheWriter(folder, manifest)
            total, hidden = manifest.views * manifest.rows, quiet or not context.is_main
            # None: no bar unless stderr is a terminal
            with tqdm(total=total, unit="image", disable=True if hidden else None) as bar:

                def say(message: str) -> None:
                    if not quiet:
                        bar.write(printable_lines(message), file=sys.stderr)

                for note in notes if context.is_main and show_notes else ():
                    say(note)
                build = _Build(writer, teacher, loader, sampler, context, interrupt, bar, say)
                with closing(build.background):
                    signals = (build.write_view(view) for view in range(manifest.views))
                    stopped_by = next((signal for signal in signals if signal is not None), None)
                    build.background.flush()
            written = sum(_gather([build.background.written], context))
            bad_files = context.merge_dicts(build.bad_files)
    finally:
        loader.close()
    return CacheBuild(manifest, written, build.damaged, bad_files, stopped_by, size)


def _check_grids(teacher: OutputShapes) -> None:
    """Checks that all student maps that a teacher layer is compared with have one grid.

    Args:
        teacher: the teacher's maps, one per layer pair, resized to the grid of the student's.

    Raises:
        RecipeError: they have several.
    """
    found: dict[Layer, int] = {}
    for shape in teacher.maps:
        if found.setdefault(shape.layer, shape.tokens) != shape.tokens:
            raise RecipeError(
                f"loss.pairs: teacher layer {shape.layer} is compared with student maps of "
                f"{found[shape.layer]} and of {shape.tokens} tokens, but a cache stores it once; "
                "expected one grid per teacher layer, or a run without a cache"
            )


@dataclass
class _Build:
    """Runs batches through the teacher and writes shards."""

    writer: CacheWriter
    teacher: Teacher
    loader: Loader
    sampler: RangeSampler
    context: ProcessContext
    interrupt: Interrupt
    bar: Any
    say: Callable[[str], None]
    damaged: int = 0  # found by all processes
    bad_files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.background = BackgroundWriter(self.writer, self.context.device)

    def write_view(self, view: int) -> int | None:
        """Writes the missing shards of a view; returns the signal that stopped it, if any.

        The processes take the missing shards in turns and synchronise before each. None waits for
        long, and a signal to one of them stops all.
        """
        rank, world_size = self.context.rank, self.context.world_size
        missing = self._missing(view)
        ranges = [self.writer.manifest.positions(shard) for shard in missing]
        self.bar.update(self.writer.manifest.rows - sum(map(len, ranges)))
        self.sampler.set_ranges(view, own := ranges[rank::world_size])
        batches = iter(self.loader) if own else iter(())
        for first in range(0, len(missing), world_size):
            if (stopped_by := self.interrupt.stop_signal(self.context.any_true)) is not None:
                return stopped_by
            turn = range(first, min(first + world_size, len(missing)))
            if first + rank in turn:
                self._write_shard(view, missing[first + rank], batches)
            self.bar.update(sum(len(ranges[i]) for i in turn if i != first + rank))
        return self.interrupt.stop_signal(self.context.any_true)

    def _missing(self, view: int) -> list[int]:
        """Missing or damaged shards of a view; each process checks a part of the view."""
        context = self.context
        part = range(context.rank, self.writer.manifest.shards, context.world_size)
        known = len(self.writer.damaged)
        checked = zip(part, self.writer.intact(view, part), strict=True)
        unstopped = takewhile(lambda _: self.interrupt.signal is None, checked)
        missing = [shard for shard, intact in unstopped if not intact]
        damaged = _gather(self.writer.damaged[known:], context)
        for message in damaged:
            if context.is_main:
                self.say(message)
        self.damaged += len(damaged)
        return sorted(_gather(missing, context))

    def _write_shard(self, view: int, shard: int, batches: Iterator[Batch]) -> None:
        """Writes a shard from the next batches; after a signal, no further batch begins."""
        manifest = self.writer.manifest
        for batch in islice(batches, -(-len(manifest.positions(shard)) // manifest.batch_size)):
            if self.interrupt.signal is not None:
                return
            self.background.add(batch.keys, batch.source_index, self._outputs(batch))
            self.bar.update(len(batch.keys))
            for path, cause in self.loader.bad_images.items():
                if path not in self.bad_files:
                    self.bad_files[path] = cause
                    text = "unreadable image, its rows are computed from the next one"
                    self.say(f"{text}: {path}: {cause}")
        self.background.end_shard(view, shard)

    def _outputs(self, batch: Batch) -> TeacherOutputs:
        begin_graph_step(self.context.device)
        logits, maps = self.teacher.outputs(batch)
        assert logits is not None
        if batch.images.is_cuda:  # the next replay of a CUDA graph writes to the same memory
            logits, maps = logits.clone(), [x.clone() for x in maps]
        return TeacherOutputs(logits, maps)


def _gather(found: Sequence[Found], context: ProcessContext) -> list[Found]:
    """Concatenates the lists of all processes, on all of them."""
    return [x for part in context.all_gather(found) for x in part]


def _weights_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, in their dtypes."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
