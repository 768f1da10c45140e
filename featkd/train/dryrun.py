"""Dry run: build everything, take two updates, and say what the real run would do."""

from __future__ import annotations

import copy
import math
import resource
import time
from datetime import timedelta
from itertools import islice
from typing import cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from featkd.data import Batch
from featkd.models.features import FeatureModel
from featkd.ops.backends import use_backend
from featkd.runtime.distributed import ProcessContext
from featkd.train.components import Parts, peak_lr
from featkd.train.recipe import Recipe
from featkd.train.trainer import Trainer


def dry_run(recipe: Recipe, context: ProcessContext) -> str:
    """A report of what `recipe` would do here; writes no file and saves no weights.

    The first of two updates warms up (and compiles); the second is timed. Loading is timed by
    itself, over enough batches that those loaded ahead don't count for much. The estimated time is
    that of the slower of the two for all updates: it leaves out evaluation and saving.

    Raises:
        The same errors as the run itself.
    """
    trainer = Trainer(recipe, context, strict_classes=False)
    parts = trainer.parts
    try:
        parts.student.train()
        parts.train_loader.set_epoch(0)
        batches, loading = _load(trainer, 2 * recipe.optim.accumulate)
        trainer.step(batches[: recipe.optim.accumulate])
        _wait(context.device)
        started = time.perf_counter()
        terms = trainer.step(batches[recipe.optim.accumulate :])
        _wait(context.device)
        seconds = time.perf_counter() - started
    finally:
        parts.close()

    total = trainer.total_updates
    slower = max(seconds, parts.global_batch / loading)
    config = recipe.optim
    lines = [
        ("student", _describe(parts.student, recipe)),
        ("teacher", _describe_teacher(parts, recipe)),
        ("data", _describe_data(trainer)),
        ("objective", _describe_loss(recipe)),
        (
            "batch",
            f"{parts.global_batch} images an update ({recipe.batch_size} x {context.world_size} "
            f"processes x {config.accumulate} accumulated)",
        ),
        (
            "schedule",
            f"{config.epochs} epochs of {parts.updates_per_epoch} updates = {total} updates; "
            f"{config.optimizer}, peak lr {peak_lr(recipe, parts.global_batch):.3g}, "
            f"warm-up {config.warmup_epochs} epochs, cosine to {config.min_lr:g}",
        ),
        (
            "precision",
            f"{recipe.amp} autocast, torch.compile {'on' if recipe.compile else 'off'}, "
            f"weight average {recipe.ema_decay}",
        ),
        ("device", _describe_device(context.device)),
        (
            "two updates",
            f"loss {terms.total.item():.4f} (logits {terms.logits.item():.4f}, features "
            f"{terms.features.item():.4f})",
        ),
        (
            "throughput",
            f"{parts.global_batch / seconds:.1f} images/s computing ({seconds:.2f} s an update), "
            f"{loading:.1f} images/s loading ({recipe.data.workers} workers a process)",
        ),
        ("peak memory", _peak_memory(context.device)),
        ("estimated time", f"{timedelta(seconds=round(slower * total))} for training here"),
        (
            "would write",
            f"{trainer.folder}/ (last.pt, best.pt, metrics.csv, eval.csv, tensorboard/)",
        ),
    ]
    lines += [("note", note) for note in parts.notes]
    return "\n".join(f"{name:15s} {text}" for name, text in lines)


def _load(trainer: Trainer, need: int) -> tuple[list[Batch], float]:
    """`need` batches, and the images/s at which all processes' loaders bring more of them."""
    loader, workers = trainer.parts.train_loader, trainer.recipe.data.workers
    batches = iter(loader)
    kept = [next(batches)]
    started = time.perf_counter()
    count = 0
    # Twice what the workers have loaded ahead (2 batches each) by the time the first one came.
    for batch in islice(batches, max(need - 1, 4 * workers)):
        count += len(batch.targets)
        if len(kept) < need:
            kept.append(batch)
    seconds = time.perf_counter() - started
    if count == 0:  # the whole set is one batch
        return kept * need, math.inf
    return (kept * need)[:need], count * trainer.context.world_size / seconds


def _describe_teacher(parts: Parts, recipe: Recipe) -> str:
    if parts.teacher is not None:
        return _describe(parts.teacher, recipe)
    return "none" if recipe.cache is None else f"rows of {recipe.cache}"


def _describe(model: FeatureModel, recipe: Recipe) -> str:
    config = recipe.teacher if not any(p.requires_grad for p in model.parameters()) else None
    if config is None:
        name = f"{recipe.student.base} ({recipe.student.arch})"
    elif config.pretrained:
        name = f"{config.name} (timm's weights)"
    else:
        name = f"{config.name} ({config.checkpoint or 'random weights'})"
    parameters = sum(p.numel() for p in model.parameters())
    macs = forward_macs(model, recipe.data.img_size)
    return f"{name}, {parameters:,} parameters, {macs / 1e9:.3f} GMACs an image"


def forward_macs(model: FeatureModel, size: int) -> int:
    """Multiply-adds of the matrix products of one image's forward pass."""
    return count_flops(model, size) // 2


def count_flops(model: FeatureModel, size: int, *, backward: bool = False) -> int:
    """Of the matrix products of one image's forward pass, and maybe its backward pass."""
    # A copy without values: it multiplies nothing, and weights held in bf16 count alike.
    shape = copy.deepcopy(cast(nn.Module, model)).to("meta", torch.float32).eval()
    counter = FlopCounterMode(display=False)
    # The counter does not know fused operations, the CPU's attention and featkd's own; the plain
    # ones are made of products.
    with counter, use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        with torch.set_grad_enabled(backward):
            logits = shape(torch.empty(1, 3, size, size, device="meta"))
        if backward:
            torch.autograd.backward(logits.sum())
    return int(counter.get_total_flops())


def _describe_data(trainer: Trainer) -> str:
    data = trainer.recipe.data
    train, val = trainer.parts.train_loader, trainer.parts.val_loader
    augment = data.augment
    mixing = f", mixup {augment.mixup:g}, cutmix {augment.cutmix:g}" if augment.mixes else ""
    return (
        f"{data.path}: {train.num_samples} training and {val.num_samples} validation images, "
        f"{len(train.classes)} classes, at {data.img_size} x {data.img_size}, "
        f"{augment.repeats} augmented copies an image{mixing}"
    )


def _describe_loss(recipe: Recipe) -> str:
    loss = recipe.loss
    text = f"{1 - loss.alpha:g} CE (label smoothing {loss.label_smoothing:g})"
    if loss.feature is not None:
        pairs = ", ".join(f"{s} <- {t}" for s, t in loss.pairs)
        text += f" + {loss.beta * loss.w_feat:g} {loss.feature} features (layers {pairs})"
    if loss.alpha > 0:
        text += f" + {loss.alpha:g} soft KD (tau {loss.tau:g})"
    return text


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the device"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / 2**20:.2f} GiB resident, this process"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
