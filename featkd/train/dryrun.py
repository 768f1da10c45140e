"""Dry run: builds all components, runs a few updates and reports sizes, speed and memory."""

from __future__ import annotations

import copy
import math
import resource
import time
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from featkd.data import Batch
from featkd.models.features import FeatureModel
from featkd.ops.backends import use_backend
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.names import plural
from featkd.train import checkpoint
from featkd.train.checkpoint import CheckpointError
from featkd.train.components import RunComponents
from featkd.train.optimizer import peak_lr
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.recipe_changes import check_same_recipe
from featkd.train.student import build_student
from featkd.train.teacher_images import teacher_size
from featkd.train.trainer import Trainer


def dry_run(recipe: Recipe, context: ProcessContext) -> str:
    """Reports what a run of `recipe` would do on this machine; writes no file.

    The first update warms up and compiles, on a GPU a second one records CUDA graphs, and the last
    is timed. Loading is timed separately, over enough batches that prefetched ones hardly count.
    The estimated time is the slower of the two for all updates, without evaluation and saving.

    Raises:
        The errors of `Trainer` and of an update.
    """
    asked, teacher = recipe, recipe.teacher
    missing = teacher is not None and not (teacher.has_weights or teacher.random)
    if teacher is not None and missing:  # sizes and speed do not depend on the weights
        recipe = replace(recipe, teacher=replace(teacher, random=True))
    trainer = Trainer(recipe, context, strict_classes=False)
    components = trainer.components
    if missing:
        components.notes = [n for n in components.notes if "(teacher.random)" not in n]
        components.notes.append(
            "teacher: the recipe names no weights, so the dry run takes random ones; a run needs "
            "teacher.checkpoint, teacher.pretrained or teacher.random"
        )
    components.notes += _resume_notes(trainer, asked)
    try:
        components.student.train()
        components.train_loader.set_epoch(0)
        every = recipe.optim.accumulate
        untimed = 2 if context.device.type == "cuda" else 1
        batches, loading = _load(trainer, (untimed + 1) * every)
        for number in range(untimed):
            trainer.step(batches[number * every :][:every])
        _wait(context.device)
        started = time.perf_counter()
        terms = trainer.step(batches[untimed * every :])
        _wait(context.device)
        seconds = time.perf_counter() - started
    finally:
        components.close()

    student, name = components.student, f"{recipe.student.base} ({recipe.student.arch})"
    if isinstance(student, FSDPModule):  # can't be copied to count its operations
        student = build_student(recipe, components.num_classes)
    total = trainer.total_updates
    slower = max(seconds, components.global_batch / loading)
    config = recipe.optim
    lines = [
        ("student", _describe(name, student, recipe.data.img_size)),
        ("teacher", _describe_teacher(components, recipe)),
        ("data", _describe_data(trainer)),
        ("objective", _describe_loss(recipe)),
        (
            "batch",
            f"{plural(components.global_batch, 'image')} per update ({recipe.batch_size} x "
            f"{plural(context.world_size, 'process')} x {config.accumulate} accumulated)",
        ),
        (
            "schedule",
            f"{plural(config.epochs, 'epoch')} of {plural(components.updates_per_epoch, 'update')} "
            f"= {plural(total, 'update')}; {config.optimizer}, peak lr "
            f"{peak_lr(recipe, components.global_batch):.3g} (optim.lr x batch / optim.lr_batch), "
            f"warm-up {plural(config.warmup_epochs, 'epoch')}, cosine to {config.min_lr:g}",
        ),
        (
            "precision",
            f"{recipe.amp} autocast, torch.compile "
            f"{'on' if recipe.compiles_on(context.device.type) else 'off'}, "
            f"weight average {recipe.ema_decay}",
        ),
        ("device", _describe_device(context.device)),
        (
            "last update",
            f"loss {terms.total.item():.4f} (logits {terms.logits.item():.4f}, features "
            f"{terms.features.item():.4f}, pooled {terms.pooled.item():.4f})",
        ),
        (
            "throughput",
            f"{components.global_batch / seconds:.1f} images/s computing ({seconds:.2f} s per "
            f"update), {loading:.1f} images/s loading "
            f"({plural(recipe.data.workers, 'worker')} per process)",
        ),
        ("peak memory", _peak_memory(context.device)),
        (
            "estimated time",
            f"{timedelta(seconds=round(slower * total))} for training on this machine",
        ),
        (
            "would write",
            f"{trainer.folder}/ (last.pt, best.pt, metrics.csv, eval.csv, tensorboard/)",
        ),
    ]
    lines += [("note", note) for note in components.notes]
    return "\n".join(f"{name:15s} {text}" for name, text in lines)


