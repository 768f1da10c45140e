"""Recipes: typed dataclasses, read from YAML, with everything that a training run depends on."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from featkd.data.config import DataConfig

Arch = Literal["plain", "lift", "widelast", "heads_linear", "fixed_linear", "fixed_step"]


NO_FASTEST = (
    "teacher.inference: 'fastest' was removed; the teacher runs as compile and compile_mode set"
)


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
        num_classes: classes; null for the number of class folders.
        options: further arguments of the timm model (img_size, patch_size, drop_path_rate, ...).
    """

    base: str = "deit_tiny_patch16_224"
    arch: Arch = "plain"
    teacher_dim: int = 384
    num_classes: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_options("student", self.options, ("base", "arch", "teacher_dim", "num_classes"))


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
        fields = ("name", "pretrained", "checkpoint", "weights", "mean", "std")
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
            _require("teacher.img_size", self.img_size, "> 0")
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
class LossConfig:
    """The objective: (1 - alpha) CE + beta w_feat L_feat + alpha L_soft.

    Args:
        alpha: weight of the soft loss on the teacher's logits, 0 to 1.
        beta: weight of the feature loss; multiplied by w_feat, as published.
        w_feat: weight of the feature loss.
        tau: temperature of the soft loss.
        feature: feature loss, "mse", "spectral" or null (none).
        pairs: [student layer, teacher layer] pairs; negative layers count from the end.
        label_smoothing: label smoothing of the cross-entropy; applied before labels are mixed.
    """

    alpha: float = 0.0
    beta: float = 1.0
    w_feat: float = 0.2
    tau: float = 1.0
    feature: Literal["mse", "spectral"] | None = None
    pairs: list[tuple[int, int]] = field(default_factory=lambda: [(-1, -1)])
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        _require("loss.tau", self.tau, "> 0")
        for name in ("beta", "w_feat"):
            _require(f"loss.{name}", getattr(self, name), ">= 0")
        for name in ("alpha", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(
                    f"loss.{name}: expected a number from 0 to 1, got {getattr(self, name)!r}"
                )


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
            _require(f"optim.{name}", getattr(self, name), "> 0")
        for name in ("weight_decay", "warmup_lr", "min_lr", "warmup_epochs"):
            _require(f"optim.{name}", getattr(self, name), ">= 0")
        if self.clip_grad is not None:
            _require("optim.clip_grad", self.clip_grad, "> 0")
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
                _require(f"checkpoint.{name}", getattr(self, name), "> 0")
        if self.keep_every is not None and self.keep_every % self.every_epochs:
            raise RecipeError(
                f"checkpoint.keep_every: {self.keep_every}, but checkpoint.every_epochs saves only "
                f"every {self.every_epochs} epochs; expected a multiple of {self.every_epochs}"
            )


@dataclass
class Recipe:
    """A training run. Every field can be overridden on the command line.

    Args:
        out: folder or URL for checkpoints, logs and metrics.
        seed: seed of everything random.
        batch_size: images per process and micro-batch.
        student: the model that is trained.
        teacher: the model that is distilled; null trains the student alone.
        loss: the objective.
        data: images and augmentation.
        optim: optimizer and schedule.
        checkpoint: checkpoints that are saved and kept.
        ema_decay: decay of the weight average, which is also evaluated; null for no average.
        amp: automatic mixed precision: "off", "bf16" or "fp16" (with loss scaling).
        compile: use torch.compile for student and teacher; "auto": on a GPU only.
        compile_mode: torch.compile's mode; "reduce-overhead" and "max-autotune" use CUDA graphs.
            "auto": "reduce-overhead" on a GPU, for the teacher, and for the student of a run of one
            process without accumulation; otherwise "default".
        distributed: several processes each hold the whole student and its optimizer ("ddp"), or a
            share of them ("fsdp"), which needs less memory and sends more.
        device: "auto" (CUDA if available), "cpu", "cuda" or "cuda:N".
        log_every: updates between two rows of metrics.
        cache: folder of `featkd cache`, read instead of running the teacher; null for none.
        cache_epochs: with more epochs than the cache has views: "error", or "cycle" to start again
            with the first view.
    """

    out: str = "runs/featkd"
    seed: int = 0
    batch_size: int = 512
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    ema_decay: float | None = 0.99996
    amp: Literal["off", "bf16", "fp16"] = "bf16"
    compile: bool | Literal["auto"] = "auto"
    compile_mode: Literal["auto", "default", "reduce-overhead", "max-autotune"] = "auto"
    distributed: Literal["ddp", "fsdp"] = "ddp"
    device: str = "auto"
    log_every: int = 50
    cache: str | None = None
    cache_epochs: Literal["error", "cycle"] = "error"

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every"):
            _require(name, getattr(self, name), "> 0")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise RecipeError(
                f"ema_decay: expected null or a number in [0, 1), got {self.ema_decay}"
            )
        if self.teacher is None:
            if self.loss.alpha > 0:
                raise RecipeError(f"loss.alpha: {self.loss.alpha} needs a teacher, teacher is null")
            if self.loss.feature is not None:
                raise RecipeError(f"loss.feature: {self.loss.feature!r} needs a teacher")
        elif self.loss.alpha == 0 and self.loss.feature is None:
            raise RecipeError(
                "teacher: not used by the loss (loss.alpha is 0 and loss.feature is null); "
                "expected null, or a loss that uses it"
            )
        if self.cache is not None:
            check_local("cache", self.cache)
            if self.teacher is None:
                raise RecipeError(
                    f"cache: {self.cache!r} holds a teacher's outputs, but teacher is null; "
                    "expected the teacher that the cache was made with"
                )
        asks_graphs = self.compile_mode in ("reduce-overhead", "max-autotune")
        if asks_graphs and not self.compile:
            raise RecipeError(f"compile_mode: {self.compile_mode!r} needs compile: true or auto")
        if asks_graphs and self.optim.accumulate > 1:
            # Gradients would lie in a graph's memory, which the next replay overwrites.
            raise RecipeError(
                f"compile_mode: {self.compile_mode!r} uses CUDA graphs, which can't accumulate "
                f"gradients (optim.accumulate is {self.optim.accumulate}); expected auto or default"
            )
        if asks_graphs and self.distributed == "fsdp":
            raise RecipeError(
                f"compile_mode: {self.compile_mode!r} uses CUDA graphs, which need weights that "
                "stay in place, but distributed is 'fsdp'; expected auto or default, or ddp"
            )
        if self.batch_size % 2 and self.data.augment.mixes:
            raise RecipeError(
                f"batch_size: {self.batch_size} is odd, and data.augment.mixup and cutmix mix "
                "images in pairs; expected an even number"
            )
        if self.loss.feature is not None and not self.loss.pairs:
            raise RecipeError(
                f"loss.pairs: empty, but loss.feature is {self.loss.feature!r}; expected "
                "[student layer, teacher layer] pairs"
            )

    def compiles_on(self, device_type: str) -> bool:
        """Checks whether student and teacher are compiled on a "cpu" or "cuda" device."""
        return device_type == "cuda" if self.compile == "auto" else self.compile

    def compile_mode_on(self, device_type: str, world_size: int = 1, accumulate: int = 1) -> str:
        """Returns torch.compile's mode for a model.

        Args:
            device_type: "cpu" or "cuda".
            world_size: processes that share the model's gradients.
            accumulate: micro-batches whose gradients the model adds up.
        """
        if self.compile_mode != "auto":
            return self.compile_mode
        # A graph's gradients lie in its own memory: the next replay would overwrite those being
        # added up. DDP's all-reduce beside graphs has not been run on a GPU.
        graphs = device_type == "cuda" and world_size == accumulate == 1
        return "reduce-overhead" if graphs else "default"


def check_local(name: str, folder: str) -> None:
    """Checks that a folder is not a URL; as a path, it would become a folder named "s3:".

    Raises:
        RecipeError: it is a URL.
    """
    if "://" in folder:
        raise RecipeError(f"{name}: expected a folder on this machine, got {folder!r}")


def _require(name: str, value: float, bound: Literal["> 0", ">= 0"]) -> None:
    if not (math.isfinite(value) and (value > 0 or (value == 0 and bound == ">= 0"))):
        raise RecipeError(f"{name}: expected a finite number {bound}, got {value!r}")


def _check_options(section: str, options: Mapping[str, Any], fields: Sequence[str]) -> None:
    """Checks that the options of a timm model don't repeat fields of the recipe."""
    for name in fields:
        if name in options:
            raise RecipeError(
                f"{section}.options.{name}: {options[name]!r}: this is a field of {section}; "
                f"expected {section}.{name}"
            )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Converts a recipe to plain lists, dicts, strings and numbers, as stored in checkpoints."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return plain


def to_yaml(recipe: Recipe) -> str:
    """Converts a recipe to YAML text that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)
