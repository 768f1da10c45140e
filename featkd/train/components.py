"""From a recipe to the parts of a run: loaders, models, loss, optimizer, schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from featkd.data import Loader, Mixer, build_loader
from featkd.functional import Metric
from featkd.losses import DistillationLoss
from featkd.models import Lift, create_student
from featkd.models.features import FeatureModel, feature_grid, num_layers
from featkd.runtime.checks import suggestion
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.environment import multiplies_bf16
from featkd.train.cached_teacher import OpenCache, open_cache, views_of
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.teacher import Shapes, Teacher, naming, pair_layers, shapes_of


class FeatureForward(nn.Module):
    """A student's `forward_with_features` as a module's forward, for DDP and torch.compile."""

    def __init__(self, model: FeatureModel, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.model.forward_with_features(images, self.layers)


class LossForward(nn.Module):
    """A Lift student's `forward_with_loss` as a module's forward, for DDP and torch.compile."""

    def __init__(self, model: Lift, metric: Metric) -> None:
        super().__init__()
        self.model = model
        self.metric: Metric = metric
        self.grid = feature_grid(model)

    def forward(self, images: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.forward_with_loss(images, teacher_map, metric=self.metric, grid=self.grid)


@dataclass
class Parts:
    """What a run works with; `student_forward` is what the loop calls.

    `source` says what the student is to learn: the model `teacher`, or a cache. With
    `student_forms_loss`, `student_forward` takes the teacher's map and returns the logits and the
    feature loss; else it returns the logits and the maps.
    """

    train_loader: Loader
    val_loader: Loader
    student: FeatureModel
    student_forward: nn.Module
    student_forms_loss: bool
    source: Teacher | OpenCache | None
    teacher: FeatureModel | None
    loss: DistillationLoss
    mixer: Mixer | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: Any  # timm's ModelEmaV3 (untyped) or None
    num_classes: int
    global_batch: int
    updates_per_epoch: int
    notes: list[str]

    def close(self) -> None:
        """Shut the loaders' workers down."""
        self.train_loader.close()
        self.val_loader.close()


