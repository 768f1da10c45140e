"""Sections of a recipe: student, teacher, loss, optimizer, checkpoints, evaluation, logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Arch = Literal["plain", "lift", "widelast", "heads_linear", "fixed_linear", "fixed_step"]


class RecipeError(ValueError):
    """A recipe that can't be run; names the field, its value and what is allowed."""


@dataclass
class StudentConfig:
    """The model that is trained.

    Args:
        base: timm name of the model that the student is built on.
        arch: changes for distillation: "plain" (none), "lift", "widelast", or another published
            width schedule.
        teacher_dim: channels of the teacher's feature map; not used by "plain".
        num_classes: classes; null for the number of class folders. Without labels null is the
            teacher's number if the loss uses its logits, else 0: no classifier.
        pretrained: start from timm's pretrained weights of the base.
        checkpoint: start from a weights file of the base, or of such a student, instead
            (.safetensors, .pth, or a featkd checkpoint).
        weights: weights of a featkd checkpoint, as for the teacher.
        options: further arguments of the timm model (img_size, patch_size, drop_path_rate, ...).
    """

    base: str = "deit_tiny_patch16_224"
    arch: Arch = "plain"
    teacher_dim: int = 384
    num_classes: int | None = None
    pretrained: bool = False
    checkpoint: str | None = None
    weights: Literal["auto", "model", "model_ema"] = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "pretrained" in self.options:  # its place in earlier versions
            self.options = dict(self.options)
            before = self.options.pop("pretrained")
            if self.pretrained and not before:
                raise RecipeError(
                    f"student.options.pretrained: {before!r}, but student.pretrained is true; "
                    "expected student.pretrained alone"
                )
            self.pretrained = bool(before)
        names = ("base", "arch", "teacher_dim", "num_classes", "checkpoint", "weights")
        _check_options("student", self.options, names)
        if self.pretrained and self.checkpoint is not None:
            raise RecipeError(
                f"student.checkpoint: {self.checkpoint!r}, but student.pretrained is true; "
                "expected one of them"
            )


@dataclass
class TeacherConfig:
    """The frozen model that is distilled.

    Args:
        name: timm name.
        pretrained: use timm's pretrained weights.
        checkpoint: weights file to use instead (.safetensors, .pth, or a featkd checkpoint).
        random: use random weights if neither of the two is given, instead of refusing to train
            against them; for tests and timings.
        weights: weights of a featkd checkpoint: the average ("model_ema"), the last update
            ("model"), or the one of the two with the better score ("auto").
        mean, std: statistics of the images that the teacher was trained on, per channel; null for
            those of timm's pretrained weights or of a featkd checkpoint, otherwise those of data.
        img_size: height and width to which images are resized for the teacher; null for
            data.img_size.
        options: further arguments of the timm model.
    """

    name: str = "cait_s24_224"
    pretrained: bool = False
    checkpoint: str | None = None
    random: bool = False
    weights: Literal["auto", "model", "model_ema"] = "auto"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    img_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fields = ("name", "pretrained", "checkpoint", "random", "weights", "mean", "std")
        _check_options("teacher", self.options, fields)
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is None:
                continue
            if len(value) != 3 or not all(math.isfinite(x) for x in value):
                raise RecipeError(
                    f"teacher.{name}: expected null or three finite numbers, got {value!r}"
                )
        if self.std is not None and min(self.std) <= 0:
            raise RecipeError(f"teacher.std: expected numbers > 0, got {self.std!r}")
        if self.img_size is not None:
            require("teacher.img_size", self.img_size, "> 0")
            inner = self.options.get("img_size")
            if inner not in (None, self.img_size):
                raise RecipeError(
                    f"teacher.img_size: {self.img_size}, but teacher.options.img_size is {inner!r};"
                    " expected one of them"
                )

    @property
    def has_weights(self) -> bool:
        """True if the weights are pretrained or come from a file."""
        return self.pretrained or self.checkpoint is not None


@dataclass
class PooledConfig:
    """The distance of the student's pooled features from the teacher's.

    Args:
        weight: weight of the distance; not multiplied by beta and w_feat.
        metric: "cosine" (1 - cos) or "mse"; the mean over the batch.
    """

    weight: float = 1.0
    metric: Literal["cosine", "mse"] = "cosine"

    def __post_init__(self) -> None:
        require("loss.pooled.weight", self.weight, "> 0")


