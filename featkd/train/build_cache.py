"""`featkd cache`: the teacher over every sample of some epochs, into a cache."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from featkd.cache import CacheConfig, CacheError, CacheWriter, Manifest
from featkd.cache.rows import NotStorable, Row
from featkd.cache.writer import locked, prepare
from featkd.data import Batch, EpochSampler, ImageSet, Loader
from featkd.data.factory import build_over
from featkd.data.sampler import StretchSampler
from featkd.models.features import num_layers
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.interrupt import Interrupt
from featkd.train.cached_teacher import check_unmixed, checkpoint_name, subject_of
from featkd.train.components import build_student, check_fit, count_classes
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.teacher import Teacher, pair_layers, resolve_pairs, shapes_of

Found = TypeVar("Found")


class Filled(NamedTuple):
    """What came of it: shards that were written, by all processes, those that were there damaged,
    and the unreadable images met: path -> cause."""

    manifest: Manifest
    written: int
    damaged: int
    bad_files: dict[str, str]
    interrupted_by: int | None


def fill(
    recipe: Recipe,
    config: CacheConfig,
    context: ProcessContext,
    folder: Path,
    *,
    quiet: bool = False,
    strict_classes: bool = True,
) -> Filled:
    """Write what is missing of a cache; all processes must call it.

    A row's teacher pass is of the batch that the run's one process would see, so that neither the
    number of processes nor an interruption changes a byte.

    Args:
        recipe: the run that is to be taught.
        config: what is kept.
        context: this process.
        folder: of the cache; made if missing.
        quiet: print nothing.
        strict_classes: refuse a student with more outputs than there are class folders.

    Raises:
        RecipeError, ValueError: a field or argument can't be used.
        CacheError: the folder holds something else, another process writes to it, the disk is
            full, or an output can't be stored.
        featkd.data.BadImageError: an unreadable image under on_bad_image="error".
    """
    if recipe.teacher is None:
        raise RecipeError("teacher: null; expected the teacher whose outputs are to be kept")
    check_unmixed(recipe)
    config = config.resolved(recipe.loss.feature is not None)
    dataset = ImageSet(recipe.data, "train", recipe.seed)
    repeats = recipe.data.augment.repeats
    sampler = StretchSampler(len(dataset), repeats=repeats, seed=recipe.seed)
    loader = build_over(
        dataset, recipe.data, sampler, batch_size=recipe.batch_size, device=context.device
    )
    notes: list[str] = []
    try:
        classes = count_classes(recipe, dataset.classes, notes, strict=strict_classes)
        student = build_student(recipe, classes).to(context.device)
        teacher = _teacher(recipe, config, classes, context, notes)
        compared = pair_layers(recipe, teacher.model, "teacher")  # kept or not
        shapes = shapes_of(teacher.model, compared, recipe, context)
        check_fit(recipe, student, shapes, context, notes)
        del student
        manifest = Manifest(
            subject=subject_of(recipe, loader, context),
            weights=_weights(cast(nn.Module, teacher.model)),
            depth=num_layers(teacher.model),
            layout=config.layout(*teacher.shapes),
            rows=len(EpochSampler(len(dataset), training=True, repeats=repeats)),
            shard_rows=-(-config.shard_rows // recipe.batch_size) * recipe.batch_size,
            batch_size=recipe.batch_size,
            views=config.views,
            checkpoint=checkpoint_name(recipe),
        )
        with ExitStack() as held, Interrupt() as interrupt:
            manifest = _begin(folder, manifest, context, held)
            writer = CacheWriter(folder, manifest)
            with _progress(manifest, context.is_main and not quiet) as bar:

                def say(message: str) -> None:
                    if not quiet:
                        bar.write(message, file=sys.stderr)

                for note in notes if context.is_main else ():
                    say(note)
                work = _Work(writer, teacher, loader, sampler, context, interrupt, bar, say)
                ends = (work.fill(view) for view in range(manifest.views))
                by = next((signal for signal in ends if signal is not None), None)
            written = sum(_pooled([work.written], context))
            bad_files = context.merged(work.bad_files)
    finally:
        loader.close()
    return Filled(manifest, written, work.damaged, bad_files, by)


class _Work:
    """Batches through the teacher, and into shards."""

    def __init__(
        self,
        writer: CacheWriter,
        teacher: Teacher,
        loader: Loader,
        sampler: StretchSampler,
        context: ProcessContext,
        interrupt: Interrupt,
        bar: Any,
        say: Callable[[str], None],
    ) -> None:
        self._writer = writer
        self._teacher = teacher
        self._loader = loader
        self._sampler = sampler
        self._context = context
        self._interrupt = interrupt
        self._bar = bar  # tqdm's
        self._say = say
        self.written = 0
        self.damaged = 0  # of all processes
        self.bad_files: dict[str, str] = {}

    def fill(self, view: int) -> int | None:
        """Write what is missing of a view; returns the signal that ended that, if any.

        The processes take the missing shards in turns and meet before each: none waits for long,
        and a signal to one of them stops all.
        """
        number, together = self._context.rank, self._context.world_size
        missing = self._missing(view)
        stretches = [self._writer.manifest.positions(shard) for shard in missing]
        self._bar.update(self._writer.manifest.rows - sum(map(len, stretches)))
        self._sampler.choose(view, own := stretches[number::together])
        batches = iter(self._loader) if own else iter(())
        for first in range(0, len(missing), together):
            if (stopped_by := self._interrupt.agreed(self._context.any_true)) is not None:
                return stopped_by
            turn = range(first, min(first + together, len(missing)))
            if first + number in turn:
                self._compute(view, missing[first + number], batches)
            self._bar.update(sum(len(stretches[i]) for i in turn if i != first + number))
        return self._interrupt.agreed(self._context.any_true)

    def _missing(self, view: int) -> list[int]:
        """Shards of a view that are not there or damaged; each process looks at a part of it."""
        context = self._context
        part = range(context.rank, self._writer.manifest.shards, context.world_size)
        missing = []
        known = len(self._writer.damaged)
        for shard, whole in zip(part, self._writer.whole(view, part), strict=True):
            if self._interrupt.signal is not None:
                break
            if not whole:
                missing.append(shard)
        for damage in (damages := _pooled(self._writer.damaged[known:], context)):
            if context.is_main:
                self._say(damage)
        self.damaged += len(damages)
        return sorted(_pooled(missing, context))

    def _compute(self, view: int, shard: int, batches: Iterator[Batch]) -> None:
        """Write a shard from the next batches; a signal ends it before one of them."""
        manifest = self._writer.manifest
        rows: list[Row] = []
        keys: list[Tensor] = []
        shown: list[Tensor] = []
        for batch in islice(batches, -(-len(manifest.positions(shard)) // manifest.batch_size)):
            if self._interrupt.signal is not None:
                return
            rows += self._rows(batch)
            keys.append(batch.keys)
            shown.append(batch.shown)
            self._bar.update(len(batch.keys))
            self._name_bad()
        self._writer.write(view, shard, torch.cat(keys), torch.cat(shown), rows)
        self.written += 1

    def _name_bad(self) -> None:
        """Name each unreadable image once (under on_bad_image="skip")."""
        for path, cause in self._loader.bad_images.items():
            if path not in self.bad_files:
                self.bad_files[path] = cause
                self._say(f"unreadable image, its rows are of the one after it: {path}: {cause}")

    def _rows(self, batch: Batch) -> list[Row]:
        images = batch.images.to(self._context.device, non_blocking=True)
        taught = self._teacher.teach(batch._replace(images=images))
        try:
            return self._writer.manifest.layout.encode(taught)
        except NotStorable as error:
            epoch, image, copy = batch.keys[error.number].tolist()
            raise CacheError(
                f"image {image}, copy {copy} of view {epoch}: {error.cause}; another amp may do"
            ) from error


def _begin(folder: Path, manifest: Manifest, context: ProcessContext, held: ExitStack) -> Manifest:
    """Lock and prepare the folder on process 0, for all of them."""
    answer: Manifest | CacheError = manifest
    if context.is_main:
        try:
            held.enter_context(locked(folder))
            answer = prepare(folder, manifest)
        except CacheError as error:
            answer = error
    answer = context.broadcast(answer)
    if isinstance(answer, CacheError):
        raise answer
    return answer


def _pooled(found: Sequence[Found], context: ProcessContext) -> list[Found]:
    """What all processes have found, on all of them."""
    return [x for part in context.all_gather(found) for x in part]


def _progress(manifest: Manifest, shown: bool) -> Any:
    """A bar over the rows of the cache."""
    total = manifest.views * manifest.rows
    return tqdm(total=total, unit="image", disable=None if shown else True)


def _teacher(
    recipe: Recipe, config: CacheConfig, classes: int, context: ProcessContext, notes: list[str]
) -> Teacher:
    """The teacher, which gives the maps to be kept."""

    def layers(depth: int) -> tuple[int, ...]:
        return () if config.features == "none" else resolve_pairs(recipe, depth, "teacher")

    return Teacher(recipe, classes, context, notes, layers)


def _weights(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, as it holds them."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