def build(recipe: Recipe, context: ProcessContext, *, strict_classes: bool = True) -> Parts:
    """Build everything a run needs.

    Args:
        recipe: the run.
        context: this process.
        strict_classes: refuse a model with more outputs than there are class folders.

    Raises:
        RecipeError: parts that don't fit each other; names the fields.
        ValueError: from the parts themselves (data folders, layers, model names, checkpoints).
    """
    notes: list[str] = []
    train_loader = _loader(recipe, context, "train", views_of(recipe))
    val_loader = _loader(recipe, context, "val")
    notes += {loader.note: None for loader in (train_loader, val_loader) if loader.note}
    try:
        num_classes = count_classes(recipe, train_loader.classes, notes, strict=strict_classes)
        student = build_student(recipe, num_classes)
        student.to(context.device)
        if recipe.compile and recipe.amp == "bf16" and context.device.type == "cpu":
            unfuse_attention(cast(nn.Module, student), context)
        source: Teacher | OpenCache | None = None
        if recipe.cache is not None:
            source = open_cache(recipe, train_loader, context, notes)
        elif recipe.teacher is not None:
            source = Teacher(recipe, num_classes, context, notes)
        if source is not None:
            check_fit(recipe, student, source.shapes, context, notes)
        if recipe.amp == "bf16" and not multiplies_bf16(context.device):
            notes.append(
                "amp: bf16 is many times slower than off here: this device has no "
                "instructions for products in it; try --amp off"
            )
        if recipe.amp == "fp16" and context.device.type == "cpu":
            notes.append("amp: fp16 is many times slower than bf16 on most CPUs; try --amp bf16")

        updates_per_epoch = len(train_loader) // recipe.optim.accumulate
        if updates_per_epoch == 0:
            raise RecipeError(
                f"optim.accumulate: {recipe.optim.accumulate} micro-batches an update, but an "
                f"epoch has {len(train_loader)}"
            )
        global_batch = recipe.batch_size * context.world_size * recipe.optim.accumulate
        optimizer = _optimizer(recipe, student, global_batch, context)
        if recipe.optim.min_lr > (peak := peak_lr(recipe, global_batch)):
            notes.append(
                f"optim.min_lr: {recipe.optim.min_lr:g} is above the peak learning rate {peak:.3g} "
                f"(optim.lr, scaled by {global_batch} / optim.lr_batch)"
            )
        scheduler = _scheduler(recipe, optimizer, updates_per_epoch)
        ema = None if recipe.ema_decay is None else ModelEmaV3(student, decay=recipe.ema_decay)
        student_forward = _student_forward(recipe, student)
        student_forms_loss = isinstance(student_forward, LossForward)
        if recipe.compile:
            student_forward.compile(mode=recipe.compile_mode)
        if context.world_size > 1:
            student_forward = DistributedDataParallel(
                student_forward,
                device_ids=[context.device] if context.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
    except BaseException:
        train_loader.close()
        val_loader.close()
        raise
    return Parts(
        train_loader=train_loader,
        val_loader=val_loader,
        student=student,
        student_forward=student_forward,
        student_forms_loss=student_forms_loss,
        source=source,
        teacher=source.model if isinstance(source, Teacher) else None,
        loss=_loss(recipe, student),
        mixer=_mixer(recipe, num_classes, context),
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(context.device.type, enabled=recipe.amp == "fp16"),
        ema=ema,
        num_classes=num_classes,
        global_batch=global_batch,
        updates_per_epoch=updates_per_epoch,
        notes=notes,
    )


def _loader(
    recipe: Recipe, context: ProcessContext, split: str, views: int | None = None
) -> Loader:
    return build_loader(
        recipe.data,
        split="train" if split == "train" else "val",
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        rank=context.rank,
        world_size=context.world_size,
        device=context.device,
        views=views,
    )


def count_classes(
    recipe: Recipe, classes: list[str], notes: list[str], *, strict: bool = True
) -> int:
    """Outputs of the student.

    Raises:
        RecipeError: the training set has other classes; under `strict` more outputs count too.
    """
    asked, found = recipe.student.num_classes, len(classes)
    if asked is None and found < 2:
        raise RecipeError(
            f"data.path: the training set in {recipe.data.path} has one class ({classes[0]}), and "
            "nothing to tell it from; expected two or more class folders"
        )
    if asked is not None and asked < 2:
        raise RecipeError(f"student.num_classes: expected >= 2, got {asked}")
    if asked is None or asked == found:
        return found
    message = (
        f"student.num_classes: {asked}, but the training set has {found} class folders; "
        f"their numbers would not be the model's"
    )
    if strict or asked < found:
        raise RecipeError(message)
    notes.append(message)
    return asked


def build_student(recipe: Recipe, num_classes: int) -> FeatureModel:
    """The recipe's student, with the weights that its seed gives."""
    torch.manual_seed(recipe.seed)
    config = recipe.student
    options = {"img_size": recipe.data.img_size, **config.options}
    with naming("student"):
        return create_student(config.base, config.arch, config.teacher_dim, num_classes, **options)


def unfuse_attention(student: nn.Module, context: ProcessContext) -> None:
    """Have a compiled bf16 student on a CPU multiply and take the softmax apart.

    Where the processor has instructions for products in bf16, the backward pass of torch's fused
    attention uses none: DeiT-Tiny's update, 8 images, took 1.4 to 1.6 times as long with it. It
    saves memory: the (heads, N, N) maps of all blocks are kept without it.
    """
    if multiplies_bf16(context.device):
        for module in student.modules():
            if isinstance(getattr(module, "fused_attn", None), bool):
                module.fused_attn = False  # type: ignore[assignment]


def _student_forward(recipe: Recipe, student: FeatureModel) -> nn.Module:
    """What the loop calls; a Lift student compares its last map itself, and never writes it."""
    layers = pair_layers(recipe, student, "student")
    metric = recipe.loss.feature
    if metric is not None and isinstance(student, Lift) and layers == (num_layers(student) - 1,):
        return LossForward(student, metric)
    return FeatureForward(student, layers)


def check_fit(
    recipe: Recipe,
    student: FeatureModel,
    taught: Shapes,
    context: ProcessContext,
    notes: list[str],
) -> None:
    """One image through the student: do logits, tokens and widths fit the teacher's?

    Raises:
        RecipeError: they don't; names the field.
    """
    layers = pair_layers(recipe, student, "student")
    classes, _, maps = shapes_of(student, layers, recipe, context)
    if recipe.loss.alpha > 0 and classes != taught.classes:
        raise RecipeError(
            f"loss.alpha: needs logits of the same classes, but the student has {classes} and "
            f"the teacher {taught.classes}"
        )
    for s, t in zip(maps, taught.maps, strict=True):
        pair = f"layer pair [{s.layer}, {t.layer}]"
        if s.tokens != t.tokens:
            raise RecipeError(
                f"loss.pairs: {pair}: the student's map has {s.tokens} tokens, the teacher's "
                f"{t.tokens}; image and patch sizes must give the same grid"
            )
        if s.channels == t.channels:
            continue
        if recipe.student.arch != "plain" and s.layer == num_layers(student) - 1:
            raise RecipeError(
                f"student.teacher_dim: {recipe.student.teacher_dim}, but the teacher's layer "
                f"{t.layer} has {t.channels} channels and the student's matched map {s.channels}"
            )
        notes.append(f"{pair}: {s.channels} against {t.channels} channels: the wider map is pooled")


def _optimizer(
    recipe: Recipe, student: FeatureModel, global_batch: int, context: ProcessContext
) -> torch.optim.Optimizer:
    config = recipe.optim
    names = list_optimizers()
    if config.optimizer not in names:
        near = suggestion(config.optimizer, names)
        raise RecipeError(f"optim.optimizer: timm has no {config.optimizer!r}{near}")
    # One pass over each tensor: 21 ms in place of 66 for DeiT-Tiny WideLast on two CPU cores.
    is_fusible = context.device.type in ("cpu", "cuda") and config.optimizer in ("adam", "adamw")
    fused = {"fused": True} if is_fusible else {}
    optimizer = create_optimizer_v2(
        student,
        opt=config.optimizer,
        lr=peak_lr(recipe, global_batch),
        weight_decay=config.weight_decay,
        eps=config.eps,
        **fused,
    )
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def peak_lr(recipe: Recipe, global_batch: int) -> float:
    """The learning rate after the warm-up: linear in the global batch."""
    return recipe.optim.lr * global_batch / recipe.optim.lr_batch


def _scheduler(
    recipe: Recipe, optimizer: torch.optim.Optimizer, updates_per_epoch: int
) -> Scheduler:
    config = recipe.optim
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        step_on_epochs=config.step_on == "epoch",
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def _loss(recipe: Recipe, student: FeatureModel) -> DistillationLoss:
    config = recipe.loss
    return DistillationLoss(
        alpha=config.alpha,
        beta=config.beta,
        w_feat=config.w_feat,
        tau=config.tau,
        feature=config.feature,
        label_smoothing=config.label_smoothing,
        grids=[feature_grid(student, layer) for layer in pair_layers(recipe, student, "student")]
        or None,
    )


def _mixer(recipe: Recipe, num_classes: int, context: ProcessContext) -> Mixer | None:
    if not recipe.data.augment.mixes:
        return None
    return Mixer(
        recipe.data.augment,
        num_classes,
        recipe.loss.label_smoothing,
        seed=recipe.seed,
        device=context.device,
    )