@dataclass
class LossConfig:
    """The objective: (1 - alpha) CE + beta w_feat L_feat + alpha L_soft (+ the pooled distance).

    With data.labels "none" there is no CE: beta w_feat L_feat + alpha L_soft.

    Args:
        alpha: weight of the soft loss on the teacher's logits, 0 to 1.
        beta: weight of the feature loss; multiplied by w_feat, as published.
        w_feat: weight of the feature loss.
        tau: temperature of the soft loss.
        feature: feature loss, "mse", "spectral" or null (none).
        pairs: [student layer, teacher layer] pairs; negative layers count from the end.
        projector: trained projector from the student's maps to the teacher's width, "linear" (with
            bias), "linear_norm" (without bias, then LayerNorm) or "none": for all pairs of a
            "plain" student, otherwise for pairs whose widths differ. The student is saved without.
        pooled: also compare pooled features, through a linear projector of their own; null for no.
        label_smoothing: label smoothing of the cross-entropy; applied before labels are mixed.
    """

    alpha: float = 0.0
    beta: float = 1.0
    w_feat: float = 0.2
    tau: float = 1.0
    feature: Literal["mse", "spectral"] | None = None
    pairs: list[tuple[int, int]] = field(default_factory=lambda: [(-1, -1)])
    projector: Literal["none", "linear", "linear_norm"] = "none"
    pooled: PooledConfig | None = None
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        require("loss.tau", self.tau, "> 0")
        for name in ("beta", "w_feat"):
            require(f"loss.{name}", getattr(self, name), ">= 0")
        for name in ("alpha", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(
                    f"loss.{name}: expected a number from 0 to 1, got {getattr(self, name)!r}"
                )
        if self.projector != "none" and self.feature is None:
            raise RecipeError(
                f"loss.projector: {self.projector!r} projects feature maps, but loss.feature is "
                "null; expected loss.feature: mse or spectral, or loss.projector: none"
            )

    @property
    def compares_features(self) -> bool:
        """True if the loss compares feature maps or pooled features."""
        return self.feature is not None or self.pooled is not None


@dataclass
class OptimConfig:
    """Optimizer and learning rate.

    Args:
        optimizer: timm's name of the optimizer.
        lr: learning rate for a global batch of lr_batch images; scales linearly with the batch.
        lr_batch: global batch that lr refers to.
        weight_decay: weight decay; not applied to biases, norms, pos_embed and tokens.
        eps: epsilon of the optimizer.
        clip_grad: maximum gradient norm; null for no clipping.
        accumulate: micro-batches per update.
        epochs: passes over the training set.
        warmup_epochs: epochs of linear warm-up from warmup_lr, included in epochs.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end of the cosine.
        step_on: change the learning rate with each "epoch" or each "update".
    """

    optimizer: str = "adamw"
    lr: float = 5e-4
    lr_batch: int = 512
    weight_decay: float = 0.05
    eps: float = 1e-8
    clip_grad: float | None = None
    accumulate: int = 1
    epochs: int = 300
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    step_on: Literal["epoch", "update"] = "epoch"

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "lr_batch", "accumulate", "epochs"):
            require(f"optim.{name}", getattr(self, name), "> 0")
        for name in ("weight_decay", "warmup_lr", "min_lr", "warmup_epochs"):
            require(f"optim.{name}", getattr(self, name), ">= 0")
        if self.clip_grad is not None:
            require("optim.clip_grad", self.clip_grad, "> 0")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise RecipeError(
                f"optim.warmup_epochs: expected fewer than optim.epochs ({self.epochs}), got "
                f"{self.warmup_epochs}"
            )


@dataclass
class CheckpointConfig:
    """Checkpoints that are saved and kept. The last and the best are always kept.

    Args:
        every_epochs: epochs between two evaluations with a save; the last epoch is always saved.
        every_updates: also save every so many updates within an epoch; null for never.
        keep_every: keep the checkpoint of every k-th epoch; null for none. A multiple of
            every_epochs.
    """

    every_epochs: int = 1
    every_updates: int | None = None
    keep_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("every_epochs", "every_updates", "keep_every"):
            if getattr(self, name) is not None:
                require(f"checkpoint.{name}", getattr(self, name), "> 0")
        if self.keep_every is not None and self.keep_every % self.every_epochs:
            raise RecipeError(
                f"checkpoint.keep_every: {self.keep_every}, but checkpoint.every_epochs saves only "
                f"every {self.every_epochs} epochs; expected a multiple of {self.every_epochs}"
            )


@dataclass
class EvalConfig:
    """Evaluations during training.

    Args:
        knn: with labels, also compute kNN top-1 of the pooled features, leave-one-out among the
            validation images. Without labels it is computed whenever these have classes.
    """

    knn: bool = False


@dataclass
class LogConfig:
    """Logs beside the CSV files and TensorBoard.

    Args:
        trackers: "wandb" (Weights & Biases) and "mlflow", which receive the rows of the CSV files;
            they need featkd's extras of the same names.
    """

    trackers: list[Literal["wandb", "mlflow"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if {*self.trackers} - {"wandb", "mlflow"} or len({*self.trackers}) < len(self.trackers):
            raise RecipeError(
                f"log.trackers: expected wandb, mlflow or both, each once; got {self.trackers!r}"
            )


def require(name: str, value: float, bound: Literal["> 0", ">= 0"]) -> None:
    if not (math.isfinite(value) and (value > 0 or (value == 0 and bound == ">= 0"))):
        raise RecipeError(f"{name}: expected a finite number {bound}, got {value!r}")


def _check_options(section: str, options: Mapping[str, Any], fields: Sequence[str]) -> None:
    """Checks that the options of a timm model don't repeat fields of the recipe."""
    if not isinstance(options, Mapping):
        raise RecipeError(f"{section}.options: expected fields and values, got {options!r}")
    for name in fields:
        if name in options:
            raise RecipeError(
                f"{section}.options.{name}: {options[name]!r}: this is a field of {section}; "
                f"expected {section}.{name}"
            )
