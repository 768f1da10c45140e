"""Optimizer and learning rate of a run."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from featkd.models.features import FeatureModel
from featkd.runtime.distributed import ProcessContext
from featkd.runtime.suggest import suggestion
from featkd.train.recipe import Recipe, RecipeError
from featkd.train.teacher import naming


class _Trained(nn.Module):
    """The student and the projectors, in this order, for an optimizer."""

    def __init__(self, student: FeatureModel, projectors: nn.ModuleDict) -> None:
        super().__init__()
        self.student = student
        self.projectors = projectors

    def no_weight_decay(self) -> set[str]:
        """Names of weights without weight decay, as timm's models list them."""
        names: set[str] = getattr(self.student, "no_weight_decay", set)()
        return {f"student.{name}" for name in names}


def create_optimizer(
    recipe: Recipe,
    student: FeatureModel,
    projectors: nn.ModuleDict,
    global_batch: int,
    context: ProcessContext,
) -> torch.optim.Optimizer:
    """Creates the optimizer of the student and the projectors.

    Raises:
        RecipeError: `optim.optimizer` is unknown or can't be used.
    """
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
        return create(_Trained(student, projectors))


def peak_lr(recipe: Recipe, global_batch: int) -> float:
    """Learning rate after the warm-up; proportional to the global batch."""
    return recipe.optim.lr * global_batch / recipe.optim.lr_batch


def check_min_lr(recipe: Recipe, global_batch: int) -> None:
    """Raises RecipeError if the learning rate at the end of the cosine is above the peak."""
    config, peak = recipe.optim, peak_lr(recipe, global_batch)
    if config.min_lr > peak:
        raise RecipeError(
            f"optim.min_lr: {config.min_lr:g} is above the peak learning rate {peak:.3g} (optim.lr "
            f"{config.lr:g} for {config.lr_batch} images, {global_batch} per update); expected "
            f"optim.min_lr <= {peak:.3g}, or optim.lr_batch: {global_batch} if optim.lr is meant "
            "for this batch"
        )


def create_scheduler(
    recipe: Recipe, optimizer: torch.optim.Optimizer, updates_per_epoch: int
) -> Scheduler:
    """Creates the schedule: a linear warm-up, then a cosine."""
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
