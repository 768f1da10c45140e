"""Recipes: typed dataclasses, read from YAML, with everything that a training run depends on."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from featkd.data.config import DataConfig
from featkd.train.recipe_sections import (
    Arch,
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    LossConfig,
    OptimConfig,
    PooledConfig,
    RecipeError,
    StudentConfig,
    TeacherConfig,
    require,
)

__all__ = [
    "NO_FASTEST",
    "Arch",
    "CheckpointConfig",
    "EvalConfig",
    "LogConfig",
    "LossConfig",
    "OptimConfig",
    "PooledConfig",
    "Recipe",
    "RecipeError",
    "StudentConfig",
    "TeacherConfig",
    "check_local",
    "to_dict",
    "to_yaml",
]


NO_FASTEST = (
    "teacher.inference: 'fastest' was removed; the teacher runs as compile and compile_mode set"
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
        eval: evaluations during training.
        log: trackers.
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
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
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
            require(name, getattr(self, name), "> 0")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise RecipeError(
                f"ema_decay: expected null or a number in [0, 1), got {self.ema_decay}"
            )
        unlabelled = self.data.labels == "none"
        if unlabelled and self.loss.alpha == 0 and not self.loss.compares_features:
            raise RecipeError(
                "data.labels: none, but without labels the loss is empty: loss.alpha is 0, "
                "loss.feature and loss.pooled are null; expected one of them, with a teacher, or "
                "data.labels: folders"
            )
        if self.teacher is None:
            if self.loss.alpha > 0:
                raise RecipeError(f"loss.alpha: {self.loss.alpha} needs a teacher, teacher is null")
            if self.loss.feature is not None:
                raise RecipeError(
                    f"loss.feature: {self.loss.feature!r} needs a teacher, teacher is null; "
                    "expected a teacher, or loss.feature: null"
                )
            if self.loss.pooled is not None:
                raise RecipeError("loss.pooled: needs a teacher, teacher is null")
        elif self.loss.alpha == 0 and not self.loss.compares_features:
            raise RecipeError(
                "teacher: not used by the loss (loss.alpha is 0, loss.feature and loss.pooled are "
                "null); expected null, or a loss that uses it"
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

    @property
    def required_teacher(self) -> TeacherConfig:
        """The teacher, which must not be null."""
        assert self.teacher is not None
        return self.teacher

    @property
    def uses_logits(self) -> bool:
        """True if the loss uses the student's logits."""
        return self.data.labels == "folders" or self.loss.alpha > 0

    @property
    def asks_knn(self) -> bool:
        """True if evaluations compute kNN, provided the validation images have classes."""
        return self.eval.knn or self.data.labels == "none"

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


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Converts a recipe to plain lists, dicts, strings and numbers, as stored in checkpoints."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return plain


def to_yaml(recipe: Recipe) -> str:
    """Converts a recipe to YAML text that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)
