"""Resuming from a checkpoint: finding it, checking that it fits, restoring the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from featkd.data import Loader
from featkd.data.augment import AUGMENTATION_VERSION
from featkd.models.weights import load_strictly
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.names import listed
from featkd.runtime.remote import Location, locate
from featkd.train import checkpoint
from featkd.train.checkpoint import CheckpointError, CheckpointStore
from featkd.train.checkpoint_layout import find_optimizer_fault
from featkd.train.components import RunComponents
from featkd.train.optimizer import peak_lr
from featkd.train.parallel import shard_optimizer_state, shard_state
from featkd.train.recipe import Recipe
from featkd.train.recipe_changes import another_experiment, check_same_recipe

# Options that the recipe sets, not the checkpoint. The learning rate is set in each update.
_RECIPE_OPTIONS = ("weight_decay", "eps")


def find_checkpoint(
    resume: str, store: CheckpointStore, context: ProcessContext
) -> Location | None:
    """Finds the checkpoint to resume from; None to start anew. All processes must call it.

    After a restart by torchrun, this is the last checkpoint of the same job, whatever `resume`
    was given on the command line.

    Args:
        resume: "auto", "force", "never" or a file; see `Trainer.run`.
        store: the run's checkpoints.
        context: this process.

    Raises:
        CheckpointError: "never", but the folder holds a checkpoint of another job.
    """
    # A collective: a node that sees a shared folder late must not start anew alone.
    found = context.any_true(store.last.exists())
    if resume in ("auto", "force"):
        return store.last if found else None
    if found and context.job is not None and checkpoint.load(store.last)["job"] == context.job:
        return store.last
    if resume != "never":
        asked = locate(resume, "resume")
        return store.last if _identity(asked) == _identity(store.last) else asked
    kept = store.last if found else store.best
    if context.any_true(kept.exists()):
        # A first save that was cut short leaves the job's best.pt without last.pt.
        if not found and context.job is not None and checkpoint.load(kept)["job"] == context.job:
            return None
        way = ", or --resume auto or force to continue this one" if found else ""
        raise CheckpointError(
            f"resume: never, but {kept} exists, and a new run would replace it; expected another "
            f"--out for a new run{way}"
        )
    return None


def _identity(place: Location) -> object:
    """Value that is the same for all spellings of a place."""
    return place.resolve() if isinstance(place, Path) else (place.fs, place.path)


def check_same_position(context: ProcessContext, place: str) -> None:
    """Checks that all processes resume from the same position; all processes must call it.

    Each process reads the checkpoint itself. A node with a stale view of a shared folder can get
    the checkpoint before the last, and its weights would differ.

    Args:
        context: this process.
        place: this process's position, in words.

    Raises:
        CheckpointError: the positions differ; raised on all processes.
    """
    places = context.merge_dicts({str(context.rank): place})
    if len(set(places.values())) == 1:
        return
    by_place: dict[str, list[str]] = {}
    for rank in sorted(places, key=int):
        by_place.setdefault(places[rank], []).append(rank)
    described = "; ".join(
        f"{found} (process{'es' if len(ranks) > 1 else ''} {listed(ranks, 5)})"
        for found, ranks in by_place.items()
    )
    raise CheckpointError(
        f"the processes would resume from different positions: {described}; a node may see an "
        "older state of a shared folder; start again"
    )


def restore(
    path: Location, components: RunComponents, *, force: bool
) -> tuple[dict[str, Any], list[str]]:
    """Restores the components of a run from a checkpoint.

    The number of processes may have changed. Images keep their order (`EpochSampler`): within an
    epoch none is left out or seen twice, provided the images already seen make up whole updates of
    the new size.

    Args:
        path: the checkpoint.
        components: receives weights, their average, the optimizer's state and the position.
        force: allow changes of the recipe or the images that make it another experiment.

    Returns:
        The checkpoint's content, and notes for the user on what has changed.

    Raises:
        CheckpointError: it can't be read, or has other classes or, within an epoch, another order
            of images.
        RecipeError: it has another student, or belongs to another experiment and `force` is false.
    """
    state, recipe, loader = checkpoint.load(path), components.recipe, components.train_loader
    changed = check_same_recipe(path, state["recipe"], recipe, force=force)
    if (state["model_ema"] is None) != (components.ema is None):
        raise CheckpointError(
            f"{path}: was saved {'without' if components.ema else 'with'} a weight average, but "
            f"the recipe has ema_decay: {recipe.ema_decay}"
        )
    if state["classes"] != loader.classes:
        raise CheckpointError(
            f"{path}: was trained on other classes ({listed(state['classes'], 5)}) "
            f"than the class folders ({listed(loader.classes, 5)})"
        )
    images = []
    before, now = state["loader"]["num_images"], loader.num_samples
    if before != now:
        per_epoch = f"{components.updates_per_epoch} updates per epoch"
        images = [f"training images: {before} -> {now} ({per_epoch})"]
    _restore_position(path, state, loader, recipe.optim.accumulate)
    if images and not force:
        raise another_experiment(path, images)
    _load_weights(path, cast(nn.Module, components.student), state["model"])
    if components.ema is not None:
        _load_weights(path, components.ema.module, state["model_ema"])
    _load_projectors(path, components.projectors, state.get("projectors", {}))
    _restore_optimizer(path, state, components.optimizer, recipe)
    if state["scaler"]:  # empty without loss scaling
        components.scaler.load_state_dict(state["scaler"])
    return state, [*changed, *images, *_other_changes(state, components)]


def _load_weights(path: Location, model: nn.Module, state: dict[str, Tensor]) -> None:
    load_strictly(model, shard_state(model, state), str(path), "the recipe's student")


def _load_projectors(path: Location, projectors: nn.ModuleDict, state: dict[str, Tensor]) -> None:
    """Restores the projectors; only a run with the same ones can continue, under "force" too."""
    own: Mapping[str, Tensor] = projectors.state_dict()
    saved, needed = ({name: tuple(x.shape) for name, x in s.items()} for s in (state, own))
    if saved != needed:
        raise CheckpointError(
            f"{path}: has {_describe_projectors(saved)}, the recipe asks for "
            f"{_describe_projectors(needed)}; expected the same loss.projector, loss.pooled, "
            "loss.pairs and models, or another --out for a new run"
        )
    projectors.load_state_dict(shard_state(projectors, state))


def _describe_projectors(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Layer pairs of projectors with their kinds and channels, from the shapes of their weights."""
    described = []
    for name, shape in shapes.items():
        key, _, rest = name.partition(".")
        if rest == "proj.weight":
            kind = "linear_norm" if f"{key}.norm.weight" in shapes else "linear"
            described.append(f"{key} ({kind}, {shape[1]} -> {shape[0]})")
    return f"projectors of layer pairs {listed(described, 5)}" if described else "no projectors"


