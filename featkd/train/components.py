"""Builds the components of a run from its recipe: loaders, models, loss, optimizer, schedule."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from featkd.cache import TeacherCache, TeacherOutputs
from featkd.data import Batch, Loader, Mixer, build_loader
from featkd.losses import DistillationLoss, DistillationTerms
from featkd.models.features import POOLED, FeatureModel, layers_of, num_layers
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.environment import has_fast_bf16, product_speedup
from featkd.runtime.names import listed, plural
from featkd.train.cached_teacher import CachedTeacher, cache_views, open_cache
from featkd.train.layer_pairs import LayerPairs, check_fit, resized_maps, resolve_layer_pairs
from featkd.train.optimizer import check_min_lr, create_optimizer, create_scheduler
from featkd.train.parallel import replicate, shard
from featkd.train.precision import AMP_DTYPES, autocast
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.student import build_student, classes_of, count_classes
from featkd.train.student_forward import (
    StudentOutputs,
    create_projectors,
    create_student_forward,
    feature_grids,
    freeze_unreached,
)
from featkd.train.teacher import (
    OutputShapes,
    Teacher,
    TeacherModel,
    create_teacher_model,
    output_shapes,
)
from featkd.train.trackers import check_installed


@dataclass
class RunComponents:
    """Everything that a run works with, and the forward passes.

    `student_forward` is the module that the training loop calls with images and the teacher's maps;
    it returns the fields of `StudentOutputs`. `projectors` are its losses with trained projectors.
    """

    recipe: Recipe
    context: ProcessContext
    train_loader: Loader
    val_loader: Loader
    student: FeatureModel
    student_forward: nn.Module
    projectors: nn.ModuleDict
    teacher: Teacher | CachedTeacher | None
    pairs: LayerPairs
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

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained: the student and the projectors."""
        return [*self.student.parameters(), *self.projectors.parameters()]

    @property
    def computes_knn(self) -> bool:
        """True if evaluations compute kNN."""
        return self.recipe.asks_knn and bool(self.val_loader.classes)

    def autocast(self) -> AbstractContextManager[object]:
        """Context of the run's precision."""
        return autocast(self.recipe.amp, self.context.device)

    def teacher_outputs(self, batch: Batch) -> TeacherOutputs:
        """Teacher outputs for a batch on the device; empty without a teacher."""
        return TeacherOutputs(None, []) if self.teacher is None else self.teacher.outputs(batch)

    def student_outputs(
        self, images: Tensor, teacher: TeacherOutputs, forward: nn.Module | None = None
    ) -> StudentOutputs:
        """Runs the student, or another forward module of its kind, such as that of the average."""
        with self.autocast():
            return StudentOutputs(*(forward or self.student_forward)(images, teacher.maps))

    def compute_loss(
        self, student: StudentOutputs, targets: Tensor, teacher: TeacherOutputs
    ) -> DistillationTerms:
        """Computes the loss terms; without labels, the targets are not read."""
        labels = None if self.recipe.data.labels == "none" else targets
        with self.autocast():
            terms: DistillationTerms = self.loss(
                student.logits,
                labels,
                teacher.logits,
                student.maps,
                teacher.maps,
                feature_loss=student.feature_loss,
                pooled_loss=student.pooled_loss,
            )
        return terms

    def state_dict(self) -> dict[str, Any]:
        """Returns the components' part of a checkpoint."""
        projectors = {"projectors": self.projectors.state_dict()} if self.projectors else {}
        return {
            **projectors,
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


def build(
    recipe: Recipe,
    context: ProcessContext,
    *,
    strict_classes: bool = True,
    starting_weights: bool = True,
) -> RunComponents:
    """Builds all components of a run.

    Args:
        recipe: the run.
        context: this process.
        strict_classes: refuse a model with more outputs than there are class folders.
        starting_weights: load the student's starting weights; a resumed run replaces them.

    Raises:
        RecipeError: components do not fit each other; names the fields.
        ValueError: an error of a component (data folders, layers, model names, checkpoints).
        ImportError: the package of a tracker is missing.
    """
    check_installed(recipe.log.trackers)  # first, because building takes long
    notes: list[str] = []
    load = partial(
        build_loader,
        recipe.data,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        rank=context.rank,
        world_size=context.world_size,
        device=context.device,
    )
    train_loader, val_loader = load(split="train", views=cache_views(recipe)), load(split="val")
    notes += {loader.note: None for loader in (train_loader, val_loader) if loader.note}
    try:
        num_classes = count_classes(recipe, train_loader.classes, notes, strict=strict_classes)
        source: TeacherModel | TeacherCache | None = None
        if recipe.cache is not None:
            source = open_cache(recipe, train_loader, context, notes)
        elif recipe.teacher is not None:
            classes = train_loader.classes
            source = create_teacher_model(recipe, num_classes, classes, context, notes)
        if num_classes is None:
            assert source is not None  # loss.alpha > 0
            num_classes = classes_of(source)
        student = build_student(recipe, num_classes, notes if starting_weights else None)
        student.to(context.device)
        compiled = recipe.compiles_on(context.device.type)
        if compiled and recipe.amp == "bf16" and context.device.type == "cpu":
            unfuse_attention(cast(nn.Module, student), context)
        teacher, pairs, shapes = _teacher(recipe, student, source, train_loader, context, notes)
        projectors = nn.ModuleDict()
        if teacher is not None:
            check_fit(recipe, num_layers(student), shapes, teacher.shapes, notes)
            projectors = create_projectors(
                recipe, student, shapes.maps, teacher.shapes.maps, context.device, notes
            )
        dtype = AMP_DTYPES.get(recipe.amp)
        if dtype is not None and (speedup := product_speedup(dtype, context.device)) < 0.9:
            notes.append(
                f"amp: a matrix product in {recipe.amp} takes {1 / speedup:.1f} times as long as "
                "in float32 on this device (measured); --amp off is faster"
            )
        updates_per_epoch = len(train_loader) // recipe.optim.accumulate
        if updates_per_epoch == 0:
            raise RecipeError(
                f"optim.accumulate: {recipe.optim.accumulate} micro-batches per update, but an "
                f"epoch has {len(train_loader)}"
            )
        global_batch = recipe.batch_size * context.world_size * recipe.optim.accumulate
        check_min_lr(recipe, global_batch)
        sharded = recipe.distributed == "fsdp" and context.world_size > 1
        if recipe.distributed == "fsdp" and not sharded:
            notes.append("distributed: fsdp has no effect on a run of one process")
        ema = None
        if recipe.ema_decay is not None:
            notes += average_notes(recipe.ema_decay, updates_per_epoch * recipe.optim.epochs)
            # timm averages buffers and parameters together, which are of two kinds when sharded.
            ema = ModelEmaV3(student, decay=recipe.ema_decay, exclude_buffers=sharded)
        student_forward = create_student_forward(recipe, student, pairs, projectors)
        if frozen := freeze_unreached(recipe, student, pairs, context.device):
            notes.append(
                f"student: {plural(len(frozen), 'tensor')} are frozen, because the loss does not "
                f"reach them: {listed(frozen, 3)}"
            )
        if recipe.asks_knn and val_loader.classes:  # needs the pooled feature
            output_shapes("student", student, (POOLED,), recipe, context)
        if compiled:
            mode = recipe.compile_mode_on(
                context.device.type, context.world_size, recipe.optim.accumulate
            )
            # Gathering the weights of a shard interrupts a compiled graph.
            for module in layers_of(student) if sharded else (student_forward,):
                module.compile(mode=mode)
        if sharded:
            models = [student] if ema is None else [student, ema.module]
            shard(models, projectors.values(), context)
        elif context.world_size > 1:
            student_forward = replicate(student_forward, context)
        optimizer = create_optimizer(recipe, student, projectors, global_batch, context)
        scheduler = create_scheduler(recipe, optimizer, updates_per_epoch)
    except BaseException:
        train_loader.close()
        val_loader.close()
        raise
    return RunComponents(
        recipe=recipe,
        context=context,
        train_loader=train_loader,
        val_loader=val_loader,
        student=student,
        student_forward=student_forward,
        projectors=projectors,
        teacher=teacher,
        pairs=pairs,
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


def _teacher(
    recipe: Recipe,
    student: FeatureModel,
    source: TeacherModel | TeacherCache | None,
    train_loader: Loader,
    context: ProcessContext,
    notes: list[str],
) -> tuple[Teacher | CachedTeacher | None, LayerPairs, OutputShapes]:
    """Prepares the teacher's outputs; resolves layer pairs and the shapes of the student's maps."""
    if source is None:
        return None, LayerPairs(), output_shapes("student", student, (), recipe, context)
    depth = source.manifest.depth if isinstance(source, TeacherCache) else num_layers(source.model)
    maps = recipe.loss.feature is not None
    pairs = resolve_layer_pairs(recipe, num_layers(student), depth, maps=maps)
    own = output_shapes("student", student, pairs.student, recipe, context)
    if isinstance(source, TeacherCache):
        names = train_loader.dataset.name
        return CachedTeacher(source, pairs.teacher, context.device, names), pairs, own
    shapes = output_shapes("teacher", source.model, pairs.teacher, recipe, context)
    shapes = shapes._replace(maps=resized_maps(own.maps, shapes.maps, notes))
    teacher = Teacher(source, recipe, context, logits=recipe.loss.alpha > 0, shapes=shapes)
    return teacher, pairs, own


def average_notes(decay: float, updates: int) -> list[str]:
    """Returns a note on a run that is too short for its weight average, or nothing."""
    initial = decay**updates
    if initial < 0.1:
        return []
    shorter = f"{1 - 4 / updates:.3g} averages its last quarter; " if updates > 4 else ""
    return [
        f"ema_decay: with {decay} the average consists of the initial weights to "
        f"{100 * initial:.0f} % after the run's {plural(updates, 'update')}; {shorter}null turns "
        "it off"
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


def _loss(recipe: Recipe, student: FeatureModel, pairs: LayerPairs) -> DistillationLoss:
    config = recipe.loss
    return DistillationLoss(
        alpha=config.alpha,
        beta=config.beta,
        w_feat=config.w_feat,
        tau=config.tau,
        feature=config.feature,
        label_smoothing=config.label_smoothing,
        grids=feature_grids(student, pairs) or None,
        pooled=0.0 if config.pooled is None else config.pooled.weight,
    )


def _mixer(recipe: Recipe, num_classes: int, context: ProcessContext) -> Mixer | None:
    if not recipe.data.augment.mixes:
        return None
    return Mixer(
        recipe.data.augment,
        max(1, num_classes),  # the mixed labels are not read without labels
        recipe.loss.label_smoothing,
        seed=recipe.seed,
        device=context.device,
    )
