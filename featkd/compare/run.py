"""Trains the arms of a comparison side by side, and writes its results."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from featkd.cache import CacheConfig
from featkd.cache.config import Store as StorageType
from featkd.cache.estimate import as_size
from featkd.compare.analysis import analyse
from featkd.compare.arms import ARMS, REFERENCE, arm_recipe, choose_arms, wide_width
from featkd.compare.mismatch import TeacherMap, measure_teacher
from featkd.compare.pool import train_all
from featkd.compare.report import Comparison, write_page
from featkd.compare.results import RunResult
from featkd.compare.store import Store
from featkd.runtime import distributed
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.lock import output_folder
from featkd.train.build_cache import build_cache
from featkd.train.checkpoint import CheckpointError
from featkd.train.components import average_notes, build
from featkd.train.logs import read_csv
from featkd.train.recipe import Recipe, RecipeError, check_local

# Uncompressed, so that a cached teacher teaches what a running one does.
_STORAGE: dict[str, StorageType] = {"off": "fp32", "bf16": "bf16", "fp16": "fp16"}
_CACHED = "cached"
_ABOUT = "Students trained on the same images with the same seeds and the same number of updates."
_Jobs = dict[tuple[str, int], Recipe]


def compare(
    recipe: Recipe, arms: str | None = None, seeds: int = 3, *, quiet: bool = False
) -> Comparison:
    """Trains the arms with several seeds, prints what they show, writes `recipe.out/report.html`.

    All arms train on the same images in the same order, with the same seeds and number of updates.
    Finished runs in the folder are kept and unfinished ones are resumed.

    Args:
        recipe: the recipe that the arms change; its seed is the first.
        arms: some of `featkd.compare.arms.ARMS`, separated by commas; None for all that the recipe
            has terms for.
        seeds: seeds per arm.
        quiet: show no progress bars.

    Raises:
        ValueError: an argument or a field of the recipe can't be used.
        CheckpointError: the folder holds something else, or another process writes to it.
        The errors of `Trainer` and `build_cache`.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected a whole number >= 1, got {seeds}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("compare: started by torchrun, but it starts its own processes")
    check_local("out", recipe.out)
    names, notes = choose_arms(recipe, arms)
    out = Path(recipe.out)
    with output_folder(out, CheckpointError):
        store = Store(out, recipe)
        chosen = [(name, recipe.seed + n) for n in range(seeds) for name in names]
        pending = [key for key in chosen if key not in store.runs]
        if pending:
            if done := len(chosen) - len(pending):
                print(f"{done} of {len(chosen)} runs in {out} were finished before")
            jobs = _prepare(recipe, pending, store, seeds, quiet)
            train_all(jobs, "training the arms", quiet, recipe.device, store.add)
        runs = [store.runs[key] for key in chosen]
        teacher = store.teacher_map if isinstance(store.teacher_map, TeacherMap) else None
        analysis = analyse(names, runs, teacher)
        store.save(analysis)
        notes += _notes(store, runs)
        if recipe.ema_decay is not None:  # the average is what the table scores
            updates = int(read_csv(runs[0].folder / "eval.csv")[-1]["update"])
            notes += average_notes(recipe.ema_decay, updates)
        found = Comparison(recipe, runs, teacher, analysis, notes)
        write_page(out / "report.html", "featkd compare", _ABOUT, {"": ("", found)})
    print(f"{found.text()}\nreport: {out / 'report.html'}")
    return found


def _prepare(
    recipe: Recipe, pending: Sequence[tuple[str, int]], store: Store, seeds: int, quiet: bool
) -> _Jobs:
    """Returns the recipes of the runs, once each arm can be built and the caches are written."""
    out, context = Path(recipe.out), distributed.start(recipe.device)
    plain = arm_recipe(recipe, REFERENCE, recipe.seed, out, None)
    if store.width is None and any(ARMS[name].wide for name, _ in pending):
        store.width = wide_width(recipe, _check(plain, context))
    jobs = {
        (name, seed): arm_recipe(recipe, name, seed, out, store.width) for name, seed in pending
    }
    # An arm that can't be trained is refused before the others have trained for days.
    for job in {name: job for (name, _), job in jobs.items()}.values():
        _check(job, context)
    if store.teacher_map is None:
        store.teacher_map = measure_teacher(plain, context)
    if store.teacher is None:
        store.teacher = _decide(plain, out, seeds, context)
    store.save()
    if store.teacher == _CACHED:
        taught = {key: job for key, job in jobs.items() if job.teacher is not None}
        for number, seed in enumerate(sorted({seed for _, seed in taught})):
            _cache(recipe, out, seed, context, quiet, notes=number == 0)
        for (name, seed), job in taught.items():
            folder = str(_folder(out, seed))
            jobs[name, seed] = replace(job, cache=folder, cache_epochs="cycle")
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    return jobs


def _check(recipe: Recipe, context: ProcessContext) -> int:
    """Builds the components of a run, or raises their error; returns the number of classes."""
    components = build(recipe, context)
    components.close()
    return components.num_classes


def _folder(out: Path, seed: int) -> Path:
    return out / "cache" / f"seed-{seed}"


def _cache_config(recipe: Recipe) -> CacheConfig:
    augment = recipe.data.augment
    same_each_epoch = not augment.is_random and augment.repeats == 1
    views = 1 if same_each_epoch else recipe.optim.epochs
    return CacheConfig(views, logits_top="all", store=_STORAGE[recipe.amp])


def _decide(plain: Recipe, out: Path, seeds: int, context: ProcessContext) -> str:
    """Returns "cached" if the outputs for all epochs and seeds fit, otherwise the reason."""
    if plain.data.augment.mixes:
        return "mixup and CutMix mix images, and a cache holds single ones"
    folder = _folder(out, plain.seed)
    try:
        found = build_cache(plain, _cache_config(plain), context, folder, dry_run=True)
    except RecipeError as error:  # of caches alone, as the run itself has been built
        return str(error)
    size, free = found.size.total * seeds, shutil.disk_usage(out).free
    if size > free / 2:
        return f"a cache takes {as_size(size)}, more than half of the {as_size(free)} free in {out}"
    return _CACHED


def _cache(
    recipe: Recipe, out: Path, seed: int, context: ProcessContext, quiet: bool, notes: bool
) -> None:
    """Writes what is missing of a seed's cache; `notes`, equal for all seeds, are optional.

    The images that an epoch shows depend on the seed, and so do a random teacher's weights.
    """
    job = arm_recipe(recipe, REFERENCE, seed, out, None)
    if not quiet:
        print(f"teacher's outputs for seed {seed}: {_folder(out, seed)}", file=sys.stderr)
    built = build_cache(
        job,
        _cache_config(recipe),
        context,
        _folder(out, seed),
        quiet=quiet,
        show_notes=notes,
    )
    if built.interrupted_by is not None:
        signal.raise_signal(built.interrupted_by)


def _notes(store: Store, runs: Sequence[RunResult]) -> list[str]:
    """Notes on the teacher, and on the maps that can't be measured."""
    note = "teacher: its outputs were computed once per seed and read by all arms (OUT/cache)"
    if store.teacher != _CACHED:
        note = f"teacher: ran in every update, because {store.teacher}"
    maps: dict[str, object] = {f"{run.name}, seed {run.seed}": run.map for run in runs}
    reasons = {"the teacher": store.teacher_map, **maps}.items()
    unmeasured = ((name, reason) for name, reason in reasons if isinstance(reason, str))
    return [note, *(f"the map of {name} could not be measured: {x}" for name, x in unmeasured)]
