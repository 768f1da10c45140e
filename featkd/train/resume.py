"""How a run goes on from a checkpoint: which one, whether it fits, and what has changed since."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from featkd.models.weights import load_strictly
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.remote import Location, locate
from featkd.train import checkpoint
from featkd.train.checkpoint import CheckpointError, CheckpointStore
from featkd.train.components import Parts, peak_lr
from featkd.train.recipe import Recipe, to_dict

_OF_RECIPE = ("weight_decay", "eps")  # the learning rate is set anew with each update


def find_checkpoint(
    resume: str, store: CheckpointStore, context: ProcessContext
) -> Location | None:
    """The checkpoint to go on from, None to start anew; all processes must call it.

    When torchrun starts a job's processes again, that is the job's own last checkpoint, whatever
    the command line said to begin with.

    Args:
        resume: "auto", "never" or a file, as `Trainer.run` takes it.
        store: the run's checkpoints.
        context: this process.

    Raises:
        CheckpointError: "never", but there is one that is not this job's.
    """
    # Asked of all: a node that sees a shared folder late must not start anew by itself.
    found = context.any_true(store.last.exists())
    if resume == "auto":
        return store.last if found else None
    if found and context.job is not None and checkpoint.load(store.last)["job"] == context.job:
        return store.last
    if resume != "never":
        return locate(resume, "resume")
    if found:
        raise CheckpointError(
            f"resume: never, but {store.last} exists; choose another out, or --resume auto"
        )
    return None


def check_alike(context: ProcessContext, place: str) -> None:
    """Refuse to go on from different places: all processes must call it, each with its own.

    Each reads the checkpoint by itself, and a node that caches a shared folder's names can be
    given the file before the last. The weights would differ from the first update on.

    Raises:
        CheckpointError: in all processes.
    """
    places = context.merged({str(context.rank): place})
    if len(set(places.values())) == 1:
        return
    by_place: dict[str, list[str]] = {}
    for rank, found in sorted(places.items(), key=lambda pair: int(pair[0])):
        by_place.setdefault(found, []).append(rank)
    said = "; ".join(
        f"{found} (process{'es' if len(ranks) > 1 else ''} {checkpoint.named(ranks)})"
        for found, ranks in by_place.items()
    )
    raise CheckpointError(
        f"the processes would go on from different places: {said}; does a node see an older "
        "state of a shared folder? Start again"
    )


def restore(
    path: Location, parts: Parts, recipe: Recipe, world_size: int
) -> tuple[dict[str, Any], list[str]]:
    """Bring a run's parts to where a checkpoint was saved.

    The number of processes may have changed: images come in the same order (`EpochSampler`), so
    that within an epoch none is left out or seen twice, if the images already seen make up whole
    updates of the new size.

    Args:
        path: the checkpoint.
        parts: receive weights, averages, the optimizer's state and the position.
        recipe: what the run is to be from here on.
        world_size: processes from here on.

    Returns:
        The checkpoint's content, and the changes that the user should know of.

    Raises:
        CheckpointError: it can't be read, or is not of this student, these classes or, within an
            epoch, this order of images.
    """
    state = checkpoint.load(path)
    changed = checkpoint.check_same_model(path, state["recipe"], to_dict(recipe))
    if (state["model_ema"] is None) != (parts.ema is None):
        raise CheckpointError(
            f"{path}: was saved {'without' if parts.ema else 'with'} a weight average, the "
            f"recipe has ema_decay: {recipe.ema_decay}"
        )
    if state["classes"] != parts.train_loader.classes:
        raise CheckpointError(
            f"{path}: was trained on other classes ({checkpoint.named(state['classes'])}) than "
            f"the class folders are ({checkpoint.named(parts.train_loader.classes)})"
        )
    _restore_position(path, state, parts, recipe)
    student = cast(nn.Module, parts.student)
    load_strictly(student, state["model"], str(path), "the recipe's student")
    if parts.ema is not None:
        load_strictly(parts.ema.module, state["model_ema"], str(path), "the recipe's student")
    _restore_optimizer(path, state, parts.optimizer, recipe)
    if state["scaler"]:  # empty of a run that scaled no loss
        parts.scaler.load_state_dict(state["scaler"])
    changed = [
        *changed,
        *_of_images(state, parts),
        *_of_pixels(state, parts),
        *_of_processes(state, parts, recipe, world_size),
    ]
    return state, changed


def _restore_optimizer(
    path: Location, state: dict[str, Any], optimizer: torch.optim.Optimizer, recipe: Recipe
) -> None:
    """Its state, under the recipe's own weight decay and eps: the saved groups hold older ones."""
    before, now = state["recipe"]["optim"], recipe.optim
    if before["optimizer"] != now.optimizer:
        raise CheckpointError(
            f"{path}: optim.optimizer: {before['optimizer']!r} -> {now.optimizer!r}: the state of "
            f"the one is none for the other; expected {before['optimizer']!r}"
        )
    if len(state["optimizer"]["param_groups"]) != len(optimizer.param_groups):  # timm has 1 at 0
        raise CheckpointError(
            f"{path}: optim.weight_decay: {before['weight_decay']:g} -> {now.weight_decay:g}: a "
            f"run goes on without weight decay if it began so, and only then; expected "
            f"{'0' if before['weight_decay'] == 0 else 'more than 0'}"
        )
    own = [{k: group[k] for k in _OF_RECIPE if k in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)


def _restore_position(path: Location, state: dict[str, Any], parts: Parts, recipe: Recipe) -> None:
    loader = parts.train_loader
    try:
        loader.load_state_dict(state["loader"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    batch, accumulate = loader.state_dict()["batch"], recipe.optim.accumulate
    if batch % accumulate:
        raise CheckpointError(
            f"{path}: was saved within an epoch, {batch} micro-batches of the present size into "
            f"it, which is no whole number of updates of optim.accumulate: {accumulate}; expected "
            f"a divisor of {batch}"
        )


def _of_images(state: dict[str, Any], parts: Parts) -> list[str]:
    """What another number of training images changes, or nothing; within an epoch it is refused."""
    before, now = state["loader"]["num_images"], parts.train_loader.num_samples
    if before == now:
        return []
    return [f"training images: {before} -> {now} ({parts.updates_per_epoch} updates an epoch)"]


def _of_pixels(state: dict[str, Any], parts: Parts) -> list[str]:
    """What another loader changes, or nothing; also where the recipe leaves its choice open."""
    now = parts.train_loader.pixels
    before = state.get("pixels", now)  # earlier checkpoints do not say
    if before == now:
        return []
    return [f"images: loaded by {before} -> {now} (their pixels differ by rounding)"]


def _of_processes(
    state: dict[str, Any], parts: Parts, recipe: Recipe, world_size: int
) -> list[str]:
    """What another number of processes changes, or nothing."""
    before = state["world_size"]
    if before == world_size:
        return []
    batch = state["recipe"]["batch_size"] * before * state["recipe"]["optim"]["accumulate"]
    if batch == parts.global_batch:
        draws = "drop-path and mixing draws" if recipe.data.augment.mixes else "drop-path draws"
        what = f"{batch} images an update as before; {draws} and the order of sums differ"
    else:
        what = (
            f"{batch} -> {parts.global_batch} images an update: peak learning rate "
            f"{peak_lr(recipe, batch):.3g} -> {peak_lr(recipe, parts.global_batch):.3g}, "
            f"{parts.updates_per_epoch} updates an epoch"
        )
    return [f"processes: {before} -> {world_size} ({what})"]