def _resume_notes(trainer: Trainer, recipe: Recipe) -> list[str]:
    """Note on the checkpoint in the output folder, from which the run would continue."""
    last = trainer.store.last
    if not last.exists():
        return []
    try:
        check_same_recipe(last, checkpoint.load(last)["recipe"], recipe, force=False)
    except (CheckpointError, RecipeError) as error:
        return [f"out: the run is refused with this folder: {error}"]
    return [f"out: the run continues from {last}, without the student's starting weights"]


def _load(trainer: Trainer, need: int) -> tuple[list[Batch], float]:
    """Loads `need` batches; returns them and the images/s of the loaders of all processes."""
    loader, workers = trainer.components.train_loader, trainer.recipe.data.workers
    batches = iter(loader)
    kept = [next(batches)]
    started = time.perf_counter()
    count = 0
    # Each worker prefetches 2 batches: twice as many are timed.
    for batch in islice(batches, max(need - 1, 4 * workers)):
        count += len(batch.targets)
        if len(kept) < need:
            kept.append(batch)
    seconds = time.perf_counter() - started
    if count == 0:  # a data set of one batch
        return kept * need, math.inf
    return (kept * need)[:need], count * trainer.context.world_size / seconds


def _describe_teacher(components: RunComponents, recipe: Recipe) -> str:
    model, config = components.teacher_model, recipe.teacher
    if model is None or config is None:
        return "none" if recipe.cache is None else f"rows of {recipe.cache}"
    weights = "timm's weights" if config.pretrained else config.checkpoint or "random weights"
    return _describe(f"{config.name} ({weights})", model, teacher_size(recipe))


def _describe(name: str, model: FeatureModel, size: int) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    macs = forward_macs(model, size)
    return f"{name}, {parameters:,} parameters, {macs / 1e9:.3f} GMACs per image"


def forward_macs(model: FeatureModel, size: int) -> int:
    """Multiply-adds of the matrix products in the forward pass of one image."""
    # On the meta device nothing is computed. float32, as a teacher can hold weights in bf16.
    shape = copy.deepcopy(cast(nn.Module, model)).to("meta", torch.float32).eval()
    counter = FlopCounterMode(display=False)
    # The counter does not know fused operations (the CPU's attention, featkd's ops).
    with counter, use_backend("reference"), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        shape(torch.empty(1, 3, size, size, device="meta"))
    return int(counter.get_total_flops()) // 2


def _describe_data(trainer: Trainer) -> str:
    data = trainer.recipe.data
    train, val = trainer.components.train_loader, trainer.components.val_loader
    augment = data.augment
    mixing = f", mixup {augment.mixup:g}, cutmix {augment.cutmix:g}" if augment.mixes else ""
    labels = plural(len(train.classes), "class") if data.labels == "folders" else "no labels"
    return (
        f"{data.path}: {train.num_samples} training and "
        f"{plural(val.num_samples, 'validation image')}, {labels}, "
        f"at {data.img_size} x {data.img_size}, "
        f"augmented copies per image: {augment.repeats}{mixing}"
    )


def _describe_loss(recipe: Recipe) -> str:
    loss = recipe.loss
    terms = []
    if recipe.data.labels == "folders":
        terms.append(f"{1 - loss.alpha:g} CE (label smoothing {loss.label_smoothing:g})")
    if loss.feature is not None:
        pairs = ", ".join(f"{s} <- {t}" for s, t in loss.pairs)
        terms.append(f"{loss.beta * loss.w_feat:g} {loss.feature} features (layers {pairs})")
    if loss.pooled is not None:
        terms.append(f"{loss.pooled.weight:g} {loss.pooled.metric} pooled features")
    if loss.alpha > 0:
        terms.append(f"{loss.alpha:g} soft KD (tau {loss.tau:g})")
    return " + ".join(terms)


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {plural(torch.get_num_threads(), 'thread')}"


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the device"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / 2**20:.2f} GiB resident, this process"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
