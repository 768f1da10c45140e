"""Builds the components of a run from its recipe: loaders, models, loss, optimizer, schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from featkd.data import Loader, Mixer, build_loader
from featkd.functional import Metric
from featkd.losses import DistillationLoss
from featkd.models import Lift, create_student
from featkd.models.features import FeatureModel, feature_grid, layers_of, num_layers
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.environment import has_fast_bf16, product_speedup
from featkd.runtime.suggest import suggestion
from featkd.train.cached_teacher import CachedTeacher, cache_views, open_cache
from featkd.train.layer_pairs import LayerPairs, check_fit, resolve_layer_pairs
from featkd.train.parallel import replicate, shard
from featkd.train.precision import AMP_DTYPES
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.teacher import Teacher, create_teacher_model, naming, output_shapes
from featkd.train.teacher_checks import check_teacher
from featkd.train.teacher_images import matched_tokens


class StudentOutputs(NamedTuple):
    """Student outputs; `maps` is empty if `feature_loss`, a scalar, is set."""

    logits: Tensor
    maps: list[Tensor]
    feature_loss: Tensor | None


class FeatureForward(nn.Module):
    """`forward_with_features` of a student as a module's forward, for DDP and torch.compile."""

    def __init__(self, model: FeatureModel, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.model.forward_with_features(images, self.layers)


class LossForward(nn.Module):
    """`forward_with_loss` of a Lift student as a module's forward, for DDP and torch.compile."""

    def __init__(self, model: Lift, metric: Metric) -> None:
        super().__init__()
        self.model = model
        self.metric: Metric = metric
        self.grid = feature_grid(model)

    def forward(self, images: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.forward_with_loss(images, teacher_map, metric=self.metric, grid=self.grid)


@dataclass
class RunComponents:
    """Everything that a run works with.

    `student_forward` is the module that the training loop calls. It returns logits and feature
    maps; if `student_forms_loss`, it also takes the teacher's map and returns logits and the
    feature loss.
    """

    train_loader: Loader
    val_loader: Loader
    student: FeatureModel
    student_forward: nn.Module
    student_forms_loss: bool
    teacher: Teacher | CachedTeacher | None
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

    @property
    def teacher_model(self) -> FeatureModel | None:
        """The frozen model; None without a teacher, or if its outputs come from a cache."""
        return self.teacher.model if isinstance(self.teacher, Teacher) else None

    def state_dict(self) -> dict[str, Any]:
        """Returns the components' part of a checkpoint."""
        return {
            "model": self.student.state_dict(),
            "model_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.train_loader.state_dict(),
            "pixels": self.train_loader.decoder,
            "classes": self.train_loader.classes,
            "num_classes": self.num_classes,
        }

    def close(self) -> None:
        """Stops the workers of the loaders."""
        self.train_loader.close()
        self.val_loader.close()


def build(recipe: Recipe, context: ProcessContext, *, strict_classes: bool = True) -> RunComponents:
    """Builds all components of a run.

    Args:
        recipe: the run.
        context: this process.
        strict_classes: refuse a model with more outputs than there are class folders.

    Raises:
        RecipeError: components do not fit each other; names the fields.
        ValueError: an error of a component (data folders, layers, model names, checkpoints).
    """
    notes: list[str] = []
    train_loader = _loader(recipe, context, "train", cache_views(recipe))
    val_loader = _loader(recipe, context, "val")
    notes += {loader.note: None for loader in (train_loader, val_loader) if loader.note}
    try:
        num_classes = count_classes(recipe, train_loader.classes, notes, strict=strict_classes)
        student = build_student(recipe, num_classes)
        student.to(context.device)
        compiled = recipe.compiles_on(context.device.type)
        if compiled and recipe.amp == "bf16" and context.device.type == "cpu":
            unfuse_attention(cast(nn.Module, student), context)
        teacher, pairs = _teacher(recipe, student, num_classes, train_loader, context, notes)
        if teacher is not None:
            check_fit(recipe, student, pairs, teacher.shapes, context, notes)
        else:
            output_shapes("student", student, (), recipe, context)
        notes += _precision_notes(recipe, context.device)

        updates_per_epoch = len(train_loader) // recipe.optim.accumulate
        if updates_per_epoch == 0:
            raise RecipeError(
                f"optim.accumulate: {recipe.optim.accumulate} micro-batches per update, but an "
                f"epoch has {len(train_loader)}"
            )
        global_batch = recipe.batch_size * context.world_size * recipe.optim.accumulate
        _check_min_lr(recipe, global_batch)
        sharded = recipe.distributed == "fsdp" and context.world_size > 1
        if recipe.distributed == "fsdp" and not sharded:
            notes.append("distributed: fsdp has no effect on a run of one process")
        ema = _average(recipe, student, sharded)
        student_forward = _student_forward(recipe, student, pairs)
        student_forms_loss = isinstance(student_forward, LossForward)
        if compiled:
            mode = recipe.compile_mode_on(
                context.device.type, context.world_size, recipe.optim.accumulate
            )
            # Gathering the weights of a shard interrupts a compiled graph.
            for module in layers_of(student) if sharded else (student_forward,):
                module.compile(mode=mode)
        if sharded:
            shard([student] if ema is None else [student, ema.module], context)
        elif context.world_size > 1:
            student_forward = replicate(student_forward, context)
        optimizer = _optimizer(recipe, student, global_batch, context)
        scheduler = _scheduler(recipe, optimizer, updates_per_epoch)
    except BaseException:
        train_loader.close()
        val_loader.close()
        raise
    return RunComponents(
        train_loader=train_loader,
        val_loader=val_loader,
        student=student,
        student_forward=student_forward,
        student_forms_loss=student_forms_loss,
        teacher=teacher,
        loss=_loss(recipe, student, pairs),
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
    """Returns the number of outputs of the student.

    Args:
        recipe: the run.
        classes: class names of the training set.
        notes: notes for the user are appended here.
        strict: refuse a student with more outputs than classes instead of noting it.

    Raises:
        RecipeError: `student.num_classes` does not fit the training set.
    """
    asked, found = recipe.student.num_classes, len(classes)
    if asked is None and found < 2:
        raise RecipeError(
            f"data.path: the training set in {recipe.data.path} has one class ({classes[0]}); "
            "expected two or more class folders"
        )
    if asked is not None and asked < 2:
        raise RecipeError(f"student.num_classes: expected >= 2, got {asked}")
    if asked is None or asked == found:
        return found
    message = (
        f"student.num_classes: {asked}, but the training set has {found} class "
        f"{'folder' if found == 1 else 'folders'}; expected {found}, or null for their number "
        "(--student.num-classes null)"
    )
    if strict or asked < found:
        raise RecipeError(message)
    notes.append(message)
    return asked


def build_student(recipe: Recipe, num_classes: int) -> FeatureModel:
    """Creates the recipe's student, with weights initialised from its seed."""
    torch.manual_seed(recipe.seed)
    config = recipe.student
    options = {"img_size": recipe.data.img_size, **config.options}
    with naming("student"):
        return create_student(config.base, config.arch, config.teacher_dim, num_classes, **options)


def _teacher(
    recipe: Recipe,
    student: FeatureModel,
    num_classes: int,
    train_loader: Loader,
    context: ProcessContext,
    notes: list[str],
) -> tuple[Teacher | CachedTeacher | None, LayerPairs]:
    """Builds the teacher or opens its cache; resolves the layer pairs of the feature loss."""
    if recipe.teacher is None:
        return None, LayerPairs()

    def pairs_for(teacher_depth: int) -> LayerPairs:
        if recipe.loss.feature is None:
            return LayerPairs()
        return resolve_layer_pairs(recipe, num_layers(student), teacher_depth)

    if recipe.cache is not None:
        cache = open_cache(recipe, train_loader, context, notes)
        check_teacher(recipe, train_loader.classes)
        pairs = pairs_for(cache.manifest.depth)
        image_name = train_loader.dataset.name
        return CachedTeacher(cache, pairs.teacher, context.device, image_name), pairs
    classes = train_loader.classes
    model, adapter = create_teacher_model(recipe, num_classes, classes, context, notes)
    pairs = pairs_for(num_layers(model))
    shapes = output_shapes("teacher", model, pairs.teacher, recipe, context)
    student_maps = output_shapes("student", student, pairs.student, recipe, context).maps
    tokens = matched_tokens(student_maps, shapes.maps, notes)
    logits = recipe.loss.alpha > 0
    teacher = Teacher(
        *(model, pairs.teacher, recipe, context),
        logits=logits,
        adapter=adapter,
        shapes=shapes,
        tokens=tokens,
    )
    return teacher, pairs


def _precision_notes(recipe: Recipe, device: torch.device) -> list[str]:
    """Notes on a precision that is slower than float32 on this device."""
    dtype = AMP_DTYPES.get(recipe.amp)
    if dtype is None or (speedup := product_speedup(dtype, device)) >= 0.9:
        return []
    return [
        f"amp: a matrix product in {recipe.amp} takes {1 / speedup:.1f} times as long as in "
        "float32 on this device (measured); --amp off is faster"
    ]


def unfuse_attention(student: nn.Module, context: ProcessContext) -> None:
    """Replaces fused attention by products and a softmax in a compiled bf16 student on a CPU.

    The backward pass of torch's fused attention does not use the CPU's bf16 instructions and is
    slower if there are any. Unfused attention takes more memory: it keeps the (heads, N, N) maps
    of all blocks.
    """
    if has_fast_bf16(context.device):
        for module in student.modules():
            if isinstance(getattr(module, "fused_attn", None), bool):
                module.fused_attn = False  # type: ignore[assignment]


def _student_forward(recipe: Recipe, student: FeatureModel, pairs: LayerPairs) -> nn.Module:
    """Module that the training loop calls.

    A Lift student whose last map alone is compared computes the feature loss itself, without
    storing the map.
    """
    metric, last = recipe.loss.feature, num_layers(student) - 1
    if metric is not None and isinstance(student, Lift) and pairs.student == (last,):
        return LossForward(student, metric)
    return FeatureForward(student, pairs.student)


def _average(recipe: Recipe, student: FeatureModel, sharded: bool) -> Any:
    if recipe.ema_decay is None:
        return None
    # timm averages buffers and parameters together, which are of two kinds in a sharded model.
    return ModelEmaV3(student, decay=recipe.ema_decay, exclude_buffers=sharded)


def _optimizer(
    recipe: Recipe, student: FeatureModel, global_batch: int, context: ProcessContext
) -> torch.optim.Optimizer:
    config = recipe.optim
    names = list_optimizers()
    if config.optimizer not in names:
        near = suggestion(config.optimizer, names)
        raise RecipeError(f"optim.optimizer: timm has no {config.optimizer!r}{near}")
    # A fused optimizer reads and writes each tensor once.
    can_fuse = context.device.type in ("cpu", "cuda") and config.optimizer in ("adam", "adamw")
    fused = {"fused": True} if can_fuse else {}

    def create(model: Any) -> torch.optim.Optimizer:
        optimizer = create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=peak_lr(recipe, global_batch),
            weight_decay=config.weight_decay,
            eps=config.eps,
            **fused,
        )
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    with naming(f"optim.optimizer: {config.optimizer!r} can't be used"):
        # Some need arguments that training does not pass, which only an update shows.
        tiny = nn.Linear(2, 2, device=context.device)
        tiny(torch.ones(1, 2, device=context.device)).sum().backward()
        create(tiny).step()
        return create(student)


def peak_lr(recipe: Recipe, global_batch: int) -> float:
    """Learning rate after the warm-up; proportional to the global batch."""
    return recipe.optim.lr * global_batch / recipe.optim.lr_batch


def _check_min_lr(recipe: Recipe, global_batch: int) -> None:
    config, peak = recipe.optim, peak_lr(recipe, global_batch)
    if config.min_lr > peak:
        raise RecipeError(
            f"optim.min_lr: {config.min_lr:g} is above the peak learning rate {peak:.3g} (optim.lr "
            f"{config.lr:g} for {config.lr_batch} images, {global_batch} per update); expected "
            f"optim.min_lr <= {peak:.3g}, or optim.lr_batch: {global_batch} if optim.lr is meant "
            "for this batch"
        )


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


def _loss(recipe: Recipe, student: FeatureModel, pairs: LayerPairs) -> DistillationLoss:
    config = recipe.loss
    return DistillationLoss(
        alpha=config.alpha,
        beta=config.beta,
        w_feat=config.w_feat,
        tau=config.tau,
        feature=config.feature,
        label_smoothing=config.label_smoothing,
        grids=[feature_grid(student, layer) for layer in pairs.student] or None,
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