def _restore_optimizer(
    path: Location, state: dict[str, Any], optimizer: torch.optim.Optimizer, recipe: Recipe
) -> None:
    """Restores the optimizer's state, but keeps weight decay and eps of the recipe."""
    if not state["optimizer"]["param_groups"]:
        raise CheckpointError(
            f"{path}: holds no state of the optimizer, as every best.pt; expected last.pt or "
            "epoch-<n>.pt to resume from, or teacher.checkpoint to use it as a teacher"
        )
    before, now = state["recipe"]["optim"], recipe.optim
    if before["optimizer"] != now.optimizer:
        raise CheckpointError(
            f"{path}: optim.optimizer: {before['optimizer']!r} -> {now.optimizer!r}: the saved "
            f"state does not fit; expected {before['optimizer']!r}"
        )
    # timm makes a single parameter group if weight_decay is 0
    if len(state["optimizer"]["param_groups"]) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{path}: optim.weight_decay: {before['weight_decay']:g} -> {now.weight_decay:g}: a "
            f"resumed run can't turn weight decay on or off; expected "
            f"{'0' if before['weight_decay'] == 0 else 'more than 0'}"
        )
    fault = find_optimizer_fault(optimizer, state["optimizer"])
    if fault is not None:
        raise CheckpointError(f"{path}: damaged: {fault}")
    groups = [dict(group) for group in optimizer.param_groups]
    shard_optimizer_state(optimizer, state["optimizer"])
    optimizer.load_state_dict(state["optimizer"])
    for number, (own, group) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        if missing := sorted(own.keys() - group.keys()):
            raise CheckpointError(
                f"{path}: damaged: has no entry optimizer.param_groups.{number}.{missing[0]}"
            )
        group.update((name, own[name]) for name in _RECIPE_OPTIONS if name in own)


def _restore_position(
    path: Location, state: dict[str, Any], loader: Loader, accumulate: int
) -> None:
    """Restores the loader's position, which within an epoch must follow a whole update."""
    try:
        loader.load_state_dict(state["loader"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    batch = loader.state_dict()["batch"]
    if batch % accumulate:
        raise CheckpointError(
            f"{path}: was saved within an epoch, after {batch} micro-batches of the present size, "
            f"which are not whole updates of optim.accumulate: {accumulate}; expected a divisor of "
            f"{batch}"
        )


def _other_changes(state: dict[str, Any], components: RunComponents) -> list[str]:
    """Notes on another image loader (of `data.backend: auto`), other draws, other processes."""
    notes, recipe, world_size = [], components.recipe, components.context.world_size
    now = components.train_loader.decoder
    before = state.get("pixels", now)  # absent in earlier versions
    if before != now:
        notes.append(f"image loader: {before} -> {now} (pixels differ by rounding)")
    version = state["loader"].get("augmentation_version", 1)
    if version != AUGMENTATION_VERSION and recipe.data.augment.is_random:
        notes.append(
            f"random augmentation: version {version} -> {AUGMENTATION_VERSION} of featkd's draws "
            "(the same images in the same order, with other crops, flips, operations and erased "
            "boxes)"
        )
    if (before := state["world_size"]) == world_size:
        return notes
    batch = state["recipe"]["batch_size"] * before * state["recipe"]["optim"]["accumulate"]
    if batch == components.global_batch:
        draws = "drop-path and mixing draws" if recipe.data.augment.mixes else "drop-path draws"
        what = f"{batch} images per update as before; {draws} and the order of sums differ"
    else:
        what = (
            f"{batch} -> {components.global_batch} images per update: peak learning rate "
            f"{peak_lr(recipe, batch):.3g} -> {peak_lr(recipe, components.global_batch):.3g}, "
            f"{components.updates_per_epoch} updates per epoch"
        )
    return [*notes, f"processes: {before} -> {world_size} ({what})"]
